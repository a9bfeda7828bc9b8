"""One evaluator for everything beside the scores: what is this node's value at this index?

``Puller.value(node, index)`` rewrites the index backwards through views, gathers, cat, pad and arithmetic and returns a symbolic
expression.  Masks made of arange and comparisons come out closed; what cannot be followed ends in a ``load``.  Upper bounds of sizes
are never used to decide a comparison, so a closed form holds at every length (see ``attnc.expr``).
Cat, pad and the like are piecewise: ``where(index < c, a, b)``, each arm evaluated under its guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import FALSE, ONE, TRUE, ZERO, Expr
from attnc.passes.detect.graph import argument, base_name, op_name, shape, tensor_of
from attnc.passes.detect.views import At, Index, broadcast, stepped
from attnc.sizes import dim


class OverBudgetError(Exception):
    """The derivation of one operand needed more terms than allowed; the operand stays opaque."""


class Puller:
    """Evaluate nodes of one working graph symbolically.

    ``constants`` maps nodes with known values (lifted constants, small buffers) to tensors.  ``limit`` is the number of distinct
    (node, index) pairs that one call of ``value`` may visit.
    """

    def __init__(self, constants: Mapping[str, torch.Tensor | None] | None = None, limit: int = 4000) -> None:
        self.constants = constants or {}
        self.limit = limit
        self._memo: dict[tuple[str, Index], Expr] = {}
        self._left = limit

    def value(self, node: fx.Node, index: Index) -> Expr:
        """Return the value of ``node`` at ``index`` (one polynomial per axis).

        Raises:
            OverBudgetError: more than ``limit`` distinct elements had to be visited.
        """
        self._left = self.limit
        return self._value(node, index)

    def _value(self, node: fx.Node, index: Index) -> Expr:
        key = (node.name, index)
        out = self._memo.get(key)
        if out is None:
            self._left -= 1
            if self._left < 0:
                raise OverBudgetError(node.name)
            self._memo[key] = out = self._compute(At(node, index))
        return out

    def _compute(self, at: At) -> Expr:
        node = at.node
        if tensor_of(node) is None:
            return self._scalar(node)
        constant = self._constant(at)
        if constant is not None:
            return constant
        step = stepped(at)
        if step is not None:
            return self._value(step[0].node, step[0].index)
        rule = _RULES.get(op_name(node)) or _RULES.get(base_name(node))
        out = rule(self, node, at.index) if rule is not None else None
        return leaf(at) if out is None else out

    def _scalar(self, node: fx.Node) -> Expr:
        val = node.meta.get("val")
        if isinstance(val, bool):
            return TRUE if val else FALSE
        if isinstance(val, int | torch.SymInt):
            return dim(val)
        return E.real(val) if isinstance(val, float) else Expr("call", "scalar", (node.name,))

    def _constant(self, at: At) -> Expr | None:
        """Read a known constant: a single element, or one at fixed indices."""
        t = self.constants.get(at.node.name)
        if t is None or isinstance(t, torch._subclasses.FakeTensor) or isinstance(t, torch.nn.Parameter):
            return None
        place = [E.as_int(i) for i in at.index]
        if any(p is None for p in place):
            return None
        return literal(t[tuple(p for p in place if p is not None)].item())

    def operand(self, x: Any, index: Index) -> Expr:
        """Return the value of an argument (node or number) that is broadcast to a result indexed by ``index``."""
        if isinstance(x, fx.Node):
            return self._value(x, broadcast(index, x)) if tensor_of(x) is not None else self._scalar(x)
        return literal(x)


def literal(x: Any) -> Expr:
    """Return a Python number as a constant."""
    if isinstance(x, bool):
        return TRUE if x else FALSE
    if isinstance(x, int):
        return E.integer(x)
    if isinstance(x, torch.SymInt):
        return dim(x)
    return E.real(float(x))


def leaf(at: At) -> Expr:
    """Return the element as a load, typed by the tensor's dtype."""
    t = tensor_of(at.node)
    assert t is not None
    kind = "bool" if t.dtype == torch.bool else "float" if t.dtype.is_floating_point or t.dtype.is_complex else "int"
    return E.load(at.node.name, at.index, kind)


