"""The fused operators: what each is given, and the attributes it is written with.

What the operators do was measured: ``capabilities/*.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.builder import MICROSOFT, Builder
from attnc.codegen.onnx.guarded import Functions, function_name, one_of
from attnc.codegen.onnx.packing import heads_of, packed, projections, sizes_of, unpacked, without_rows
from attnc.codegen.onnx.sinks import head_sink
from attnc.codegen.onnx.sites import Call, Folded, Split
from attnc.codegen.onnx.table import Row
from attnc.masks import Band

if TYPE_CHECKING:
    import onnx_ir as ir

_BIAS = 10
"""Which input of GroupQueryAttention the bias is."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What a site became: its output ``[B, H, Sq, Dv]``, the operator, and the attributes chosen."""

    out: ir.Value
    operator: str
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a site is written from.

    ``q, k, v`` are ``[B, H or Hkv, S, D]``, ``bias`` is all that is added to the scores, ``guard`` (None: no
    such thing) says at run time that nothing is hidden but what the causal attribute hides.
    """

    call: Call
    row: Row
    folded: Folded
    split: Split
    q: ir.Value
    k: ir.Value
    v: ir.Value
    named: Mapping[str, ir.Value]
    bias: ir.Value | None = None
    guard: ir.Value | None = None

    def packed(self, b: Builder) -> list[ir.Value]:
        """Return q, k and v as ``[B, S, H * D]``."""
        each = zip((self.q, self.k, self.v), heads_of(self.call), sizes_of(self.call), strict=True)
        return [packed(b, x, n, d) for x, n, d in each]

    @property
    def shape(self) -> list[Any] | None:
        """``[B, Sq, H * Dv]`` with the sizes of q where they are known."""
        h, _, _, dv = self.call.numbers
        return None if self.q.shape is None else [self.q.shape[0], self.q.shape[2], h * dv]


def write(b: Builder, parts: Parts, functions: Functions | None, opset: int) -> Fused:
    """Write the site as the operator of its row."""
    if parts.guard is not None:
        assert functions is not None, "a guard is a function of its own"
        return _guarded(b, parts, parts.guard, functions, opset)
    return _WRITERS[parts.row.operator](b, parts)


def _multi_head(b: Builder, parts: Parts) -> Fused:
    """Write MultiHeadAttention, or what also multiplies with the projections' weights if those are stored."""
    call, operator = parts.call, parts.row.operator
    attributes: dict[str, Any] = {"num_heads": call.heads[0], "scale": parts.folded.scale}
    if parts.split.band is not None:
        attributes["unidirectional"] = 1
    ins, rows = without_rows(b, call, parts.packed(b))
    inputs = [*ins, rows, None, parts.bias]
    found = projections(ins) if parts.row.projects(call.dtype) else None
    if found is not None:
        x, weights = found
        operator = parts.row.projecting
        widths = [n * d for n, d in zip(heads_of(call), sizes_of(call), strict=True)]
        rows = rows or b.const([0.0] * sum(widths), call.dtype)  # without biases ONNX Runtime 1.31 crashes
        inputs = [x, b.op("Concat", *weights, axis=1, dtype=call.dtype), rows, None, None, parts.bias]
        if len(set(widths)) > 1:
            attributes["qkv_hidden_sizes"] = widths
    out = _op(b, operator, inputs, parts, attributes)
    return Fused(unpacked(b, out, call), operator, attributes)


def _op(
    b: Builder,
    operator: str,
    inputs: list[ir.Value | None],
    parts: Parts,
    attributes: Mapping[str, Any],
    outputs: int = 1,
) -> ir.Value:
    while inputs[-1] is None:
        inputs.pop()
    dtype, shape = parts.call.dtype, parts.shape
    return b.op(operator, *inputs, domain=MICROSOFT, outputs=outputs, dtype=dtype, shape=shape, **attributes)


def _group_query(b: Builder, parts: Parts) -> Fused:
    attributes = _group_attributes(parts, parts.split.band)
    out = _op(b, "GroupQueryAttention", _group_inputs(b, parts), parts, attributes, outputs=3)
    return Fused(unpacked(b, out, parts.call), "GroupQueryAttention", attributes)


def _group_attributes(parts: Parts, band: Band | None) -> dict[str, Any]:
    h, hkv, _, _ = parts.call.numbers
    out: dict[str, Any] = {
        "num_heads": h,
        "kv_num_heads": hkv,
        "scale": parts.folded.scale,
        "causal": int(band is not None),
    }
    if parts.folded.softcap:
        out["softcap"] = parts.folded.softcap
    if band is not None and band.left is not None:
        out["local_window_size"] = band.left + 1
    return out


def _group_inputs(b: Builder, parts: Parts) -> list[ir.Value | None]:
    """Write the twelve inputs of GroupQueryAttention, the head sinks last."""
    ins = parts.packed(b)
    length = b.cast(b.size(parts.k, 2), torch.int32)
    last = b.op("Sub", length, b.const([1], torch.int32), dtype=torch.int32)
    seqlens = b.op("Expand", last, b.size(parts.q, 0), dtype=torch.int32)
    sink = head_sink(b, parts.call, parts.named)
    return [*ins, None, None, seqlens, b.scalar(length), None, None, None, parts.bias, sink]


def _guarded(b: Builder, parts: Parts, guard: ir.Value, functions: Functions, opset: int) -> Fused:
    """Write causal attention without a bias where ``guard`` holds, else with the whole mask as a bias."""
    assert parts.split.guarded is not None, "the caller has a guard"
    fast, slow = (_group_attributes(parts, band) for band in (parts.split.guarded[0], None))
    name = function_name(parts.call, f"GroupQueryAttention {sorted(fast.items())}")
    out = one_of(
        b,
        name,
        "GroupQueryAttention",
        guard,
        _group_inputs(b, parts),
        (((_BIAS,), fast), ((), slow)),
        functions,
        opset,
        outputs=3,
        dtype=parts.call.dtype,
        shape=parts.shape,
    )
    attributes = fast | {"causal": "where the mask hides nothing", "function": name}
    return Fused(unpacked(b, out, parts.call), "GroupQueryAttention", attributes)


def _attention(b: Builder, parts: Parts) -> Fused:
    attributes: dict[str, Any] = {"scale": parts.folded.scale}
    if parts.split.band is not None:
        attributes["is_causal"] = 1
    if parts.folded.softcap:
        attributes["softcap"] = parts.folded.softcap
    tail = () if parts.bias is None else (parts.bias,)
    out = b.op("Attention", parts.q, parts.k, parts.v, *tail, dtype=parts.call.dtype, **attributes)
    return Fused(out, "Attention", attributes)


_WRITERS: Mapping[str, Callable[[Builder, Parts], Fused]] = {
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
    "Attention": _attention,
}
