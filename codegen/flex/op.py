"""The operator ``attnc::flex_attend``: a site through compiled FlexAttention as one opaque node.

An outer ``torch.compile`` sees a node with a known shape and nothing of flex inside, so it neither breaks nor
compiles twice.  Derivatives are those of ``attnc::attend``, which runs the spec again: FlexAttention has no
backward on CPU, and no forward mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.flex import runtime
from attnc.codegen.operators import Below, Node, is_recorded, operator, record, tangent_of

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor[] captured, str spec) -> Tensor"


@operator("flex_attend", _SCHEMA)
def flex_attend(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str) -> Tensor:
    """Return the output ``[B, H, Sq, Dv]`` of the spec with this text, laid out as ``[B, Sq, H, Dv]``."""
    with torch.no_grad():
        return runtime.flex_attend(q, k, v, captured, spec)


@flex_attend.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str) -> Tensor:
    b, h, sq, _ = q.shape
    return q.new_empty((b, sq, h, v.shape[3])).transpose(1, 2)


class _Flex(Node):
    """``flex_attend`` in a graph."""

    @staticmethod
    def forward(below: Below, spec: str, *inputs: Tensor) -> Tensor:
        found: Tensor = below(*inputs[:3], list(inputs[3:]), spec)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.spec, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *captured = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        kept = (None, None)  # neither the output nor the log-sum-exp
        found = iter(torch.ops.attnc.attend_backward(dout, None, q, k, v, captured, *kept, ctx.spec, needs))
        return None, None, *(next(found) if need else None for need in needs)


@flex_attend.register_autograd
def _autograd(below: Below, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str) -> Tensor:
    inputs = (q, k, v, *captured)
    found: Tensor
    if any(tangent_of(x) is not None for x in inputs):
        found = torch.ops.attnc.attend(q, k, v, captured, spec)[0]
    elif is_recorded(*inputs):
        found = record(_Flex, below, spec, *inputs)
    else:
        found = below(q, k, v, captured, spec)
    return found


flex_attend.register_vmap_loop()