# ---------------------------------------------------------------- casts and arithmetic


def to_bool(x: Expr) -> Expr:
    """Return ``x != 0``."""
    if E.is_bool(x):
        return x
    if x.op == "where":
        return E.where(x.args[0], to_bool(x.args[1]), to_bool(x.args[2]))
    g = E.only_generator(x) if E.is_int(x) else None
    if g is not None and g.op == "where":
        return E.where(g.args[0], to_bool(g.args[1]), to_bool(g.args[2]))
    if E.is_int(x):
        return E.not_(E.eq0(x))
    n = E.as_number(x)
    return (TRUE if n else FALSE) if n is not None else E.not_(E.call("is_zero", x))


def to_int(x: Expr) -> Expr | None:
    """Return a predicate as 0 or 1, an integer as it is; None for floats that are no whole constants."""
    if E.is_int(x):
        return x
    if E.is_bool(x):
        return E.where(x, ONE, ZERO)
    n = E.as_number(x)
    return E.integer(int(n)) if n is not None and math.isfinite(n) and n == int(n) else None


def _cast(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    t, src = tensor_of(node), node.args[0]
    assert t is not None and isinstance(src, fx.Node)
    x = p.operand(src, index)
    if t.dtype == torch.bool:
        return to_bool(x)
    if t.dtype.is_floating_point:
        return E.where(x, E.real(1.0), E.real(0.0)) if E.is_bool(x) else x
    return to_int(x) if not (x.op in ("load", "call", "where")) else None


def _lift(f: Callable[[Expr, Expr], Expr | None], a: Expr, b: Expr) -> Expr | None:
    """Apply ``f`` inside the arms of a ``where`` when the other side is plain."""
    for x, swap in ((a, False), (b, True)):
        w = x if x.op == "where" else E.only_generator(x) if E.is_int(x) else None
        if w is not None and w.op == "where" and (b if not swap else a).op != "where":
            other = a if swap else b
            arms = [_lift(f, other, arm) if swap else _lift(f, arm, other) for arm in w.args[1:]]
            if arms[0] is not None and arms[1] is not None:
                return E.where(w.args[0], arms[0], arms[1])
            return None
    return f(a, b)


def arithmetic(op: str, a: Expr, b: Expr) -> Expr:
    """Return ``a op b`` for op in add, sub, mul, div; exact on integers, folded on constants, symbolic otherwise."""

    def f(x: Expr, y: Expr) -> Expr | None:
        m, n = E.as_number(x), E.as_number(y)
        if m is not None and n is not None and not (op == "div" and n == 0):
            both_int = E.is_int(x) and E.is_int(y) and op != "div"
            if not both_int:
                return E.real({"add": m + n, "sub": m - n, "mul": m * n, "div": m / n if op == "div" else 0.0}[op])
        if E.is_bool(x) or E.is_bool(y):
            x, y = (E.where(v, ONE, ZERO) if E.is_bool(v) else v for v in (x, y))
            if any(E.only_generator(v) is not None and E.only_generator(v).op == "where" for v in (x, y)):  # type: ignore[union-attr]
                return _lift(f, x, y)
        if op in ("mul", "div") and m == 0 or (op == "mul" and n == 0):
            return ZERO if E.is_int(x) and E.is_int(y) else E.real(0.0)
        x, y = _same_kind(x, y)
        if E.is_int(x) and E.is_int(y) and op != "div":
            return {"add": E.add, "sub": E.sub, "mul": E.mul}[op](x, y)
        if op == "add" and m == 0 or (op in ("add", "sub") and n == 0) or (op in ("mul", "div") and n == 1) or (op == "mul" and m == 1):
            return y if (op == "add" and m == 0) or (op == "mul" and m == 1) else x
        return E.call(op, x, y)

    out = _lift(f, a, b)
    return E.call(op, a, b) if out is None else out


def _same_kind(x: Expr, y: Expr) -> tuple[Expr, Expr]:
    """Turn a whole float constant into an integer when the other side is an integer polynomial."""
    if E.is_int(x) and not E.is_int(y) and y.op == "const":
        return x, to_int(y) or y
    if E.is_int(y) and not E.is_int(x) and x.op == "const":
        return to_int(x) or x, y
    return x, y


def compare(op: str, a: Expr, b: Expr) -> Expr:
    """Return ``a op b`` as a predicate for op in le, lt, ge, gt, eq, ne; both sides integers or predicates, else opaque."""

    def f(x: Expr, y: Expr) -> Expr | None:
        if E.is_bool(x) and E.is_bool(y) and op in ("eq", "ne"):
            same = E.or_(E.and_(x, y), E.and_(E.not_(x), E.not_(y)))
            return same if op == "eq" else E.not_(same)
        i, j = (to_int(v) if not E.is_bool(v) or op not in ("eq", "ne") else to_int(v) for v in (x, y))
        if i is not None and j is not None:
            if any((g := E.only_generator(v)) is not None and g.op == "where" for v in (i, j)) and not (x == i and y == j):
                return _lift(f, i, j)
            d = E.sub(i, j)
            table = {"le": d, "lt": E.add(d, ONE), "ge": E.neg(d), "gt": E.add(E.neg(d), ONE)}
            return E.le0(table[op]) if op in table else E.eq0(d) if op == "eq" else E.not_(E.eq0(d))
        m, n = E.as_number(x), E.as_number(y)
        if m is not None and n is not None:
            ok = {"le": m <= n, "lt": m < n, "ge": m >= n, "gt": m > n, "eq": m == n, "ne": m != n}[op]
            return TRUE if ok else FALSE
        return None

    out = _lift(f, a, b)
    return out if out is not None else to_bool_call(op, a, b)


def to_bool_call(op: str, a: Expr, b: Expr) -> Expr:
    """Return an opaque comparison as a predicate, ``not is_zero(op(a, b))``."""
    return E.not_(E.call("is_zero", E.call(op, a, b)))


_Rule = Callable[[Puller, fx.Node, Index], Expr | None]


def _binary(op: str) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        a, b = p.operand(node.args[0], index), p.operand(node.args[1], index)
        alpha = node.kwargs.get("alpha", 1)
        if op == "rsub":
            return arithmetic("sub", b, arithmetic("mul", a, literal(alpha)))
        return arithmetic(op, a, arithmetic("mul", b, literal(alpha)) if alpha != 1 else b)

    return rule


def _div(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    a, b = p.operand(node.args[0], index), p.operand(node.args[1], index)
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor" or base_name(node) == "floor_divide":
        n = to_int(b)
        i = to_int(a)
        return E.floordiv(i, n) if i is not None and n is not None and (E.as_int(n) or 0) > 0 else None
    return None if mode else arithmetic("div", a, b)


def _remainder(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    i, n = to_int(p.operand(node.args[0], index)), to_int(p.operand(node.args[1], index))
    return E.mod(i, n) if i is not None and n is not None and (E.as_int(n) or 0) > 0 else None


def _comparison(op: str) -> _Rule:
    return lambda p, node, index: compare(op, p.operand(node.args[0], index), p.operand(node.args[1], index))


def _logic(op: str) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        a = p.operand(node.args[0], index)
        t = tensor_of(node)
        if t is None or t.dtype != torch.bool:
            return None
        if op == "not":
            return E.not_(to_bool(a))
        b = to_bool(p.operand(node.args[1], index))
        a = to_bool(a)
        if op == "xor":
            return E.or_(E.and_(a, E.not_(b)), E.and_(E.not_(a), b))
        return E.and_(a, b) if op == "and" else E.or_(a, b)

    return rule


def _unary(fn: str, f: Callable[[float], float] | None = None) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        x = p.operand(node.args[0], index)
        if fn == "neg":
            return arithmetic("mul", x, E.integer(-1) if E.is_int(x) else E.real(-1.0))
        n = E.as_number(x)
        return E.real(f(n)) if f is not None and n is not None else None

    return rule


def _abs(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = to_int(p.operand(node.args[0], index))
    return None if x is None else E.where(E.le0(x), E.neg(x), x)


# ---------------------------------------------------------------- creation and selection


def _filled(value: Callable[[fx.Node], Any]) -> _Rule:
    def rule(p: Puller, node: fx.Node, index: Index) -> Expr | None:
        t, x = tensor_of(node), value(node)
        if t is None or isinstance(x, fx.Node):
            return p.operand(x, ()) if isinstance(x, fx.Node) else None
        if t.dtype == torch.bool:
            return TRUE if x else FALSE
        return E.real(float(x)) if t.dtype.is_floating_point else E.integer(int(x))

    return rule


def _arange(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    start: Any = 0
    step: Any = 1
    name = op_name(node)
    if name != "arange.default":
        start = node.args[0]
        step = argument(node, 2, "step", 1)
    a, s = p.operand(start, ()), p.operand(step, ())
    a_, s_ = to_int(a), to_int(s)
    return None if a_ is None or s_ is None else E.add(a_, E.mul(s_, index[0]))


def _where(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    if len(node.args) < 3:
        return None
    c = to_bool(p.operand(node.args[0], index))
    if c in (TRUE, FALSE):
        return p.operand(node.args[1 if c == TRUE else 2], index)
    return _guarded(p, c, node.args[1], node.args[2], index)


def _guarded(p: Puller, c: Expr, a: Any, b: Any, index: Index) -> Expr:
    x, y = p.operand(a, index), p.operand(b, index)
    t = [v for v in (x, y) if E.is_bool(v)]
    if len(t) == 1:
        x, y = to_bool(x), to_bool(y)
    elif E.is_int(x) != E.is_int(y):
        x, y = (E.real(float(n)) if (n := E.as_int(v)) is not None else v for v in (x, y))
    return E.where(c, x, y)


def _masked_fill(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    c = to_bool(p.operand(node.args[1], index))
    if c == FALSE:
        return p.operand(node.args[0], index)
    return _guarded(p, c, node.args[2], node.args[0], index)


def _triangle(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    x = p.operand(node.args[0], index)
    k = argument(node, 1, "diagonal", 0)
    d = E.sub(E.sub(index[-1], index[-2]), E.integer(k))
    keep = E.le0(d) if base_name(node) == "tril" else E.le0(E.neg(d))
    if E.is_bool(x):
        return E.and_(keep, x)
    return E.where(keep, x, ZERO if E.is_int(x) else E.real(0.0))


def _cat(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    tensors = argument(node, 0, "tensors")
    d = argument(node, 1, "dim", 0) % len(index)
    starts: list[tuple[fx.Node, Expr]] = []
    at = ZERO
    for t in tensors:
        if len(shape(t)) != len(index):
            return None
        starts.append((t, at))
        at = E.add(at, shape(t)[d])
    out: Expr | None = None
    for t, start in reversed(starts):
        local = E.sub(index[d], start)
        x = _at_guarded(p, t, (*index[:d], local, *index[d + 1 :]), d, shape(t)[d])
        out = x if out is None else E.where(E.le0(E.add(E.sub(index[d], E.add(start, shape(t)[d])), ONE)), x, out)
    return out


def _at_guarded(p: Puller, t: fx.Node, index: Index, d: int, n: Expr) -> Expr:
    """Evaluate an arm of a piecewise value; an axis of size one is read at its only element."""
    return p._value(t, (*index[:d], ZERO, *index[d + 1 :]) if n == ONE else index)


def _pad(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, pads = node.args[0], argument(node, 1, "pad")
    assert isinstance(src, fx.Node)
    value = literal(argument(node, 2, "value", 0))
    out_index, conditions = list(index), []
    for i in range(len(pads) // 2):
        d = len(index) - 1 - i
        before = p.operand(pads[2 * i], ())
        out_index[d] = E.sub(index[d], before)
        conditions += [E.le0(E.neg(out_index[d])), E.le0(E.add(E.sub(out_index[d], shape(src)[d]), ONE))]
    inside = p._value(src, tuple(out_index))
    t = tensor_of(node)
    if t is not None and t.dtype == torch.bool:
        value = to_bool(value)
    elif t is not None and t.dtype.is_floating_point:
        value = E.real(float(E.as_number(value) or 0.0))
    return E.where(E.and_(*conditions), inside, value)


def _gather_rows(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Advanced indexing with broadcast integer tensors in adjacent positions, each proved to be non-negative."""
    src, places = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(src, fx.Node)
    used = [i for i, x in enumerate(places) if x is not None]
    tensors = [places[i] for i in used]
    if any(not isinstance(t, fx.Node) or tensor_of(t) is None or tensor_of(t).dtype == torch.bool for t in tensors):  # type: ignore[union-attr]
        return None
    if used != list(range(used[0], used[-1] + 1)):
        return None
    rank = max(len(shape(t)) for t in tensors)
    head = index[used[0] : used[0] + rank]
    picked = [to_int(p.operand(t, head)) for t in tensors]
    if any(x is None or not E.nonneg(x) for x in picked):
        return None
    whole = [x for x in picked if x is not None]
    return p._value(src, (*index[: used[0]], *whole, *index[used[0] + rank :]))


def _index_select(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, d, places = node.args
    assert isinstance(src, fx.Node) and isinstance(d, int)
    d %= len(index)
    at = to_int(p.operand(places, (index[d],)))
    if at is None or not E.nonneg(at):
        return None
    return p._value(src, (*index[:d], at, *index[d + 1 :]))


def _cumsum(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Sum a value that does not change along the axis; anything else stays opaque."""
    src, d = node.args[0], argument(node, 1, "dim")
    assert isinstance(src, fx.Node)
    x = p.operand(src, index)
    n = to_int(x)
    along = {g.key for g in E.indices(Expr("t", index[d % len(index)]))}
    if n is None or E.loads(x) or any(g.key in along for g in E.indices(x)):
        return None
    return E.mul(n, E.add(index[d % len(index)], ONE))


def _diff(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, d = node.args[0], argument(node, 2, "dim", -1) % len(index)
    prepend = argument(node, 3, "prepend")
    assert isinstance(src, fx.Node)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        return None
    here, before = index[d], E.sub(index[d], ONE)
    if prepend is None:
        first = p._value(src, index)
        second = p._value(src, (*index[:d], E.add(here, ONE), *index[d + 1 :]))
        return arithmetic("sub", second, first)
    if shape(prepend)[d] != ONE:
        return None
    start = p._value(prepend, (*index[:d], ZERO, *index[d + 1 :]))
    last = E.where(E.le0(here), start, p._value(src, (*index[:d], before, *index[d + 1 :])))
    return arithmetic("sub", p._value(src, index), last)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("_to_copy", "to", "type_as", "_to_dense"), _cast),
    **{n: _binary(n) for n in ("add", "sub", "mul", "rsub")},
    **dict.fromkeys(("div", "floor_divide", "true_divide"), _div),
    **dict.fromkeys(("remainder", "fmod"), _remainder),
    **{n: _comparison(n) for n in ("le", "lt", "ge", "gt", "eq", "ne")},
    **dict.fromkeys(("bitwise_and", "logical_and", "__and__"), _logic("and")),
    **dict.fromkeys(("bitwise_or", "logical_or", "__or__"), _logic("or")),
    **dict.fromkeys(("bitwise_xor", "logical_xor", "__xor__"), _logic("xor")),
    **dict.fromkeys(("bitwise_not", "logical_not"), _logic("not")),
    "neg": _unary("neg"),
    "exp": _unary("exp", math.exp),
    "log": _unary("log", lambda x: math.log(x) if x > 0 else math.nan),
    "sqrt": _unary("sqrt", lambda x: math.sqrt(x) if x >= 0 else math.nan),
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
    "pad": lambda p, n, i: _pad(p, n, i) if argument(n, 2, "mode", "constant") == "constant" and argument(n, 3, "value") is None else None,
    "index": _gather_rows,
    "index_select": _index_select,
    "cumsum": _cumsum,
    "diff": _diff,
}
