"""Elementwise expressions over a score: a tree that runs, prints, parses back and has derivatives.

The text is a Python expression without spaces: names (``s`` the score; ``q``, ``k``, ``h``, ``b`` its
position; anything else a captured tensor), numbers with ``inf`` and ``nan``, ``+ - * /``, comparisons, and
calls of the functions in ``FUNCTIONS``: ``where(c0>0.0,relu(s),(s*c1))``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attnc.duals import Dual, plus, times

SCORE = "s"
POSITIONS = ("q", "k", "h", "b")
RESERVED = frozenset((SCORE, *POSITIONS))
"""Names that are no captured tensors."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function of ``FUNCTIONS`` applied to terms: calls, names and numbers."""

    op: str
    args: tuple[Call | str | float, ...]

    def __str__(self) -> str:
        return text(self)


_ROOT = math.sqrt(2 / math.pi)
_GELU_TANH = f"tanh(({_ROOT!r}*(x+(0.044715*(x*square(x))))))"


@dataclass(frozen=True, slots=True)
class Function:
    """An elementwise function in torch, and its derivative along each argument.

    A derivative is the text of an expression over the arguments ``x``, ``y``, ``z``, and so has derivatives.
    """

    value: Callable[..., Any]
    slopes: tuple[str, ...]


def _unary(value: Callable[..., Any], slope: str) -> Function:
    return Function(value, (slope,))


def _chosen(sign: str) -> tuple[str, str]:
    """Return the slopes of a maximum or minimum: 1 where its argument is chosen, half at a tie, as torch."""
    tie = "where(x==y,0.5,0.0)"
    return f"where(x{sign}y,1.0,{tie})", f"where(y{sign}x,1.0,{tie})"


