"""Write a spec as basic ai.onnx operators, exactly as ``AttentionSpec.__call__`` computes it.

This is what every site falls back to: it needs opset 18 and no contrib operator, works for any spec that
prints, gives the log-sum-exp, and keeps what a query that sees no key gets (NaN, zeros, or a spread over all
keys).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx import pointwise
from attnc.codegen.onnx.builder import Builder
from attnc.codegen.onnx.masks import keep
from attnc.errors import CodegenError
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Fill,
    Gain,
    Normalized,
    Normalizer,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
    Step,
)
from attnc.masks import Full
from attnc.pointwise import parse_term

if TYPE_CHECKING:
    import onnx_ir as ir


def decompose(
    b: Builder,
    spec: AttentionSpec,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    captured: Sequence[ir.Value],
    *,
    lse: bool = False,
) -> tuple[ir.Value, ir.Value | None]:
    """Write attention of q ``[B, H, Sq, Dqk]``, k ``[B, Hkv, Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``.

    Returns the output ``[B, H, Sq, Dv]`` in q's dtype and, if asked, the log-sum-exp ``[B, H, Sq]`` (natural
    log).  No size need be known.
    """
    named = {o.name: c for o, c in zip(spec.captured, captured, strict=True)}
    work = torch.float64 if spec.q.dtype == torch.float64 else torch.float32
    qw, kw, vw = (b.cast(x, work) for x in (q, k, v))
    if spec.group_size != 1:
        kw, vw = (_repeated(b, x, spec.group_size) for x in (kw, vw))
    s = b.op("MatMul", qw, b.op("Transpose", kw, perm=[0, 1, 3, 2], dtype=work), dtype=work)
    for step in spec.scores:
        s = _step(b, step, s, named, work)
    if not isinstance(spec.mask, Full):
        s = _filled(b, spec.fill, s, keep(b, spec.mask, q, k, named), work)
    weights = _weights(b, spec.norm, s, named, work)
    out = b.cast(b.op("MatMul", weights, vw, dtype=work), spec.q.dtype)
    if not lse:
        return out, None
    if not isinstance(spec.norm, Softmax):
        raise CodegenError(f"ONNX export: no log-sum-exp is written for {spec.norm}")
    return out, _log_sum_exp(b, spec.norm, s, named, work)


def _repeated(b: Builder, x: ir.Value, group: int) -> ir.Value:
    """Repeat key/value heads ``[B, Hkv, Sk, D]`` to ``[B, H, Sk, D]``, each one ``group`` times in a row."""
    wide = b.op("Expand", b.op("Unsqueeze", x, b.ints(2)), b.ints(1, 1, group, 1, 1))
    shape = b.op("Concat", b.size(x, 0), b.ints(-1), b.size(x, 2), b.size(x, 3), axis=0, dtype=torch.int64)
    return b.op("Reshape", wide, shape)


def _step(b: Builder, step: Step, s: ir.Value, named: Mapping[str, ir.Value], work: torch.dtype) -> ir.Value:
    if isinstance(step, Scale):
        return b.op("Mul", s, b.const(step.factor, work), dtype=work)
    if isinstance(step, Softcap):
        cap = b.const(step.cap, work)
        return b.op("Mul", b.op("Tanh", b.op("Div", s, cap, dtype=work), dtype=work), cap, dtype=work)
    if isinstance(step, Bias):
        return b.op("Add" if step.sign > 0 else "Sub", s, b.cast(named[step.operand], work), dtype=work)
    if isinstance(step, Gain):
        return b.op("Mul", s, b.cast(named[step.operand], work), dtype=work)
    if isinstance(step, Pointwise):
        return pointwise.written(b, step.term, s, named, work)
    raise CodegenError(f"ONNX export: no operators are known for the score step {step}")


def fill_value(fill: Fill, dtype: torch.dtype) -> float:
    """Return the fill as ``Fill.apply`` uses it for scores of ``dtype``: a finite one is kept in range."""
    return max(fill.value, torch.finfo(dtype).min) if math.isfinite(fill.value) else fill.value


def _filled(b: Builder, fill: Fill, s: ir.Value, visible: ir.Value, work: torch.dtype) -> ir.Value:
    value = b.const(fill_value(fill, work), work)
    if fill.how == "replace":
        return b.op("Where", visible, s, value, dtype=work)
    return b.op("Add", s, b.op("Where", visible, b.const(0.0, work), value, dtype=work), dtype=work)


def _sink(b: Builder, norm: Softmax, named: Mapping[str, ir.Value], work: torch.dtype) -> ir.Value:
    """Return the sink logits as ``[1, H or 1, 1, 1]``."""
    if isinstance(norm.sink, str):
        return b.op("Reshape", b.cast(named[norm.sink], work), b.ints(1, -1, 1, 1), dtype=work)
    assert norm.sink is not None, "the caller asked for the sink of a norm without one"
    return b.op("Reshape", b.const(norm.sink, work), b.ints(1, 1, 1, 1), dtype=work)


def _weights(
    b: Builder, norm: Normalizer, s: ir.Value, named: Mapping[str, ir.Value], work: torch.dtype
) -> ir.Value:
    """Write the normalizer; a sink is one more column of scores, whose weight is dropped."""
    if isinstance(norm, Elementwise):
        return pointwise.written(b, parse_term(norm.expr), s, named, work)
    if isinstance(norm, Normalized):
        return _shares(b, norm, s, named, work)
    if isinstance(norm, SignedSoftmax):
        hidden = b.op("Equal", s, b.const(-math.inf, work), dtype=torch.bool)
        size = b.op("Where", hidden, b.const(-math.inf, work), b.op("Abs", s, dtype=work), dtype=work)
        w = b.op("Softmax", size, axis=-1, dtype=work)
        return b.op("Mul", b.op("Sign", s, dtype=work), w, dtype=work)
    if isinstance(norm, RoundedSoftmax):
        lse = b.op("Unsqueeze", _log_sum_exp(b, Softmax(), s, named, work), b.ints(-1), dtype=work)
        return b.op("Exp", b.op("Sub", s, lse, dtype=work), dtype=work)
    if norm.sink is None:
        w = b.op("Softmax", s, axis=-1, dtype=work)
        return (
            b.op("Where", b.op("IsNaN", w, dtype=torch.bool), b.const(0.0, work), w, dtype=work)
            if norm.safe
            else w
        )
    shape = b.op("Shape", s, start=0, end=3, dtype=torch.int64)
    column = b.op(
        "Expand",
        _sink(b, norm, named, work),
        b.op("Concat", shape, b.ints(1), axis=0, dtype=torch.int64),
        dtype=work,
    )
    w = b.op("Softmax", b.op("Concat", s, column, axis=-1, dtype=work), axis=-1, dtype=work)
    return b.op("Slice", w, b.ints(0), b.ints(-1), b.ints(3), dtype=work)


def _shares(
    b: Builder, norm: Normalized, s: ir.Value, named: Mapping[str, ir.Value], work: torch.dtype
) -> ir.Value:
    """Write weights that are divided by their row's sum."""
    f = pointwise.written(b, parse_term(norm.expr), s, named, work)
    total = b.op("ReduceSum", f, b.ints(-1), keepdims=1, dtype=work)
    if norm.added:
        total = b.op("Add", total, b.const(norm.added, work), dtype=work)
    if norm.least != -math.inf:
        total = b.op("Max", total, b.const(norm.least, work), dtype=work)
    return b.op("Div", f, total, dtype=work)


def _log_sum_exp(
    b: Builder, norm: Softmax, s: ir.Value, named: Mapping[str, ir.Value], work: torch.dtype
) -> ir.Value:
    """Write ``log(sum exp(s) [+ exp(sink)])`` over keys as ``[B, H, Sq]``; of -inf alone it is -inf."""
    top = b.op("ReduceMax", s, b.ints(-1), keepdims=1, dtype=work)
    if norm.sink is not None:
        top = b.op("Max", top, _sink(b, norm, named, work), dtype=work)
    top = b.op("Where", b.op("IsInf", top, dtype=torch.bool), b.const(0.0, work), top, dtype=work)
    total = b.op(
        "ReduceSum",
        b.op("Exp", b.op("Sub", s, top, dtype=work), dtype=work),
        b.ints(-1),
        keepdims=1,
        dtype=work,
    )
    if norm.sink is not None:
        extra = b.op("Exp", b.op("Sub", _sink(b, norm, named, work), top, dtype=work), dtype=work)
        total = b.op("Add", total, extra, dtype=work)
    lse = b.op(
        "Squeeze", b.op("Add", b.op("Log", total, dtype=work), top, dtype=work), b.ints(-1), dtype=work
    )
    return lse
