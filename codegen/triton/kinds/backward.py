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
from attnc.codegen.triton.holes import argument_types
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.kinds.kind import Kind, Program, Types
from attnc.codegen.triton.layout import BACKWARD, Layout
from attnc.ir import AttentionSpec, Elementwise, Normalized, RoundedSoftmax, SignedSoftmax, Softmax


def _more(spec: AttentionSpec) -> tuple[Program, ...]:
    return tuple(Program(name) for name in extra_kernels(spec))


def types_of(spec: AttentionSpec, layout: Layout = BACKWARD) -> Types:
    """Return the types of arguments, and the strides that are 1, for a layout with ``out`` and ``dout``."""
    types, ones = argument_types(spec, layout)
    main = types["q_ptr"]
    types |= dict.fromkeys(("dout_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), main)
    types |= dict.fromkeys(("top_ptr", "share_ptr", "delta_ptr", "dlse_ptr"), "*fp32")
    for x in name_inputs(spec):  # gradients of pairs are written as they are, others are summed in fp32
        types[f"d_{x.name}_ptr"] = types[f"{x.name}_ptr"] if {*"qk"} <= {*x.axes} else "*fp32"
    return types, ones


KIND = Kind(
    "backward",
    "bwd.py.j2",
    choose_backward,
    fill_holes,
    programs=(Program("dq_kernel"), Program("dkdv_kernel", configs="KEYS_CONFIGS")),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    dropout=True,
    more=_more,
    types=types_of,
)
