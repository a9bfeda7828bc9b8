"""Follow an operand's element back through rotations: complex numbers, cosines, writes into slices.

The evaluator of masks (``detect.pull``) with three additions.  A complex element is a pair of real ones, so
that a complex product is four real products; ``cos`` and ``sin`` keep their angle; and a tensor that is
divided by a size of its own row is where the way ends, because that is a norm (see ``norms``).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.analyze.operands.norms import is_normalized
from attnc.passes.detect.arithmetic import arithmetic, to_int
from attnc.passes.detect.graph import argument, base_name, shape, tensor_of
from attnc.passes.detect.pull import Puller, leaf
from attnc.passes.detect.pull_rules import RULES
from attnc.passes.detect.views import At, Index, broadcast, stepped


class Values(Puller):
    """Evaluate elements of operands; numbers in tables stay reads of the table, so that all look alike."""

    def _compute(self, at: At) -> Expr:
        node, t = at.node, tensor_of(at.node)
        if t is None:
            return self._scalar(node)
        if is_normalized(at):
            return leaf(at)
        step = stepped(at)
        if step is not None:
            return self.at(step[0].node, step[0].index)
        rule = _RULES.get(base_name(node))
        out = rule(self, node, at.index) if rule is not None else None
        if out is not None:
            return out
        if not t.dtype.is_complex:
            return super()._compute(at)
        shared = RULES.get(base_name(node)) if base_name(node) in _MOVES else None
        out = shared(self, node, at.index) if shared is not None else None
        return out if out is not None else pair(E.call("real", leaf(at)), E.call("imag", leaf(at)))

    def _constant(self, at: At) -> Expr | None:
        t = tensor_of(at.node)
        return None if t is None or t.dtype.is_floating_point or t.dtype.is_complex else super()._constant(at)


_MOVES = ("cat", "index", "index_select", "where")
_Rule = Callable[[Values, fx.Node, Index], Expr | None]


def pair(re: Expr, im: Expr) -> Expr:
    """Return a complex element from its parts."""
    return E.call("complex", re, im)


def parts(e: Expr) -> tuple[Expr, Expr] | None:
    """Return the real and the imaginary part of an element, None if they are not known apart."""
    if e.op == "call" and e.args[0] == "complex":
        re, im = e.args[1]
        return re, im
    if e.op == "where":
        a, b = parts(e.args[1]), parts(e.args[2])
        if a is not None and b is not None:
            return E.where(e.args[0], a[0], b[0]), E.where(e.args[0], a[1], b[1])
    return None


def _call(name: str) -> _Rule:
    return lambda p, node, index: E.call(name, p.operand(node.args[0], index))


def _as_complex(p: Values, node: fx.Node, index: Index) -> Expr | None:
    src = node.args[0]
    assert isinstance(src, fx.Node), f"{node} views no tensor"
    return pair(p.at(src, (*index, ZERO)), p.at(src, (*index, ONE)))


def _as_real(p: Values, node: fx.Node, index: Index) -> Expr | None:
    src = node.args[0]
    assert isinstance(src, fx.Node), f"{node} views no tensor"
    both = parts(p.at(src, index[:-1]))
    return None if both is None else E.where(E.eq0(index[-1]), *both)


def _part(which: int) -> _Rule:
    def rule(p: Values, node: fx.Node, index: Index) -> Expr | None:
        both = parts(p.operand(node.args[0], index))
        return None if both is None else both[which]

    return rule


def _polar(p: Values, node: fx.Node, index: Index) -> Expr | None:
    r, angle = (p.operand(a, index) for a in node.args[:2])
    return pair(*(arithmetic("mul", r, E.call(f, angle)) for f in ("cos", "sin")))


def _complex(p: Values, node: fx.Node, index: Index) -> Expr | None:
    return pair(*(p.operand(a, index) for a in node.args[:2]))


def _conjugate(p: Values, node: fx.Node, index: Index) -> Expr | None:
    both = parts(p.operand(node.args[0], index))
    return None if both is None else pair(both[0], arithmetic("mul", both[1], E.real(-1.0)))


def _product(p: Values, node: fx.Node, index: Index) -> Expr | None:
    """Multiply out complex factors; products of real ones have a rule already."""
    t = tensor_of(node)
    if t is None or not t.dtype.is_complex or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    a, b = (_wide(p.operand(x, index)) for x in node.args[:2])
    re = arithmetic("sub", arithmetic("mul", a[0], b[0]), arithmetic("mul", a[1], b[1]))
    im = arithmetic("add", arithmetic("mul", a[0], b[1]), arithmetic("mul", a[1], b[0]))
    return pair(re, im)


def _wide(e: Expr) -> tuple[Expr, Expr]:
    return parts(e) or (e, E.real(0.0))


def _copy(p: Values, node: fx.Node, index: Index) -> Expr | None:
    return p.operand(node.args[1], index)


def _slice_scatter(p: Values, node: fx.Node, index: Index) -> Expr | None:
    """Read what was written into a slice, and what was there before everywhere else."""
    whole, src = node.args[:2]
    d = argument(node, 2, "dim", 0) % len(index)
    start, end, step = argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1)
    n = E.as_int(shape(node)[d])
    if n is None or not all(x is None or isinstance(x, int) for x in (start, end, step)):
        return None
    start, end, step = slice(start, end, step).indices(n)
    offset = E.sub(index[d], E.integer(start))
    inside = (
        E.le0(E.neg(offset)),
        E.le0(E.sub(index[d], E.integer(end - 1))),
        E.eq0(E.mod(offset, E.integer(step)) if step > 1 else ZERO),
    )
    assert isinstance(src, fx.Node), f"{node} writes no tensor"
    there = E.floordiv(offset, E.integer(step)) if step > 1 else offset
    there = ZERO if shape(src)[d] == ONE else there
    written = p.arm(src, (*index[:d], there, *index[d + 1 :]))
    return E.where(E.and_(*inside), written, p.operand(whole, index))


def _embedding(p: Values, node: fx.Node, index: Index) -> Expr | None:
    table, rows = node.args[:2]
    assert isinstance(table, fx.Node), f"{node} reads no table"
    at = to_int(p.operand(rows, index[:-1]))
    return None if at is None else p.at(table, (at, index[-1]))


def _gather(p: Values, node: fx.Node, index: Index) -> Expr | None:
    src, d, rows = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    d %= len(index)
    at = to_int(p.operand(rows, index))
    return None if at is None else p.at(src, broadcast((*index[:d], at, *index[d + 1 :]), src))


_RULES: dict[str, _Rule] = {
    "cos": _call("cos"),
    "sin": _call("sin"),
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
    "real": _part(0),
    "imag": _part(1),
    "polar": _polar,
    "complex": _complex,
    "_conj": _conjugate,
    "_conj_physical": _conjugate,
    "mul": _product,
    "copy": _copy,
    "slice_scatter": _slice_scatter,
    "embedding": _embedding,
    "gather": _gather,
}
