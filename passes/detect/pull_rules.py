"""What each op computes, element by element: one rule per op, looked up by name in ``RULES``.

A rule gets the evaluator, the node and the index of one element of the result; it returns the element's value
or None, and then the element is a leaf.  Cat, pad and the like are piecewise: ``where(index < c, a, b)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import FALSE, ONE, TRUE, ZERO, Expr
from attnc.passes.detect.arithmetic import arithmetic, compare, extreme, literal, magnitude, to_bool, to_int
from attnc.passes.detect.graph import argument, base_name, op_name, tensor_of
from attnc.passes.detect.pull_places import PLACES
from attnc.passes.detect.views import Index

if TYPE_CHECKING:
    from attnc.passes.detect.pull import Puller

_Rule = Callable[["Puller", fx.Node, Index], Expr | None]


# ---------------------------------------------------------------- elementwise


def _cast(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Change the type; a float that is no whole constant has no integer form here."""
    t = tensor_of(node)
    x = p.operand(node.args[0], index)
    if t is None or t.dtype == torch.bool:
        return to_bool(x)
    return x if t.dtype.is_floating_point else to_int(x)


def _binary(op: str) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        a, b = p.operand(node.args[0], index), p.operand(node.args[1], index)
        alpha = argument(node, 2, "alpha", 1) if op != "mul" else 1
        if isinstance(alpha, fx.Node):
            return None
        return arithmetic(op, a, b if alpha == 1 else arithmetic("mul", b, literal(alpha)))

    return rule


