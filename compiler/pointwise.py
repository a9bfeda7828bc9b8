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
from typing import Any

import torch
from torch import Tensor

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


def _gelu_slope(x: Any) -> Any:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Any) -> Any:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _flat(*x: Any) -> Any:
    return torch.zeros_like(x[0])


def _chosen(better: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the slope of a maximum or minimum: 1 where its argument is chosen, half at a tie, as torch."""
    return lambda x, y: better(x, y).to(x.dtype) + 0.5 * (x == y).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Function:
    """An elementwise function in torch, and its derivative along each argument."""

    value: Callable[..., Any]
    slopes: tuple[Callable[..., Any], ...]


def _unary(value: Callable[..., Any], slope: Callable[..., Any]) -> Function:
    return Function(value, (slope,))


FUNCTIONS: dict[str, Function] = {
    "neg": _unary(torch.neg, lambda x: -torch.ones_like(x)),
    "abs": _unary(torch.abs, torch.sign),
    "sign": _unary(torch.sign, _flat),
    "exp": _unary(torch.exp, torch.exp),
    "exp2": _unary(torch.exp2, lambda x: math.log(2) * torch.exp2(x)),
    "expm1": _unary(torch.expm1, torch.exp),
    "log": _unary(torch.log, torch.reciprocal),
    "log1p": _unary(torch.log1p, lambda x: 1 / (1 + x)),
    "sqrt": _unary(torch.sqrt, lambda x: 0.5 * torch.rsqrt(x)),
    "rsqrt": _unary(torch.rsqrt, lambda x: -0.5 * torch.rsqrt(x) / x),
    "reciprocal": _unary(torch.reciprocal, lambda x: -1 / (x * x)),
    "square": _unary(torch.square, lambda x: 2 * x),
    "sin": _unary(torch.sin, torch.cos),
    "cos": _unary(torch.cos, lambda x: -torch.sin(x)),
    "tan": _unary(torch.tan, lambda x: 1 + torch.tan(x) ** 2),
    "atan": _unary(torch.atan, lambda x: 1 / (1 + x * x)),
    "sinh": _unary(torch.sinh, torch.cosh),
    "cosh": _unary(torch.cosh, torch.sinh),
    "tanh": _unary(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "sigmoid": _unary(torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "relu": _unary(torch.relu, lambda x: (x > 0).to(x.dtype)),
    "silu": _unary(torch.nn.functional.silu, lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))),
    "softplus": _unary(torch.nn.functional.softplus, torch.sigmoid),
    "elu": _unary(torch.nn.functional.elu, lambda x: torch.where(x > 0, torch.ones_like(x), torch.exp(x))),
    "gelu": _unary(torch.nn.functional.gelu, _gelu_slope),
    "gelu_tanh": _unary(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "erf": _unary(torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x)),
    "floor": _unary(torch.floor, _flat),
    "ceil": _unary(torch.ceil, _flat),
    "trunc": _unary(torch.trunc, _flat),
    "add": Function(torch.add, (lambda x, y: torch.ones_like(x),) * 2),
    "sub": Function(torch.sub, (lambda x, y: torch.ones_like(x), lambda x, y: -torch.ones_like(x))),
    "mul": Function(torch.mul, (lambda x, y: y, lambda x, y: x)),
    "div": Function(torch.div, (lambda x, y: 1 / y, lambda x, y: -x / (y * y))),
    "pow": Function(
        torch.pow,
        (lambda x, y: torch.where(y == 0, 0.0, y * x ** (y - 1)), lambda x, y: x**y * torch.log(x)),
    ),
    "maximum": Function(torch.maximum, (_chosen(torch.gt), lambda x, y: _chosen(torch.gt)(y, x))),
    "minimum": Function(torch.minimum, (_chosen(torch.lt), lambda x, y: _chosen(torch.lt)(y, x))),
    "lt": Function(torch.lt, (_flat,) * 2),
    "le": Function(torch.le, (_flat,) * 2),
    "gt": Function(torch.gt, (_flat,) * 2),
    "ge": Function(torch.ge, (_flat,) * 2),
    "eq": Function(torch.eq, (_flat,) * 2),
    "ne": Function(torch.ne, (_flat,) * 2),
    "where": Function(torch.where, (_flat, lambda c, x, y: c.to(x.dtype), lambda c, x, y: (~c).to(x.dtype))),
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


def pull_back(term: Call | str | float, values: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each float tensor that an expression reads, summed to its shape.

    ``grad`` is the gradient of the value, in its shape.  An argument of zero slope adds an exact zero, so
    the arm of a ``where`` that is not chosen adds none even if its own slope is infinite.
    """
    sums: dict[str, Tensor] = {}
    _pull_into(term, values, grad, sums)
    return {n: g.sum_to_size(values[n].shape) for n, g in sums.items()}


def _pull_into(
    term: Call | str | float, values: Mapping[str, Tensor], grad: Tensor, sums: dict[str, Tensor]
) -> None:
    if isinstance(term, str):
        if values[term].is_floating_point():
            sums[term] = sums[term] + grad if term in sums else grad
    elif isinstance(term, Call):
        args = [evaluate(a, values) for a in term.args]
        for arg, value, slope in zip(term.args, args, FUNCTIONS[term.op].slopes, strict=True):
            if isinstance(arg, float) or not value.is_floating_point():
                continue
            local = slope(*args)
            _pull_into(arg, values, torch.where((grad == 0) | (local == 0), 0.0, grad * local), sums)
