"""Which element of which input an op gives: concatenations, pads, written slices, gathers, running sums.

Such values are piecewise: ``where(index < c, a, b)``.  A rule gets the evaluator, the node and the index of
one element of the result; it returns the element's value or None, and then the element is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.detect.arithmetic import arithmetic, held, literal, to_bool, to_int
from attnc.passes.detect.graph import argument, base_name, shape, tensor_of
from attnc.passes.detect.views import Index, broadcast

if TYPE_CHECKING:
    from attnc.passes.detect.pull import Puller

_Rule = Callable[["Puller", fx.Node, Index], Expr | None]

STACKED = 8
"""How long an axis may be that is read element by element."""

# ---------------------------------------------------------------- parts put together


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
        out = x if out is None else either(inside, x, out)
    return out


def either(c: Expr, x: Expr, y: Expr) -> Expr:
    """Return ``x if c else y`` for two arms of one dtype, one of which may have been rounded to a float."""
    if E.is_int(x) != E.is_int(y) and not E.is_bool(x):
        x, y = (E.real(float(n)) if (n := E.as_int(v)) is not None else v for v in (x, y))
    return E.where(c, x, y)


def _stack(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    tensors, d = argument(node, 0, "tensors"), argument(node, 1, "dim", 0) % len(index)
    rest = (*index[:d], *index[d + 1 :])
    at = E.as_int(index[d])
    if at is not None:
        return p.at(tensors[at], rest)
    out = p.at(tensors[-1], rest)
    for i in reversed(range(len(tensors) - 1)):
        out = either(E.le0(E.sub(index[d], E.integer(i))), p.at(tensors[i], rest), out)
    return out


def _every(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Read ``all`` and ``any`` over one short axis, such as that of masks that were stacked."""
    src, d = node.args[0], argument(node, 1, "dim")
    if not isinstance(src, fx.Node) or not isinstance(d, int) or not shape(src):
        return None
    d %= len(shape(src))
    n = E.as_int(shape(src)[d])
    if n is None or n > STACKED:
        return None
    rest = index[d + 1 :] if argument(node, 2, "keepdim", False) else index[d:]
    each = [to_bool(p.at(src, (*index[:d], E.integer(i), *rest))) for i in range(n)]
    return E.and_(*each) if base_name(node) == "all" else E.or_(*each)