def _rsub(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return ``other - alpha * self``."""
    a, b = p.operand(node.args[0], index), p.operand(node.args[1], index)
    alpha = argument(node, 2, "alpha", 1)
    if isinstance(alpha, fx.Node):
        return None
    return arithmetic("sub", b, a if alpha == 1 else arithmetic("mul", a, literal(alpha)))


def _positive(b: Expr) -> Expr | None:
    """Return a divisor as an integer if it is a positive constant."""
    n = to_int(b)
    return n if n is not None and (E.as_int(n) or 0) > 0 else None


def _div(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    a, b = p.operand(node.args[0], index), p.operand(node.args[1], index)
    mode = "floor" if base_name(node) == "floor_divide" else node.kwargs.get("rounding_mode")
    if mode is None:
        return arithmetic("div", a, b)
    n, i = _positive(b), to_int(a)
    if i is None or n is None or (mode == "trunc" and not E.nonneg(i)):
        return None
    return E.floordiv(i, n)


def _remainder(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return ``i % n``; fmod takes the sign of ``i`` and so is the same only for ``i >= 0``."""
    i, n = to_int(p.operand(node.args[0], index)), _positive(p.operand(node.args[1], index))
    if i is None or n is None or (base_name(node) == "fmod" and not E.nonneg(i)):
        return None
    return E.mod(i, n)


def _comparison(op: str) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        return compare(op, p.operand(node.args[0], index), p.operand(node.args[1], index))

    return rule


def _logic(op: str) -> _Rule:
    """Connect predicates; on integers the same ops work on bits, and have no rule."""

    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        t = tensor_of(node)
        if t is None or t.dtype != torch.bool:
            return None
        a = to_bool(p.operand(node.args[0], index))
        if op == "not":
            return E.not_(a)
        b = to_bool(p.operand(node.args[1], index))
        if op == "xor":
            return E.or_(E.and_(a, E.not_(b)), E.and_(E.not_(a), b))
        return E.and_(a, b) if op == "and" else E.or_(a, b)

    return rule


def _neg(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = p.operand(node.args[0], index)
    return arithmetic("mul", x, E.integer(-1) if E.is_int(x) else E.real(-1.0))


def _of_constant(f: Callable[[float], float]) -> _Rule:
    """Apply a function to a number, or to each of the numbers that a condition chooses from."""

    def applied(x: Expr) -> Expr | None:
        if x.op == "where":
            a, b = (applied(arm) for arm in x.args[1:])
            return None if a is None or b is None else E.where(x.args[0], a, b)
        n = E.as_number(x)
        return None if n is None else E.real(f(n))

    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        x = p.operand(node.args[0], index)
        return applied(E.where(x, ONE, ZERO) if E.is_bool(x) else x)

    return rule


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _abs(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = to_int(p.operand(node.args[0], index))
    return None if x is None else E.where(E.le0(x), E.neg(x), x)


def _sign(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = to_int(p.operand(node.args[0], index))
    if x is None:
        return None
    return E.where(E.le0(x), E.where(E.eq0(x), ZERO, E.integer(-1)), ONE)


def _extremes(how: str) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        return extreme(how, p.operand(node.args[0], index), p.operand(node.args[1], index))

    return rule


def _clamp(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return ``min(max(x, low), high)``: the upper bound wins where the two cross."""
    x: Expr | None = p.operand(node.args[0], index)
    name = base_name(node)
    low = argument(node, 1, "min") if name != "clamp_max" else None
    high = (
        argument(node, 2, "max")
        if name == "clamp"
        else argument(node, 1, "max")
        if name == "clamp_max"
        else None
    )
    for how, bound in (("max", low), ("min", high)):
        if bound is not None and x is not None:
            x = extreme(how, x, p.operand(bound, index))
    return x


def _rounded_quotient(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return ``floor(i / n)`` for an integer and a positive constant, whose fp32 quotient is close enough.

    A quotient that is no integer is at least 1/n away from one, and fp32 holds it to 2**-23 of its size.
    """
    x = p.operand(node.args[0], index)
    if E.is_int(x):
        return x
    if x.op != "call" or x.args[0] != "div":
        return None
    i, n = to_int(x.args[1][0]), _positive(x.args[1][1])
    if i is None or n is None or magnitude(i) >= 2**22 or base_name(node) == "ceil":
        return None
    return E.floordiv(i, n) if base_name(node) == "floor" or E.nonneg(i) else None


def _where(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    if len(node.args) < 3:
        return None
    c = to_bool(p.operand(node.args[0], index))
    return _chosen(p, node, c, node.args[1], node.args[2], index)


def _masked_fill(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    c = to_bool(p.operand(node.args[1], index))
    return _chosen(p, node, c, node.args[2], node.args[0], index)


def _chosen(p: Puller, node: fx.Node, c: Expr, a: Any, b: Any, index: Index) -> Expr | None:
    """Return ``a if c else b`` with both arms brought to the type of the result."""
    if c in (TRUE, FALSE):
        return p.operand(a if c == TRUE else b, index)
    x, y = p.operand(a, index), p.operand(b, index)
    t = tensor_of(node)
    if t is not None and t.dtype == torch.bool:
        return E.where(c, to_bool(x), to_bool(y))
    x, y = (E.where(v, ONE, ZERO) if E.is_bool(v) else v for v in (x, y))
    if E.is_int(x) != E.is_int(y):
        x, y = (E.real(float(n)) if (n := E.as_int(v)) is not None else v for v in (x, y))
    return E.where(c, x, y)


# ---------------------------------------------------------------- creation


def _filled(value: Callable[[fx.Node], Any]) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        return p.operand(value(node), ())

    return rule


def _arange(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    bounded = op_name(node) != "arange.default"
    start = to_int(p.operand(node.args[0] if bounded else 0, ()))
    step = to_int(p.operand(argument(node, 2, "step", 1) if bounded else 1, ()))
    return None if start is None or step is None else E.add(start, E.mul(step, index[0]))


def _triangle(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x, k = p.operand(node.args[0], index), to_int(p.operand(argument(node, 1, "diagonal", 0), ()))
    if k is None:
        return None
    d = E.sub(E.sub(index[-1], index[-2]), k)
    keep = E.le0(d) if base_name(node) == "tril" else E.le0(E.neg(d))
    if E.is_bool(x):
        return E.and_(keep, x)
    return E.where(keep, x, ZERO if E.is_int(x) else E.real(0.0))


def _eye(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    t = tensor_of(node)
    one, zero = (E.real(1.0), E.real(0.0)) if t is not None and t.dtype.is_floating_point else (ONE, ZERO)
    return E.where(E.eq0(E.sub(index[0], index[1])), one, zero)


RULES: dict[str, _Rule] = {
    **PLACES,
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast),
    **{n: _binary(n) for n in ("add", "sub", "mul")},
    "rsub": _rsub,
    **dict.fromkeys(("div", "floor_divide", "true_divide"), _div),
    **dict.fromkeys(("remainder", "fmod"), _remainder),
    **{n: _comparison(n) for n in ("le", "lt", "ge", "gt", "eq", "ne")},
    **dict.fromkeys(("bitwise_and", "logical_and", "__and__"), _logic("and")),
    **dict.fromkeys(("bitwise_or", "logical_or", "__or__"), _logic("or")),
    **dict.fromkeys(("bitwise_xor", "logical_xor", "__xor__"), _logic("xor")),
    **dict.fromkeys(("bitwise_not", "logical_not"), _logic("not")),
    "neg": _neg,
    "exp": _of_constant(_exp),
    "log": _of_constant(lambda x: math.log(x) if x > 0 else -math.inf if x == 0 else math.nan),
    "sqrt": _of_constant(lambda x: math.sqrt(x) if x >= 0 else math.nan),
    "abs": _abs,
    "sign": _sign,
    "sgn": _sign,
    **{n: _extremes(how) for how in ("max", "min") for n in (f"{how}imum", f"{how}.other")},
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    **dict.fromkeys(("floor", "trunc", "ceil"), _rounded_quotient),
    "eye": _eye,
    "fill": _filled(lambda n: n.args[1]),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(lambda n: 0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(lambda n: 1)),
    **dict.fromkeys(("full", "full_like"), _filled(lambda n: argument(n, 1, "fill_value"))),
    "new_full": _filled(lambda n: argument(n, 2, "fill_value")),
    "scalar_tensor": _filled(lambda n: argument(n, 0, "s")),
    "arange": _arange,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle,
    "triu": _triangle,
}


def rule_of(node: fx.Node) -> _Rule | None:
    """Return the rule of a node's op, by its overload or by its name."""
    return RULES.get(op_name(node)) or RULES.get(base_name(node))
