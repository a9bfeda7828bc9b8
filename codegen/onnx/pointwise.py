"""Write an elementwise expression over the scores with ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx.builder import Builder
from attnc.errors import CodegenError
from attnc.pointwise import POSITIONS, SCORE, Call

if TYPE_CHECKING:
    import onnx_ir as ir

_SAME = {
    "neg": "Neg",
    "abs": "Abs",
    "sign": "Sign",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "softplus": "Softplus",
    "elu": "Elu",
    "erf": "Erf",
    "floor": "Floor",
    "ceil": "Ceil",
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
    "where": "Where",
}
_COMPARE = {"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal"}


def why_not(term: Call | str | float) -> str | None:
    """Say which part of an expression has no operators here, None if all have."""
    if isinstance(term, str):
        return f"the position {term}" if term in POSITIONS else None
    if not isinstance(term, Call):
        return None
    if term.op not in (*_SAME, *_COMPARE, *_MADE):
        return f"the function {term.op}"
    return next((why for a in term.args if (why := why_not(a)) is not None), None)


def written(
    b: Builder, term: Call | str | float, s: ir.Value, named: Mapping[str, ir.Value], work: torch.dtype
) -> ir.Value:
    """Write the expression of scores ``[B, H, Sq, Sk]`` in ``work`` precision; ``named`` are captured.

    Raises:
        CodegenError: a part that ``why_not`` names.
    """
    if isinstance(term, str):
        if term in POSITIONS:
            raise CodegenError(f"ONNX export: no operators are known for {why_not(term)} in a score step")
        return s if term == SCORE else _operand(b, named[term], work)
    if not isinstance(term, Call):
        return b.const(term, work)
    made = _MADE.get(term.op)
    if made is not None:
        return written(b, made(*term.args), s, named, work)
    args = [written(b, a, s, named, work) for a in term.args]
    if term.op in _COMPARE:
        return b.op(_COMPARE[term.op], *args, dtype=torch.bool)
    if term.op not in _SAME:
        raise CodegenError(f"ONNX export: no operators are known for {why_not(term)} in a score step")
    return b.op(_SAME[term.op], *args, dtype=work)


def _operand(b: Builder, x: ir.Value, work: torch.dtype) -> ir.Value:
    import onnx_ir as ir

    return x if x.dtype == ir.DataType.BOOL else b.cast(x, work)


_Arg = Call | str | float


def _gelu(x: _Arg) -> Call:
    inside = Call("add", (1.0, Call("erf", (Call("mul", (x, 1 / math.sqrt(2))),))))
    return Call("mul", (Call("mul", (0.5, x)), inside))


def _gelu_tanh(x: _Arg) -> Call:
    cube = Call("mul", (0.044715, Call("mul", (x, Call("mul", (x, x))))))
    inside = Call("tanh", (Call("mul", (math.sqrt(2 / math.pi), Call("add", (x, cube)))),))
    return Call("mul", (Call("mul", (0.5, x)), Call("add", (1.0, inside))))


_MADE: dict[str, Callable[[_Arg], Call]] = {
    "square": lambda x: Call("mul", (x, x)),
    "exp2": lambda x: Call("pow", (2.0, x)),
    "rsqrt": lambda x: Call("reciprocal", (Call("sqrt", (x,)),)),
    "silu": lambda x: Call("mul", (x, Call("sigmoid", (x,)))),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""Functions written with others."""