def _slice_scatter(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return the source inside of the slice that was written, and the input elsewhere."""
    base, src = node.args[:2]
    d, step = argument(node, 2, "dim", 0) % len(index), argument(node, 5, "step", 1)
    t, whole = tensor_of(node), shape(node)[d]
    assert isinstance(base, fx.Node), f"{node} writes into no tensor"
    start = _bound(p, argument(node, 3, "start"), ZERO, whole)
    end = _bound(p, argument(node, 4, "end"), whole, whole)
    if start is None or end is None or step != 1 or t is None:
        return None
    place = E.sub(index[d], start)
    conditions = [E.le0(E.neg(place))] if start != ZERO else []
    conditions += [E.le0(E.add(E.sub(index[d], end), ONE))] if end != whole else []
    local = ZERO if E.sub(end, start) == ONE else place
    return _written(p, node, E.and_(*conditions), src, (*index[:d], local, *index[d + 1 :]), index)


def _bound(p: Puller, x: Any, default: Expr, whole: Expr) -> Expr | None:
    """Return an end of a slice, counted from the start and within the axis; None if unsure."""
    if x is None or (isinstance(x, int) and x >= 2**62):
        return default
    at = to_int(p.operand(x, ()))
    if at is None:
        return None
    n = E.as_int(at)
    if n is not None and n < 0:
        at = E.add(at, whole)
    length, at_number = E.as_int(whole), E.as_int(at)
    if length is not None and at_number is not None:
        return E.integer(min(max(at_number, 0), length))
    if E.nonneg(at) and E.nonneg(E.sub(whole, at)):
        return at
    # A constant end may lie past a free length: indices are below that length, so the end is as good.
    return at if at_number is not None and at_number >= 0 and default != ZERO else None


def _select_scatter(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    d = argument(node, 2, "dim") % len(index)
    at = _bound(p, argument(node, 3, "index"), ZERO, shape(node)[d])
    if at is None:
        return None
    inside = E.eq0(E.sub(index[d], at))
    return _written(p, node, inside, node.args[1], (*index[:d], *index[d + 1 :]), index)


def _written(p: Puller, node: fx.Node, inside: Expr, src: Any, there: Index, index: Index) -> Expr | None:
    """Return the source's element ``there`` where it was written, and the base's elsewhere."""
    base, t = node.args[0], tensor_of(node)
    assert isinstance(base, fx.Node), f"{node} writes into no tensor"
    if inside == E.FALSE:
        return p.at(base, index)
    new = p.arm(src, broadcast(there, src)) if isinstance(src, fx.Node) else literal(src)
    kept = new if t is None else held(new, t.dtype)
    if kept is None:
        return None
    return kept if inside == E.TRUE else either(inside, kept, p.at(base, index))


def _copy(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    t, x = tensor_of(node), p.operand(node.args[1], index)
    return x if t is None else held(x if t.dtype.is_floating_point else (to_int(x) or x), t.dtype)


def _index_put(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Read ``x[condition] = value``, where the condition covers the first axes, for one number."""
    places, value, t = argument(node, 1, "indices"), argument(node, 2, "values"), tensor_of(node)
    condition = tensor_of(places[0]) if len(places) == 1 and isinstance(places[0], fx.Node) else None
    if condition is None or condition.dtype != torch.bool or t is None or argument(node, 3, "accumulate"):
        return None
    if any(n != ONE for n in shape(value)):
        return None
    inside = to_bool(p.at(places[0], index[: condition.dim()]))
    return _written(p, node, inside, value, (), index)


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
    return either(E.and_(*conditions), inside, to_bool(outside) if t.dtype == torch.bool else outside)


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


def _gather(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, d, places = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    d %= max(len(index), 1)
    at = to_int(p.at(places, index))
    if at is None or not index or not E.nonneg(at):
        return None
    return p.at(src, (*index[:d], at, *index[d + 1 :]))


def _flip(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, dims = node.args[0], {d % len(index) for d in argument(node, 1, "dims")}
    assert isinstance(src, fx.Node), f"{node} turns no tensor around"
    turned = (
        E.sub(E.sub(n, ONE), i) if d in dims and n != ONE else i
        for d, (i, n) in enumerate(zip(index, shape(src), strict=True))
    )
    return p.at(src, tuple(turned))


def _roll(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    src, shifts, dims = node.args[0], argument(node, 1, "shifts"), argument(node, 2, "dims", ())
    assert isinstance(src, fx.Node), f"{node} rolls no tensor"
    dims = dims or ((0,) if len(index) == 1 else ())
    if len(dims) != len(shifts):
        return None
    place = list(index)
    for d, shift in zip(dims, shifts, strict=True):
        by, n = to_int(p.operand(shift, ())), shape(src)[d]
        if by is None:
            return None
        place[d] = ZERO if n == ONE else E.mod(E.sub(index[d], by), n)
    return p.at(src, tuple(place))


def meshgrid(p: Puller, node: fx.Node, index: Index) -> Expr | None:
    """Return the element of one of the tensors that ``meshgrid`` gives: a row or a column, repeated."""
    whole, position = node.args[:2]
    if not isinstance(whole, fx.Node) or base_name(whole) != "meshgrid" or not isinstance(position, int):
        return None
    axis = position
    if argument(whole, 1, "indexing", "ij") == "xy" and position < 2:
        axis = 1 - position
    src = argument(whole, 0, "tensors")[position]
    return p.at(src, (index[axis],) if shape(src) and shape(src)[0] != ONE else (ZERO,) * len(shape(src)))


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
    last = either(E.le0(here), p.at(prepend, at(ZERO)), p.arm(src, at(E.sub(here, ONE))))
    return arithmetic("sub", p.at(src, index), last)


PLACES: dict[str, _Rule] = {
    "cat": _cat,
    "stack": _stack,
    "all": _every,
    "any": _every,
    "constant_pad_nd": _pad,
    "pad": _pad,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "copy": _copy,
    "index_put": _index_put,
    "index": _gather_rows,
    "index_select": _index_select,
    "gather": _gather,
    "flip": _flip,
    "roll": _roll,
    "py.getitem": meshgrid,
    "cumsum": _cumsum,
    "diff": _diff,
}
