"""Elementwise operators, and what creates tensors from nothing but numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.reading.attributes import number
from attnc.codegen.onnx.reading.reader import Reader, UnreadError
from attnc.codegen.onnx.reading.tensors import to_torch, torch_type

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
Rule = Callable[["Reader", "ir.Node"], "fx.Node | list[fx.Node]"]


def _rank(x: fx.Node) -> int:
    return int(x.meta["val"].dim())


def _is_float(x: fx.Node) -> bool:
    return bool(x.meta["val"].dtype.is_floating_point)


def _number_beside(r: Reader, n: ir.Node, i: int, x: fx.Node) -> int | float | fx.Node | None:
    """Return input ``i`` as a number if it does not change the shape of ``x``, with which it is combined."""
    e = r.entry(n, i)
    if e is None:
        return None
    rank = e.items.ndim if e.items is not None else e.tensor.dim() if e.tensor is not None else None
    return None if rank is None or rank > _rank(x) else r.scalar(n, i)


def _pair(r: Reader, n: ir.Node, a: int = 0, b: int = 1) -> tuple[fx.Node, fx.Node]:
    x, y = r.x(n, a), r.x(n, b)
    r.align(x, y)
    return x, y


def _binary(target: Any, swapped: Any = None) -> Rule:
    """Read a call of two arguments; ``swapped`` takes a number on the left as ``swapped(x, number)``."""

    def rule(r: Reader, n: ir.Node) -> fx.Node:
        if not _is_number(r, n, 0) or _is_number(r, n, 1):
            x = r.x(n, 0)
            other = _number_beside(r, n, 1, x)
            if other is not None:
                return r.call(target, x, other)
        elif swapped is not None:
            x = r.x(n, 1)
            other = _number_beside(r, n, 0, x)
            if other is not None:
                return r.call(swapped, x, other)
        return r.call(target, *_pair(r, n))

    return rule


def _is_number(r: Reader, n: ir.Node, i: int) -> bool:
    e = r.entry(n, i)
    if e is None:
        return False
    count = e.items.size if e.items is not None else e.tensor.numel() if e.tensor is not None else 0
    return count == 1


def _div(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    other: Any = _number_beside(r, n, 1, x)
    if other is None:
        x, other = _pair(r, n)
    if _is_float(x):
        return r.call(aten.div.Tensor, x, other)
    return r.call(aten.div.Tensor_mode, x, other, rounding_mode="trunc")


def _mod(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    other = _number_beside(r, n, 1, x)
    fmod = number(n, "fmod", 0)
    if isinstance(other, int | float):
        return r.call(aten.fmod.Scalar if fmod else aten.remainder.Scalar, x, other)
    return r.call(aten.fmod.Tensor if fmod else aten.remainder.Tensor, *_pair(r, n))


def _pow(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    power = _number_beside(r, n, 1, x)
    if isinstance(power, int | float):
        whole = float(power).is_integer()
        return r.call(aten.pow.Tensor_Scalar, x, int(power) if whole else power)
    return r.call(aten.pow.Tensor_Tensor, *_pair(r, n))


def _comparison(name: str, mirrored: str) -> Rule:
    """Read a comparison; with a number on the left it is the mirrored one."""
    packet, other = getattr(aten, name), getattr(aten, mirrored)

    def rule(r: Reader, n: ir.Node) -> fx.Node:
        if r.x(n, 0).meta["val"].dtype == torch.bool:
            return r.call(packet.Tensor, *_pair(r, n))
        if not _is_number(r, n, 0) or _is_number(r, n, 1):
            x = r.x(n, 0)
            limit = _number_beside(r, n, 1, x)
            if limit is not None:
                return r.call(packet.Scalar, x, limit)
        else:
            x = r.x(n, 1)
            limit = _number_beside(r, n, 0, x)
            if limit is not None:
                return r.call(other.Scalar, x, limit)
        return r.call(packet.Tensor, *_pair(r, n))

    return rule


def _two(target: Any) -> Rule:
    def rule(r: Reader, n: ir.Node) -> fx.Node:
        return r.call(target, *_pair(r, n))

    return rule


def _one(target: Any, *args: Any) -> Rule:
    def rule(r: Reader, n: ir.Node) -> fx.Node:
        return r.call(target, r.x(n, 0), *args)

    return rule


def _same(r: Reader, n: ir.Node) -> fx.Node:
    return r.x(n, 0)


def _many(target: Any) -> Rule:
    def rule(r: Reader, n: ir.Node) -> fx.Node:
        out = r.x(n, 0)
        for i in range(1, len(n.inputs)):
            x = r.x(n, i)
            r.align(out, x)
            out = r.call(target, out, x)
        return out

    return rule


def _clip(r: Reader, n: ir.Node) -> fx.Node:
    ends = (
        [r.scalar(n, 1), r.scalar(n, 2)]
        if r.opset >= 11
        else [number(n, "min", None), number(n, "max", None)]
    )
    given = [i for i in (1, 2) if r.opset >= 11 and r.entry(n, i) is not None]
    if any(ends[i - 1] is None for i in given):
        raise UnreadError("its bounds are no numbers")
    return r.call(aten.clamp.default, r.x(n, 0), *ends)


def _cast(r: Reader, n: ir.Node) -> fx.Node:
    import onnx_ir as ir

    if n.op_type == "CastLike":
        dtype = r.x(n, 1).meta["val"].dtype
    else:
        dtype = torch_type(ir.DataType(number(n, "to", 1)))
    if dtype is None:
        raise UnreadError("torch has no such type")
    x = r.x(n, 0)
    return x if x.meta["val"].dtype == dtype else r.call(aten.to.dtype, x, dtype)


def _where(r: Reader, n: ir.Node) -> fx.Node:
    made_zero = _nan_to_zero(r, n)
    if made_zero is not None:
        return made_zero
    c = r.x(n, 0)
    for i, j, packet in ((1, 2, aten.where.ScalarSelf), (2, 1, aten.where.ScalarOther)):
        if _is_number(r, n, i) and not _is_number(r, n, j):
            x = r.x(n, j)
            fill = _number_beside(r, n, i, x)
            r.align(c, x)
            if isinstance(fill, int | float):
                return r.call(packet, c, *((fill, x) if i == 1 else (x, fill)))
    x, y = r.x(n, 1), r.x(n, 2)
    r.align(c, x, y)
    return r.call(aten.where.self, c, x, y)


def _nan_to_zero(r: Reader, n: ir.Node) -> fx.Node | None:
    """Read ``Where(IsNaN(x), 0, x)`` as what it is, None if it is another choice."""
    condition, other = n.inputs[0], n.inputs[2]
    test = condition.producer() if condition is not None else None
    if test is None or test.op_type != "IsNaN" or test.inputs[0] is not other or r.scalar(n, 1) != 0:
        return None
    x = r.x(n, 2)
    if _number_beside(r, n, 1, x) is None:
        return None
    return r.call(aten.nan_to_num.default, x, 0.0, float("inf"), float("-inf"))


def _range(r: Reader, n: ir.Node) -> fx.Node:
    start, end, step = (r.scalar(n, i) for i in range(3))
    first = r.entry(n, 0)
    if start is None or end is None or step is None or first is None:
        raise UnreadError("its bounds are no numbers or sizes")
    return r.call(aten.arange.start_step, start, end, step, dtype=first.dtype)


def _constant_of_shape(r: Reader, n: ir.Node) -> fx.Node:
    given = n.attributes.get("value")
    fill = torch.zeros(1) if given is None else to_torch(given.as_tensor())
    return r.call(aten.full.default, r.arguments(n, 0), fill.flatten()[0].item(), dtype=fill.dtype)


def _eye_like(r: Reader, n: ir.Node) -> fx.Node:
    import onnx_ir as ir

    x = r.x(n, 0).meta["val"]
    given = number(n, "dtype", None)
    dtype = x.dtype if given is None else torch_type(ir.DataType(given))
    if number(n, "k", 0) != 0 or not all(isinstance(m, int) for m in x.shape):
        raise UnreadError("a shifted or symbolic unit matrix is not read")
    return r.call(aten.eye.m, *x.shape, dtype=dtype)


def _is_inf(r: Reader, n: ir.Node) -> fx.Node:
    if not number(n, "detect_negative", 1) or not number(n, "detect_positive", 1):
        raise UnreadError("infinities of one sign are not read")
    return r.call(aten.isinf.default, r.x(n, 0))


def _gelu(r: Reader, n: ir.Node) -> fx.Node:
    return r.call(aten.gelu.default, r.x(n, 0), approximate=number(n, "approximate", "none"))


RULES: dict[str, Rule] = {
    "Identity": _same,
    "Add": _binary(aten.add.Tensor, aten.add.Tensor),
    "Sub": _binary(aten.sub.Tensor, aten.rsub.Scalar),
    "Mul": _binary(aten.mul.Tensor, aten.mul.Tensor),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Equal": _comparison("eq", "eq"),
    "Less": _comparison("lt", "gt"),
    "LessOrEqual": _comparison("le", "ge"),
    "Greater": _comparison("gt", "lt"),
    "GreaterOrEqual": _comparison("ge", "le"),
    "And": _two(aten.logical_and.default),
    "Or": _two(aten.logical_or.default),
    "Xor": _two(aten.logical_xor.default),
    "Not": _one(aten.logical_not.default),
    "BitwiseAnd": _two(aten.bitwise_and.Tensor),
    "BitwiseOr": _two(aten.bitwise_or.Tensor),
    "BitwiseNot": _one(aten.bitwise_not.default),
    "Max": _many(aten.maximum.default),
    "Min": _many(aten.minimum.default),
    "Sum": _many(aten.add.Tensor),
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast,
    "Where": _where,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "Gelu": _gelu,
    "IsInf": _is_inf,
    "LeakyRelu": lambda r, n: r.call(aten.leaky_relu.default, r.x(n, 0), number(n, "alpha", 0.01)),
    "Elu": lambda r, n: r.call(aten.elu.default, r.x(n, 0), number(n, "alpha", 1.0)),
    **{
        name: _one(getattr(aten, torch_name).default)
        for name, torch_name in {
            "Neg": "neg",
            "Abs": "abs",
            "Exp": "exp",
            "Log": "log",
            "Sqrt": "sqrt",
            "Reciprocal": "reciprocal",
            "Erf": "erf",
            "Tanh": "tanh",
            "Sigmoid": "sigmoid",
            "Relu": "relu",
            "Softplus": "softplus",
            "Sin": "sin",
            "Cos": "cos",
            "Atan": "atan",
            "Floor": "floor",
            "Ceil": "ceil",
            "Round": "round",
            "Sign": "sign",
            "IsNaN": "isnan",
            "HardSwish": "hardswish",
            "Mish": "mish",
        }.items()
    },
}
