"""Write one attention site as MultiHeadAttention, GroupQueryAttention or ai.onnx Attention.

A mask that is no attribute becomes an additive bias with the spec's own fill value, always expanded over
queries (the CPU kernels reject a query axis of 1).  A filter value of the operator's own (-10000 in
MultiHeadAttention) is never used: it would turn a query that sees no key into an unmasked softmax.  What the
operators do was measured: ``capabilities/*.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.builder import MICROSOFT, Builder
from attnc.codegen.onnx.guarded import Functions, Shared, function_name, hides_nothing, one_of, unless
from attnc.codegen.onnx.masks import keep
from attnc.codegen.onnx.packing import heads_of, packed, sizes_of, unpacked, without_rows
from attnc.codegen.onnx.sinks import head_sink, sink_column
from attnc.codegen.onnx.sites import ABSORBS, Call, Folded, Split
from attnc.ir import Bias
from attnc.masks import Band, Full, Mask

if TYPE_CHECKING:
    import onnx_ir as ir

Written = tuple["ir.Value", dict[str, Any]]


def fuse(
    b: Builder,
    call: Call,
    operator: str,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    captured: Sequence[ir.Value],
    shared: Shared,
    functions: Functions | None,
    opset: int,
) -> Written:
    """Write ``call`` as ``operator``; return the output ``[B, H, Sq, Dv]`` and the attributes chosen.

    The caller has checked the operator's conditions (``table.choose``).
    """
    named = {o.name: c for o, c in zip(call.spec.captured, captured, strict=True)}
    folded = call.folded()
    split = call.split(windows=operator == "GroupQueryAttention", unequal=operator == "Attention")
    assert isinstance(folded, Folded), folded
    sink = head_sink(b, call, named) if operator == "Attention" else None
    if sink is not None:
        split = Split(None, call.spec.mask)  # a causal attribute would hide the sink's column
    for gain in folded.gains:
        q = b.op("Mul", q, b.cast(named[gain], call.dtype), dtype=call.dtype)
    guard = None
    if operator == "GroupQueryAttention" and split.guarded is not None and functions is not None:
        guard = hides_nothing(b, split.guarded[1], q, k, named, shared)
    bias = _bias(b, call, folded, split.rest, q, k, named, shared, guard)
    if sink is not None:
        k, v, bias = sink_column(b, call, sink, q, k, v, bias)
    if guard is None:
        out, attributes = _WRITERS[operator](b, call, folded, split, (q, k, v), bias, named)
    else:
        qkv = (q, k, v)
        out, attributes = _guarded(b, call, folded, split, qkv, bias, named, guard, functions, opset)
    if operator != "Attention" and _needs_zeros(call, folded):
        seen = _seen(b, call, split, bias, keep(b, call.spec.mask, q, k, named) if split.band else None)
        out = b.op("Where", seen, out, b.const(0.0, call.dtype), dtype=call.dtype)
    return out, attributes


def _multi_head(
    b: Builder,
    call: Call,
    folded: Folded,
    split: Split,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    named: Mapping[str, ir.Value],
) -> Written:
    attributes: dict[str, Any] = {"num_heads": call.heads[0], "scale": folded.scale}
    if split.band is not None:
        attributes["unidirectional"] = 1
    ins = [packed(b, x, n, d) for x, n, d in zip(qkv, heads_of(call), sizes_of(call), strict=True)]
    ins, rows = without_rows(b, call, ins)
    tail = [rows, None, bias]
    while tail and tail[-1] is None:
        tail.pop()
    shape = _packed_shape(call, qkv[0])
    out = b.op(
        "MultiHeadAttention", *ins, *tail, domain=MICROSOFT, dtype=call.dtype, shape=shape, **attributes
    )
    return unpacked(b, out, call), attributes


def _group_query(
    b: Builder,
    call: Call,
    folded: Folded,
    split: Split,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    named: Mapping[str, ir.Value],
) -> Written:
    attributes = _group_attributes(call, folded, split.band)
    ins = _group_inputs(b, call, qkv, bias, named)
    while ins[-1] is None:
        ins.pop()
    out = b.op(
        "GroupQueryAttention",
        *ins,
        domain=MICROSOFT,
        outputs=3,
        dtype=call.dtype,
        shape=_packed_shape(call, qkv[0]),
        **attributes,
    )
    return unpacked(b, out, call), attributes


_BIAS = 10
"""Which input of GroupQueryAttention the bias is."""


def _group_attributes(call: Call, folded: Folded, band: Band | None) -> dict[str, Any]:
    h, hkv, _, _ = call.numbers
    out: dict[str, Any] = {
        "num_heads": h,
        "kv_num_heads": hkv,
        "scale": folded.scale,
        "causal": int(band is not None),
    }
    if folded.softcap:
        out["softcap"] = folded.softcap
    if band is not None and band.left is not None:
        out["local_window_size"] = band.left + 1
    return out


def _group_inputs(
    b: Builder,
    call: Call,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    named: Mapping[str, ir.Value],
) -> list[ir.Value | None]:
    """Write the twelve inputs of GroupQueryAttention, the head sinks last."""
    q, k, v = (packed(b, x, n, d) for x, n, d in zip(qkv, heads_of(call), sizes_of(call), strict=True))
    length = b.cast(b.size(qkv[1], 2), torch.int32)
    last = b.op("Sub", length, b.const([1], torch.int32), dtype=torch.int32)
    seqlens = b.op("Expand", last, b.size(qkv[0], 0), dtype=torch.int32)
    return [
        q,
        k,
        v,
        None,
        None,
        seqlens,
        b.scalar(length),
        None,
        None,
        None,
        bias,
        head_sink(b, call, named),
    ]


def _guarded(
    b: Builder,
    call: Call,
    folded: Folded,
    split: Split,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    named: Mapping[str, ir.Value],
    guard: ir.Value,
    functions: Functions | None,
    opset: int,
) -> Written:
    """Write causal attention without a bias where ``guard`` holds, else with the whole mask as a bias."""
    assert split.guarded is not None, "the caller has a guard"
    assert functions is not None, "the caller takes functions"
    fast, slow = (_group_attributes(call, folded, band) for band in (split.guarded[0], None))
    name = function_name(call, f"GroupQueryAttention {sorted(fast.items())}")
    out = one_of(
        b,
        name,
        "GroupQueryAttention",
        guard,
        _group_inputs(b, call, qkv, bias, named),
        (((_BIAS,), fast), ((), slow)),
        functions,
        opset,
        outputs=3,
        dtype=call.dtype,
        shape=_packed_shape(call, qkv[0]),
    )
    return unpacked(b, out, call), fast | {"causal": "where the mask hides nothing", "function": name}


def _attention(
    b: Builder,
    call: Call,
    folded: Folded,
    split: Split,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    named: Mapping[str, ir.Value],
) -> Written:
    attributes: dict[str, Any] = {"scale": folded.scale}
    if split.band is not None:
        attributes["is_causal"] = 1
    if folded.softcap:
        attributes["softcap"] = folded.softcap
    tail = () if bias is None else (bias,)
    return b.op("Attention", *qkv, *tail, dtype=call.dtype, **attributes), attributes


_Writer = Callable[
    [
        Builder,
        Call,
        Folded,
        Split,
        "tuple[ir.Value, ir.Value, ir.Value]",
        "ir.Value | None",
        "Mapping[str, ir.Value]",
    ],
    Written,
]
_WRITERS: Mapping[str, _Writer] = {
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
    "Attention": _attention,
}


def _packed_shape(call: Call, q: ir.Value) -> list[Any] | None:
    """Return ``[B, Sq, H * Dv]`` with the sizes of q where they are known."""
    h, _, _, dv = call.numbers
    return None if q.shape is None else [q.shape[0], q.shape[2], h * dv]


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
