"""Write one attention site as MultiHeadAttention, GroupQueryAttention or ai.onnx Attention.

A mask that is no attribute becomes an additive bias with the spec's own fill value, always expanded over
queries (the CPU kernels reject a query axis of 1).  A filter value of the operator's own (-10000 in
MultiHeadAttention) is never used: it would turn a query that sees no key into an unmasked softmax.  What the
operators do was measured: ``capabilities/*.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx.builder import Builder
from attnc.codegen.onnx.guarded import Functions, Shared, hides_nothing, unless
from attnc.codegen.onnx.masks import keep
from attnc.codegen.onnx.operators import Fused, Parts, write
from attnc.codegen.onnx.sinks import head_sink, sink_column
from attnc.codegen.onnx.sites import ABSORBS, Call, Folded, Split
from attnc.codegen.onnx.table import Row
from attnc.ir import Bias
from attnc.masks import Full, Mask

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse(
    b: Builder,
    call: Call,
    row: Row,
    inputs: Sequence[ir.Value],
    shared: Shared,
    functions: Functions | None,
    opset: int,
) -> Fused:
    """Write ``call`` as the operator of ``row``, on q, k, v and the captured operands.

    The caller has checked the operator's conditions (``table.candidates``).
    """
    q, k, v, *captured = inputs
    named = {o.name: c for o, c in zip(call.spec.captured, captured, strict=True)}
    folded = call.folded()
    split = call.split(windows=row.operator == "GroupQueryAttention", unequal=row.operator == "Attention")
    assert isinstance(folded, Folded), folded
    sink = head_sink(b, call, named) if row.operator == "Attention" else None
    if sink is not None:
        split = Split(None, call.spec.mask)  # a causal attribute would hide the sink's column
    for gain in folded.gains:
        q = b.op("Mul", q, b.cast(named[gain], call.dtype), dtype=call.dtype)
    guard = None
    if row.operator == "GroupQueryAttention" and split.guarded is not None and functions is not None:
        guard = hides_nothing(b, split.guarded[1], q, k, named, shared)
    bias = _bias(b, call, folded, split.rest, q, k, named, shared, guard)
    if sink is not None:
        k, v, bias = sink_column(b, call, sink, q, k, v, bias)
    parts = Parts(call, row, folded, split, q, k, v, named, bias, guard)
    done = write(b, parts, functions, opset)
    if row.operator != "Attention" and _needs_zeros(call, folded):
        seen = _seen(b, call, split, bias, keep(b, call.spec.mask, q, k, named) if split.band else None)
        out = b.op("Where", seen, done.out, b.const(0.0, call.dtype), dtype=call.dtype)
        done = replace(done, out=out)
    return done


def bias_fill(call: Call) -> float:
    """Return what is added at hidden positions so that the row is what the spec's fill makes it.

    Replacing by a finite value equals adding one that swallows every score: hidden keys weigh exactly 0
    beside a visible one, and a query that sees none spreads evenly.  Beside a bias, which may hide as well,
    the value is not raised: what both hide must weigh less than what one of them does.
    """
    fill = call.spec.fill
    if not math.isfinite(fill.value):
        return fill.value
    replaces, biased = fill.how == "replace", any(isinstance(s, Bias) for s in call.spec.scores)
    if biased:
        value = min(fill.value, ABSORBS) if replaces else fill.value
    else:
        value = ABSORBS if replaces else max(fill.value, ABSORBS)
    return max(value, torch.finfo(call.dtype).min)


def _bias(
    b: Builder,
    call: Call,
    folded: Folded,
    mask: Mask,
    q: ir.Value,
    k: ir.Value,
    named: Mapping[str, ir.Value],
    shared: Shared,
    guard: ir.Value | None,
) -> ir.Value | None:
    """Write all that is added to the scores as one tensor ``[1 or B, 1 or H, Sq, Sk]``, or return None.

    Where ``guard`` holds it is not needed.
    """
    if isinstance(mask, Full) and not folded.biases:
        return None
    ids = tuple(id(named[o]) for o in mask.operands)
    terms = tuple((id(named[n]), f) for n, f in folded.biases)
    key = (str(mask), ids, str(call.spec.fill), terms, call.dtype, call.lengths, guard is None)
    if key not in shared:

        def write(inner: Builder) -> ir.Value:
            return _whole_bias(inner, call, folded, mask, q, k, named)

        shared[key] = write(b) if guard is None else unless(b, guard, write, call.dtype)
    found: ir.Value = shared[key]
    return found


def _whole_bias(
    b: Builder,
    call: Call,
    folded: Folded,
    mask: Mask,
    q: ir.Value,
    k: ir.Value,
    named: Mapping[str, ir.Value],
) -> ir.Value:
    total = _added(b, call, folded, named)
    if not isinstance(mask, Full):
        visible, hidden = keep(b, mask, q, k, named), b.const(bias_fill(call), call.dtype)
        if total is None or call.spec.fill.how == "replace":
            total = b.const(0.0, call.dtype) if total is None else total
            total = b.op("Where", visible, total, hidden, dtype=call.dtype)
        else:
            fill = b.op("Where", visible, b.const(0.0, call.dtype), hidden, dtype=call.dtype)
            total = b.op("Add", total, fill, dtype=call.dtype)
    assert total is not None, "a mask or a bias was written"
    shape = b.op("Concat", b.ints(1, 1), b.size(q, 2), b.size(k, 2), axis=0, dtype=torch.int64)
    return b.op("Expand", total, shape, dtype=call.dtype)


def _added(b: Builder, call: Call, folded: Folded, named: Mapping[str, ir.Value]) -> ir.Value | None:
    """Write the sum of the biases with their factors."""
    total: ir.Value | None = None
    for name, factor in folded.biases:
        term = b.cast(named[name], call.dtype)
        if factor != 1.0:
            term = b.op("Mul", term, b.const(factor, call.dtype), dtype=call.dtype)
        total = term if total is None else b.op("Add", total, term, dtype=call.dtype)
    return total


def _needs_zeros(call: Call, folded: Folded) -> bool:
    """Say whether rows of NaN, which the operator gives for a query that sees no key, must become zeros."""
    norm = call.spec.norm
    hidden = call.spec.fill.value == -math.inf and call.may_see_nothing()
    return norm.safe and norm.sink is None and (hidden or bool(folded.biases))


def _seen(b: Builder, call: Call, split: Split, bias: ir.Value | None, visible: ir.Value | None) -> ir.Value:
    """Write ``[.., Sq, 1]``, True where a query sees a key: by the bias, or by the mask if given."""
    if visible is not None:
        most = b.op("ReduceMax", b.cast(visible, torch.int32), b.ints(-1), keepdims=1, dtype=torch.int32)
        return b.cast(most, torch.bool)
    assert split.band is None, "an attribute hides keys that the bias does not"
    assert bias is not None, "a query that may see nothing has a mask or a bias"
    most = b.op("ReduceMax", bias, b.ints(-1), keepdims=1, dtype=call.dtype)
    return b.op("Greater", most, b.const(-math.inf, call.dtype), dtype=torch.bool)
