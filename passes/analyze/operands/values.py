"""Follow an operand's element back through rotations: complex numbers, cosines, writes into slices.

The evaluator of masks (``detect.pull``) with three additions.  A complex element is a pair of real ones, so
that a complex product is four real products; ``cos`` and ``sin`` keep their angle; and a tensor that is
divided by a size of its own row is where the way ends, because that is a norm (see ``norms``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.analyze.operands.norms import is_normalized
from attnc.passes.detect.arithmetic import arithmetic, to_int
from attnc.passes.detect.graph import argument, base_name, op_name, shape, tensor_of
from attnc.passes.detect.pull import Puller, leaf
from attnc.passes.detect.pull_rules import RULES
from attnc.passes.detect.views import At, Index, broadcast, stepped


class Values(Puller):
    """Evaluate elements of operands; numbers in tables stay reads of the table, so that all look alike."""

    def __init__(self, graph: fx.Graph, constants: Mapping[str, torch.Tensor | None], limit: int) -> None:
        super().__init__(constants, limit)
        self._same = equal_nodes(graph)

    def _compute(self, at: At) -> Expr:
        at = At(self._same.get(at.node, at.node), at.index)
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

    def arm(self, node: fx.Node, index: Index) -> Expr:
        """Return the value of an arm; which arm it is, is decided feature by feature later."""
        return self.at(node, index)

    def _constant(self, at: At) -> Expr | None:
        t = tensor_of(at.node)
        return None if t is None or t.dtype.is_floating_point or t.dtype.is_complex else super()._constant(at)


def equal_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return, for each node that computes what an earlier one does, the first such node.

    Angles that are computed once for the cosine and again for the sine are the same angles.
    """
    first: dict[str, fx.Node] = {}
    out: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: out.get(n, n))
        kept = first.setdefault(f"{op_name(node)} {args} {kwargs}", node)
        if kept is not node:
            out[node] = kept
    return out


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
    if t is None or not t.dtype.is_complex or any(isinstance(a, complex) for a in node.args):
        return None
    x, y = (p.operand(a, index) for a in node.args[:2])
    a, b = parts(x), parts(y)
    if a is None or b is None:
        both, factor = (a, y) if b is None else (b, x)
        return None if both is None else pair(*(arithmetic("mul", e, factor) for e in both))
    re = arithmetic("sub", arithmetic("mul", a[0], b[0]), arithmetic("mul", a[1], b[1]))
    im = arithmetic("add", arithmetic("mul", a[0], b[1]), arithmetic("mul", a[1], b[0]))
    return pair(re, im)


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


def _stack(p: Values, node: fx.Node, index: Index) -> Expr | None:
    tensors, d = argument(node, 0, "tensors"), argument(node, 1, "dim", 0) % len(index)
    rest = (*index[:d], *index[d + 1 :])
    out = p.at(tensors[-1], rest)
    for i, t in reversed(list(enumerate(tensors[:-1]))):
        out = E.where(E.eq0(E.sub(index[d], E.integer(i))), p.at(t, rest), out)
    return out


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
    "stack": _stack,
    "embedding": _embedding,
    "gather": _gather,
}
