"""Emit readable Triton kernels from a spec, and run them where there is a GPU.

``can_run`` says why a spec has no kernel, ``emit`` writes one, ``emit_all`` those of a model.  ``run`` is the
CUDA implementation of ``torch.ops.attnc.attend``, ``attend_paged`` its like for a cache in pages.
``aot.report_rows`` compiles a kernel without a GPU.
"""

from attnc.codegen.triton.emit import can_run, emit, emit_all
from attnc.codegen.triton.launch import attend_paged, run

NAME = "triton"

__all__ = ["NAME", "attend_paged", "can_run", "emit", "emit_all", "run"]
