"""Emit readable Triton kernels from a spec, and run them where there is a GPU.

``can_run`` says why a spec has no kernel, ``emit`` writes one, ``emit_all`` those of a model.  ``run`` is the
CUDA implementation of ``torch.ops.attnc.attend``; ``tune`` measures which tiles it should take.
``run_blocks`` computes listed blocks only, ``run_varlen`` takes packed sequences and has a gradient,
``attend_paged`` takes a cache in pages.
``aot.report_rows`` compiles a kernel without a GPU.
"""

from attnc.codegen.triton.contest import Lengths
from attnc.codegen.triton.emit import can_run, emit, emit_all
from attnc.codegen.triton.launch import attend_paged, run, run_blocks, run_varlen
from attnc.codegen.triton.tune import Tuning, tune

NAME = "triton"

__all__ = [
    "NAME",
    "Lengths",
    "Tuning",
    "attend_paged",
    "can_run",
    "emit",
    "emit_all",
    "run",
    "run_blocks",
    "run_varlen",
    "tune",
]
