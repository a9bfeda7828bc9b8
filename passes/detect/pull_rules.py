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
from attnc.passes.detect.arithmetic import arithmetic, compare, literal, to_bool, to_int
from attnc.passes.detect.graph import argument, base_name, op_name, shape, tensor_of
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
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        n = E.as_number(p.operand(node.args[0], index))
        return None if n is None else E.real(f(n))

    return rule


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _abs(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = to_int(p.operand(node.args[0], index))
    return None if x is None else E.where(E.le0(x), E.neg(x), x)


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


# ---------------------------------------------------------------- selection


def _cat(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    tensors = argument(node, 0, "tensors")
    d = argument(node, 1, "dim", 0) % len(index)
    if any(len(shape(t)) != len(index) for t in tensors):
        return None
    parts: list[tuple[fx.Node, Expr]] = []
    end = ZERO
    for t in tensors:
        parts.append((t, end))
        end = E.add(end, shape(t)[d])
    out: Expr | None = None
    for t, start in reversed(parts):
        n = shape(t)[d]
        local = ZERO if n == ONE else E.sub(index[d], start)
        x = p.arm(t, (*index[:d], local, *index[d + 1 :]))
        inside = E.le0(E.add(E.sub(index[d], E.add(start, n)), ONE))
        out = x if out is None else _either(inside, x, out)
    return out


def _either(c: Expr, x: Expr, y: Expr) -> Expr:
    """Return ``x if c else y`` for two arms of one dtype, one of which may have been rounded to a float."""
    if E.is_int(x) != E.is_int(y) and not E.is_bool(x):
        x, y = (E.real(float(n)) if (n := E.as_int(v)) is not None else v for v in (x, y))
    return E.where(c, x, y)


def _pad(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, pads, t = node.args[0], argument(node, 1, "pad"), tensor_of(node)
    mode, value = "constant", argument(node, 2, "value", 0)
    if base_name(node) == "pad":
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
    if mode != "constant" or not isinstance(src, fx.Node) or t is None:
        return None
    place, conditions = list(index), []
    for i in range(len(pads) // 2):
        d = len(index) - 1 - i
        place[d] = E.sub(index[d], p.operand(pads[2 * i], ()))
        conditions += [E.le0(E.neg(place[d])), E.le0(E.add(E.sub(place[d], shape(src)[d]), ONE))]
        place[d] = ZERO if shape(src)[d] == ONE else place[d]
    inside, outside = p.arm(src, tuple(place)), p.operand(0 if value is None else value, ())
    return _either(E.and_(*conditions), inside, to_bool(outside) if t.dtype == torch.bool else outside)


def _gather_rows(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Index by broadcast integer tensors in adjacent positions, each proved to be non-negative."""
    src, places = node.args[0], argument(node, 1, "indices")
    assert isinstance(src, fx.Node), f"{node} indexes no tensor"
    used = [i for i, x in enumerate(places) if x is not None]
    tensors = [places[i] for i in used]
    if not used or used != list(range(used[0], used[-1] + 1)) or not all(map(_counts, tensors)):
        return None
    rank = max(len(shape(t)) for t in tensors)
    head = index[used[0] : used[0] + rank]
    picked = [to_int(p.operand(t, head)) for t in tensors]
    whole = [x for x in picked if x is not None and E.nonneg(x)]
    if len(whole) < len(picked):
        return None
    return p.at(src, (*index[: used[0]], *whole, *index[used[0] + rank :]))


def _counts(x: Any) -> bool:
    """Say whether ``x`` is a tensor of whole numbers.

    A bool tensor picks a number of rows that data decides.
    """
    t = tensor_of(x) if isinstance(x, fx.Node) else None
    return t is not None and t.dtype in (torch.int64, torch.int32)


def _index_select(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, d, places = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    d %= len(index)
    at = to_int(p.operand(places, (index[d],)))
    if at is None or not E.nonneg(at):
        return None
    return p.at(src, (*index[:d], at, *index[d + 1 :]))


def _cumsum(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Sum a value that does not change along the axis; anything else stays opaque."""
    src, d = node.args[0], argument(node, 1, "dim") % max(len(index), 1)
    assert isinstance(src, fx.Node), f"{node} sums no tensor"
    if not index:
        return p.at(src, index)
    anywhere = ZERO if shape(src)[d] == ONE else E.index(f"at.{node.name}", shape(src)[d])
    x = to_int(p.at(src, (*index[:d], anywhere, *index[d + 1 :])))
    if x is None or E.only_index(anywhere) in E.indices(x):
        return None
    return E.mul(x, E.add(index[d], ONE))


def _diff(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, d = node.args[0], argument(node, 2, "dim", -1) % len(index)
    prepend, t = argument(node, 3, "prepend"), tensor_of(node)
    assert isinstance(src, fx.Node), f"{node} subtracts no tensor"
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        return None
    if t is None or t.dtype == torch.bool:
        return None
    here = index[d]

    def at(i: Expr) -> Index:
        return (*index[:d], i, *index[d + 1 :])

    if prepend is None:
        return arithmetic("sub", p.at(src, at(E.add(here, ONE))), p.at(src, index))
    if shape(prepend)[d] != ONE:
        return None
    last = _either(E.le0(here), p.at(prepend, at(ZERO)), p.arm(src, at(E.sub(here, ONE))))
    return arithmetic("sub", p.at(src, index), last)


RULES: dict[str, _Rule] = {
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
    "cat": _cat,
    "constant_pad_nd": _pad,
    "pad": _pad,
    "index": _gather_rows,
    "index_select": _index_select,
    "cumsum": _cumsum,
    "diff": _diff,
}