FUNCTIONS: dict[str, Function] = {
    "neg": _unary(torch.neg, "-1.0"),
    "abs": _unary(torch.abs, "sign(x)"),
    "sign": _unary(torch.sign, "0.0"),
    "exp": _unary(torch.exp, "exp(x)"),
    "exp2": _unary(torch.exp2, f"({math.log(2)!r}*exp2(x))"),
    "expm1": _unary(torch.expm1, "exp(x)"),
    "log": _unary(torch.log, "reciprocal(x)"),
    "log1p": _unary(torch.log1p, "reciprocal((1.0+x))"),
    "sqrt": _unary(torch.sqrt, "(0.5*rsqrt(x))"),
    "rsqrt": _unary(torch.rsqrt, "(-0.5*(rsqrt(x)/x))"),
    "reciprocal": _unary(torch.reciprocal, "neg(square(reciprocal(x)))"),
    "square": _unary(torch.square, "(2.0*x)"),
    "sin": _unary(torch.sin, "cos(x)"),
    "cos": _unary(torch.cos, "neg(sin(x))"),
    "tan": _unary(torch.tan, "(1.0+square(tan(x)))"),
    "atan": _unary(torch.atan, "reciprocal((1.0+square(x)))"),
    "sinh": _unary(torch.sinh, "cosh(x)"),
    "cosh": _unary(torch.cosh, "sinh(x)"),
    "tanh": _unary(torch.tanh, "(1.0-square(tanh(x)))"),
    "sigmoid": _unary(torch.sigmoid, "(sigmoid(x)*sigmoid(neg(x)))"),
    "relu": _unary(torch.relu, "where(x>0.0,1.0,0.0)"),
    "silu": _unary(torch.nn.functional.silu, "(sigmoid(x)*(1.0+(x*sigmoid(neg(x)))))"),
    "softplus": _unary(torch.nn.functional.softplus, "sigmoid(x)"),
    "elu": _unary(torch.nn.functional.elu, "where(x>0.0,1.0,exp(x))"),
    "gelu": _unary(
        torch.nn.functional.gelu,
        f"((0.5*(1.0+erf(({math.sqrt(0.5)!r}*x))))+({0.5 * _ROOT!r}*(x*exp((-0.5*square(x))))))",
    ),
    "gelu_tanh": _unary(
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        f"((0.5*(1.0+{_GELU_TANH}))+((0.5*x)*((1.0-square({_GELU_TANH}))"
        f"*({_ROOT!r}*(1.0+({3 * 0.044715!r}*square(x)))))))",
    ),
    "erf": _unary(torch.erf, f"({2 / math.sqrt(math.pi)!r}*exp(neg(square(x))))"),
    "floor": _unary(torch.floor, "0.0"),
    "ceil": _unary(torch.ceil, "0.0"),
    "trunc": _unary(torch.trunc, "0.0"),
    "add": Function(torch.add, ("1.0", "1.0")),
    "sub": Function(torch.sub, ("1.0", "-1.0")),
    "mul": Function(torch.mul, ("y", "x")),
    "div": Function(torch.div, ("reciprocal(y)", "neg(((x/y)/y))")),
    # 0 to the power 0 is flat in its base, although the power by one less is infinite
    "pow": Function(torch.pow, ("(y*pow(where(y==0.0,where(x==0.0,1.0,x),x),(y-1.0)))", "(pow(x,y)*log(x))")),
    "maximum": Function(torch.maximum, _chosen(">")),
    "minimum": Function(torch.minimum, _chosen("<")),
    "lt": Function(torch.lt, ("0.0", "0.0")),
    "le": Function(torch.le, ("0.0", "0.0")),
    "gt": Function(torch.gt, ("0.0", "0.0")),
    "ge": Function(torch.ge, ("0.0", "0.0")),
    "eq": Function(torch.eq, ("0.0", "0.0")),
    "ne": Function(torch.ne, ("0.0", "0.0")),
    "where": Function(torch.where, ("0.0", "where(x,1.0,0.0)", "where(x,0.0,1.0)")),
}
"""Every function that an expression may call.  At a tie a maximum gives half its slope to each side."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_BY_AST: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}


def text(term: Call | str | float) -> str:
    """Return the expression as text without spaces; ``parse_term`` reads it back."""
    if isinstance(term, str):
        return term
    if not isinstance(term, Call):
        return repr(float(term))
    args = [text(a) for a in term.args]
    sign = _INFIX.get(term.op) or _COMPARE.get(term.op)
    return f"({args[0]}{sign}{args[1]})" if sign else f"{term.op}({','.join(args)})"


def parse_term(written: str) -> Call | str | float:
    """Return the expression with this text.

    Raises:
        ValueError: the text is no expression, or calls a function that is not in ``FUNCTIONS``.
    """
    try:
        return _read(ast.parse(written, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"expected an elementwise expression, found {written!r}") from None


def _read(node: ast.expr) -> Call | str | float:
    match node:
        case ast.Constant(int() | float() as value):
            return float(value)
        case ast.Name("inf" | "nan" as name):
            return float(name)
        case ast.Name(name):
            return name
        case ast.UnaryOp(ast.USub(), inner):
            number = _read(inner)
            if isinstance(number, float):
                return -number
        case ast.BinOp(a, op, b) if type(op) in _BY_AST:
            return Call(_BY_AST[type(op)], (_read(a), _read(b)))
        case ast.Compare(a, [op], [b]) if type(op) in _BY_AST:
            return Call(_BY_AST[type(op)], (_read(a), _read(b)))
        case ast.Call(ast.Name(name), args, []) if name in FUNCTIONS:
            wanted = len(FUNCTIONS[name].slopes)
            if len(args) == wanted:
                return Call(name, tuple(map(_read, args)))
    raise ValueError(f"expected a name, a number or a known function, found {ast.unparse(node)!r}")


def names(term: Call | str | float) -> tuple[str, ...]:
    """Return the names an expression reads, each once, in order of appearance."""
    if isinstance(term, str):
        return (term,)
    if not isinstance(term, Call):
        return ()
    return tuple(dict.fromkeys(n for a in term.args for n in names(a)))


def rename(term: Call | str | float, by: Mapping[str, Call | str | float]) -> Call | str | float:
    """Return the expression with names replaced by terms."""
    if isinstance(term, str):
        return by.get(term, term)
    return Call(term.op, tuple(rename(a, by) for a in term.args)) if isinstance(term, Call) else term


def evaluate(term: Call | str | float, values: Mapping[str, Tensor]) -> Tensor:
    """Return the value for tensors by name, broadcast against each other.

    Numbers take the dtype of ``values["s"]``.
    """
    if isinstance(term, str):
        return values[term]
    if not isinstance(term, Call):
        s = values[SCORE]
        return torch.full((), term, dtype=s.dtype, device=s.device)
    out = FUNCTIONS[term.op].value(*(evaluate(a, values) for a in term.args))
    assert isinstance(out, Tensor)
    return out


def push_forward(term: Call | str | float, values: Mapping[str, Dual]) -> Dual:
    """Return the value of an expression and its tangent, for tensors with tangents by name.

    An argument of zero slope adds an exact zero, whatever its tangent, and a choice chooses tangents.
    """
    if isinstance(term, str):
        return values[term]
    if not isinstance(term, Call):
        return Dual(evaluate(term, {SCORE: values[SCORE].value}))
    args = [push_forward(a, values) for a in term.args]
    value = FUNCTIONS[term.op].value(*(a.value for a in args))
    if term.op == "where":
        return Dual(value, _chosen_tangent(*args))
    known = _arguments([a.value for a in args], values[SCORE].value)
    tangent = None
    for arg, slope in zip(args, _slopes(term.op), strict=True):
        if arg.tangent is not None and slope != 0.0:
            tangent = plus(tangent, times(arg.tangent, evaluate(slope, known)))
    return Dual(value, tangent)


def _chosen_tangent(c: Dual, x: Dual, y: Dual) -> Tensor | None:
    if x.tangent is None and y.tangent is None:
        return None
    tx, ty = (torch.zeros_like(d.value) if d.tangent is None else d.tangent for d in (x, y))
    return torch.where(c.value, tx, ty)


@cache
def _slopes(op: str) -> tuple[Call | str | float, ...]:
    """Return the derivatives of a function as expressions over ``x``, ``y``, ``z``."""
    return tuple(map(parse_term, FUNCTIONS[op].slopes))


def _arguments(args: list[Any], score: Any) -> dict[str, Any]:
    """Return what the names in the slopes of a function stand for; ``score`` gives numbers their dtype."""
    return {**dict(zip("xyz", args, strict=False)), SCORE: score}


def pull_back(term: Call | str | float, values: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each float tensor that an expression reads, summed to its shape.

    ``grad`` is the gradient of the value, in its shape.  An argument of zero slope adds an exact zero, so
    the arm of a ``where`` that is not chosen adds none even if its own slope is infinite.
    """
    found = pull_back_duals(term, {n: Dual(x) for n, x in values.items()}, Dual(grad))
    return {n: g.value for n, g in found.items()}


def pull_back_duals(term: Call | str | float, values: Mapping[str, Dual], grad: Dual) -> dict[str, Dual]:
    """Return what ``pull_back`` does, and its tangent where the tensors and the gradient have tangents."""
    sums: dict[str, Dual] = {}
    _pull_into(term, values, grad, sums)
    return {n: g.linear(partial(_summed, values[n].value.shape)) for n, g in sums.items()}


def _summed(shape: torch.Size, x: Tensor) -> Tensor:
    return x.sum_to_size(shape)


def _pull_into(
    term: Call | str | float, values: Mapping[str, Dual], grad: Dual, sums: dict[str, Dual]
) -> None:
    if isinstance(term, str):
        if values[term].value.is_floating_point():
            sums[term] = sums[term] + grad if term in sums else grad
    elif isinstance(term, Call):
        args = [push_forward(a, values) for a in term.args]
        known = _arguments(args, values[SCORE])
        for arg, dual, slope in zip(term.args, args, _slopes(term.op), strict=True):
            if not isinstance(arg, float) and dual.value.is_floating_point():
                _pull_into(arg, values, grad.pulled(push_forward(slope, known)), sums)
