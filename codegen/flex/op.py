"""The operator ``attnc::flex_attend``: a site through compiled FlexAttention as one opaque node.

An outer ``torch.compile`` sees a node with a known shape and nothing of flex inside, so it neither breaks nor
compiles twice.  The gradient is that of ``attnc::attend``, which runs the spec again: FlexAttention has no
backward on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.flex import runtime

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor[] captured, str spec) -> Tensor"


@torch.library.custom_op("attnc::flex_attend", mutates_args=(), schema=_SCHEMA)
def flex_attend(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str) -> Tensor:
    """Return the output ``[B, H, Sq, Dv]`` of the spec with this text, laid out as ``[B, Sq, H, Dv]``."""
    with torch.no_grad():
        return runtime.flex_attend(q, k, v, captured, spec)


@flex_attend.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str) -> Tensor:
    b, h, sq, _ = q.shape
    return q.new_empty((b, sq, h, v.shape[3])).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, captured, spec = inputs
    ctx.save_for_backward(q, k, v, *captured)
    ctx.spec = spec


def _autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    q, k, v, *captured = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    flags = wanted if isinstance(wanted, (list, tuple)) else [wanted] * len(captured)
    needs = [*ctx.needs_input_grad[:3], *flags]
    found = iter(torch.ops.attnc.attend_backward(dout, None, q, k, v, captured, None, None, ctx.spec, needs))
    dq, dk, dv, *rest = (next(found) if need else None for need in needs)
    return dq, dk, dv, rest, None


flex_attend.register_autograd(_autograd, setup_context=_setup_context)


@flex_attend.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """Call once per element: the operator batches its own axis already."""
    q, k, v, captured, spec = args
    many = in_dims[3] if isinstance(in_dims[3], (list, tuple)) else [in_dims[3]] * len(captured)
    dims = [*in_dims[:3], *many]
    found = []
    for i in range(info.batch_size):
        one = [x if d is None else x.select(d, i) for x, d in zip((q, k, v, *captured), dims, strict=True)]
        found.append(torch.ops.attnc.flex_attend(*one[:3], one[3:], spec))
    return torch.stack(found), 0
