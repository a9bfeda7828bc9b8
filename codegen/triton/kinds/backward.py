"""The gradients of q, k, v and captured float tensors, from those of the output and of the log-sum-exp.

Weights are computed again in each tile, never stored, and nothing is added atomically: one program owns each
number that is written, so results repeat bit for bit.  Kernels of one file: ``rows`` (what each query needs
once), ``dq`` (queries held, keys visited), ``dkdv`` (keys held, queries visited), and one per captured tensor
of pairs that broadcasts over batch entries or heads, whose gradient is summed over these.
Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

from __future__ import annotations

from attnc.codegen.triton.backward import extra_kernels, fill_holes
from attnc.codegen.triton.configs import choose_backward
from attnc.codegen.triton.kinds.kind import Kind, Program
from attnc.ir import AttentionSpec, Elementwise, RoundedSoftmax, SignedSoftmax, Softmax


def _more(spec: AttentionSpec) -> tuple[Program, ...]:
    return tuple(Program(name) for name in extra_kernels(spec))


KIND = Kind(
    "backward",
    "bwd.py.j2",
    choose_backward,
    fill_holes,
    programs=(Program("dq_kernel"), Program("dkdv_kernel", configs="KEYS_CONFIGS")),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise),
    places="qkhb",
    more=_more,
)
