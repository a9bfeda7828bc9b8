"""Contractions, normalizers, reductions, convolutions, and attention that is one operator already."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.reading.attributes import axes_of, ints, number
from attnc.codegen.onnx.reading.reader import Reader, UnreadError, same

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
Rule = Callable[["Reader", "ir.Node"], "fx.Node | list[fx.Node]"]


def _rank(x: fx.Node) -> int:
    return int(x.meta["val"].dim())


def _matmul(r: Reader, n: ir.Node) -> fx.Node:
    x, y = r.x(n, 0), r.x(n, 1)
    r.align(x, y, skip=2) if _rank(x) > 2 and _rank(y) > 2 else None
    a, b = x.meta["val"].shape[-1], y.meta["val"].shape[-2 if _rank(y) > 1 else -1]
    if not same(a, b):
        r.symbols.require_equal(a, b)
    return r.call(aten.matmul.default, x, y)


def _gemm(r: Reader, n: ir.Node) -> fx.Node:
    x, y, c = r.x(n, 0), r.x(n, 1), r.maybe(n, 2)
    x = r.call(aten.t.default, x) if number(n, "transA", 0) else x
    y = r.call(aten.t.default, y) if number(n, "transB", 0) else y
    alpha, beta = number(n, "alpha", 1.0), number(n, "beta", 1.0)
    if c is not None:
        return r.call(aten.addmm.default, c, x, y, beta=beta, alpha=alpha)
    out = r.call(aten.mm.default, x, y)
    return out if alpha == 1.0 else r.call(aten.mul.Tensor, out, alpha)


def _einsum(r: Reader, n: ir.Node) -> fx.Node:
    xs = [r.x(n, i) for i in range(len(n.inputs))]
    equation = str(number(n, "equation", "")).replace(" ", "")
    sizes: dict[str, Any] = {}
    for letters, x in zip(equation.partition("->")[0].split(","), xs, strict=True):
        for c, size in zip(letters, x.meta["val"].shape, strict=False):
            if "." not in letters and not same(sizes.setdefault(c, size), size):
                r.symbols.require_equal(sizes[c], size)
    return r.call(aten.einsum.default, equation, xs)


def _softmax(target: Any) -> Rule:
    """Read a softmax; before opset 13 it ran over all axes from ``axis`` on, as one."""

    def rule(r: Reader, n: ir.Node) -> fx.Node:
        x = r.x(n, 0)
        axis = number(n, "axis", -1 if r.opset >= 13 else 1) % _rank(x)
        if r.opset >= 13 or axis == _rank(x) - 1:
            return r.call(target, x, axis)
        sizes = list(x.meta["val"].shape)
        if not all(isinstance(m, int) for m in sizes[axis:]):
            raise UnreadError("it normalizes over several axes of symbolic size")
        head = [m if isinstance(m, int) else r.call(aten.sym_size.int, x, i) for i, m in enumerate(sizes)]
        flat = r.call(aten.reshape.default, x, [*head[:axis], math.prod(sizes[axis:])])
        return r.call(aten.reshape.default, r.call(target, flat, axis), head)

    return rule


def _reduce(make: Callable[[Reader, fx.Node, list[int], bool], fx.Node], since: int = 18) -> Rule:
    """Read a reduction; its axes are an input from opset ``since`` on."""

    def rule(r: Reader, n: ir.Node) -> fx.Node:
        x, axes = r.x(n, 0), axes_of(r, n, since)
        if not axes:
            if number(n, "noop_with_empty_axes", 0):
                return x
            axes = list(range(_rank(x)))
        return make(r, x, [a % _rank(x) for a in axes], bool(number(n, "keepdims", 1)))

    return rule


def _along(target: Any) -> Callable[[Reader, fx.Node, list[int], bool], fx.Node]:
    def make(r: Reader, x: fx.Node, axes: list[int], keep: bool) -> fx.Node:
        return r.call(target, x, axes, keep)

    return make


def _product(r: Reader, x: fx.Node, axes: list[int], keep: bool) -> fx.Node:
    if len(axes) != 1:
        raise UnreadError("a product over several axes")
    return r.call(aten.prod.dim_int, x, axes[0], keep)


def _norm2(r: Reader, x: fx.Node, axes: list[int], keep: bool) -> fx.Node:
    return r.call(aten.linalg_vector_norm.default, x, 2, axes, keep)


def _sum_of_squares(r: Reader, x: fx.Node, axes: list[int], keep: bool) -> fx.Node:
    return r.call(aten.sum.dim_IntList, r.call(aten.mul.Tensor, x, x), axes, keep)


def _layer_norm(r: Reader, n: ir.Node) -> fx.Node:
    x, axis = r.x(n, 0), number(n, "axis", -1)
    if len([o for o in n.outputs if o.uses() or o.is_graph_output()]) > 1:
        raise UnreadError("its mean or deviation is used")
    shape = list(x.meta["val"].shape)[axis % _rank(x) :]
    if not all(isinstance(m, int) for m in shape):
        raise UnreadError("it normalizes over an axis of symbolic size")
    eps = number(n, "epsilon", 1e-5)
    return r.call(aten.layer_norm.default, x, shape, r.maybe(n, 1), r.maybe(n, 2), eps)


def _rms_norm(r: Reader, n: ir.Node) -> fx.Node:
    x, axis = r.x(n, 0), number(n, "axis", -1)
    shape = list(x.meta["val"].shape)[axis % _rank(x) :]
    return r.call(aten.rms_norm.default, x, shape, r.maybe(n, 1), number(n, "epsilon", 1e-5))


def _convolution(r: Reader, n: ir.Node) -> fx.Node:
    x, weight, bias = r.x(n, 0), r.x(n, 1), r.maybe(n, 2)
    rank = _rank(x) - 2
    pads = ints(n, "pads") or [0] * (2 * rank)
    if number(n, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnreadError("its padding is automatic")
    if pads[:rank] != pads[rank:]:
        ours = [p for d in reversed(range(rank)) for p in (pads[d], pads[rank + d])]
        x, pads = r.pad(x, ours, 0), [0] * (2 * rank)
    strides, dilations = ints(n, "strides") or [1] * rank, ints(n, "dilations") or [1] * rank
    group, transposed = number(n, "group", 1), n.op_type == "ConvTranspose"
    extra = ints(n, "output_padding") or [0] * rank
    if transposed and ints(n, "output_shape"):
        raise UnreadError("its output shape is given")
    return r.call(
        aten.convolution.default,
        x,
        weight,
        bias,
        strides,
        pads[:rank],
        dilations,
        transposed,
        extra,
        group,
    )


def _like_input(r: Reader, n: ir.Node) -> fx.Node:
    """Read an operator that keeps the shape and the type of its first input, and whose values stay opaque."""
    x = r.x(n, 0)
    given = [y for i in range(len(n.inputs)) if (y := r.maybe(n, i)) is not None]
    return r.opaque(given, r.fake(list(x.meta["val"].shape), x.meta["val"].dtype))


def _dropout(r: Reader, n: ir.Node) -> fx.Node:
    """Read dropout in inference, which does nothing."""
    training = r.items(n, 2) if len(n.inputs) > 2 and n.inputs[2] is not None else None
    if len(n.inputs) > 2 and n.inputs[2] is not None and (training is None or bool(training.flat[0])):
        raise UnreadError("it trains")
    if any(o.uses() or o.is_graph_output() for o in n.outputs[1:]):
        raise UnreadError("its mask is used")
    return r.x(n, 0)


def _attention(r: Reader, n: ir.Node) -> fx.Node:
    """Read ai.onnx Attention on ``[B, H, S, D]`` without cache as the call that it is."""
    q, k, v = (r.x(n, i) for i in range(3))
    mask, scale = r.maybe(n, 3), number(n, "scale", None)
    used = [o for o in n.outputs[1:] if o.uses() or o.is_graph_output()]
    beyond = any(r.maybe(n, i) is not None for i in range(4, len(n.inputs)))
    if _rank(q) != 4 or used or beyond or number(n, "softcap", 0.0):
        raise UnreadError("attention with a cache, a softcap or packed heads is not read")
    causal = bool(number(n, "is_causal", 0))
    if causal and mask is not None:
        raise UnreadError("attention with a mask and a causal attribute is not read")
    grouped = not same(q.meta["val"].shape[1], k.meta["val"].shape[1])
    return r.call(
        aten.scaled_dot_product_attention.default,
        q,
        k,
        v,
        mask,
        0.0,
        causal,
        scale=scale,
        enable_gqa=grouped,
    )


def _fused_matmul(r: Reader, n: ir.Node) -> fx.Node:
    """Read com.microsoft FusedMatMul: a product of transposed operands times a number."""
    if number(n, "transBatchA", 0) or number(n, "transBatchB", 0):
        raise UnreadError("it moves batch axes")
    x, y = r.x(n, 0), r.x(n, 1)
    x = r.call(aten.transpose.int, x, -2, -1) if number(n, "transA", 0) else x
    y = r.call(aten.transpose.int, y, -2, -1) if number(n, "transB", 0) else y
    r.align(x, y, skip=2)
    out, alpha = r.call(aten.matmul.default, x, y), number(n, "alpha", 1.0)
    return out if alpha == 1.0 else r.call(aten.mul.Tensor, out, alpha)


def _first_like_input(r: Reader, n: ir.Node) -> fx.Node:
    if any(o.uses() or o.is_graph_output() for o in n.outputs[1:]):
        raise UnreadError("more than its first output is used")
    return _like_input(r, n)


OF_RUNTIME: dict[str, Rule] = {
    "FusedMatMul": _fused_matmul,
    **dict.fromkeys(
        (
            "SkipLayerNormalization",
            "SkipSimplifiedLayerNormalization",
            "SimplifiedLayerNormalization",
            "BiasGelu",
            "FastGelu",
            "Gelu",
            "QuickGelu",
            "RotaryEmbedding",
        ),
        _first_like_input,
    ),
}
"""Operators of ONNX Runtime's own domain, which its optimizer writes into files."""

RULES: dict[str, Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Softmax": _softmax(aten.softmax.int),
    "LogSoftmax": _softmax(aten.log_softmax.int),
    "ReduceSum": _reduce(_along(aten.sum.dim_IntList), since=13),
    "ReduceMean": _reduce(_along(aten.mean.dim)),
    "ReduceMax": _reduce(_along(aten.amax.default)),
    "ReduceMin": _reduce(_along(aten.amin.default)),
    "ReduceLogSumExp": _reduce(_along(aten.logsumexp.default)),
    "ReduceProd": _reduce(_product),
    "ReduceL2": _reduce(_norm2),
    "ReduceSumSquare": _reduce(_sum_of_squares),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "BatchNormalization": _like_input,
    "InstanceNormalization": _like_input,
    "GroupNormalization": _like_input,
    "LpNormalization": _like_input,
    "SimplifiedLayerNormalization": _first_like_input,
    "Dropout": _dropout,
    "Attention": _attention,
}
