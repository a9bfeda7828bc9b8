"""Operators that move, cut, join and pick elements."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.reading.attributes import axes_of, ints, number
from attnc.codegen.onnx.reading.reader import Reader, UnreadError, is_one, same

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
Rule = Callable[["Reader", "ir.Node"], "fx.Node | list[fx.Node]"]
_TO_THE_END = 2**63 - 1
_FAR = 2**31 - 1


def _sizes(x: fx.Node) -> list[Any]:
    return list(x.meta["val"].shape)


def _transpose(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    return r.call(aten.permute.default, x, ints(n, "perm") or list(reversed(range(len(_sizes(x))))))


def _reshape(r: Reader, n: ir.Node) -> fx.Node:
    x, to = r.x(n, 0), r.arguments(n, 1)
    entry = r.entry(n, 1)
    assert entry is not None, "arguments() has read it"
    if not number(n, "allowzero", 0):
        zeros = [i for i, m in enumerate(to) if isinstance(m, int) and m == 0]
        for i in zeros:  # a size that is copied: a number, or the free one if all others are known
            size = _sizes(x)[i]
            to[i] = size if isinstance(size, int) else r.call(aten.sym_size.int, x, i)
    _require_as_many(r, _sizes(x), [m.meta["val"] if isinstance(m, fx.Node) else m for m in to])
    return r.call(aten.reshape.default, x, to)


def _require_as_many(r: Reader, before: Sequence[Any], after: Sequence[Any]) -> None:
    """See that a reshape whose sizes are all given keeps the number of elements.

    Where one symbol alone is left over on one side, it must be the number that the rest makes of it.
    """
    left, right = list(before), list(after)
    for n in before:
        other = next((m for m in right if same(n, m)), None)
        if other is not None:
            left.remove(n)
            right.remove(other)
    symbols = [n for n in (*left, *right) if not isinstance(n, int)]
    ours, theirs = (math.prod(n for n in side if isinstance(n, int)) for side in (left, right))
    if -1 in right or not ours or not theirs:
        return
    r.symbols.require_same_product(left, right)
    if len(symbols) != 1:
        return
    more, less = (theirs, ours) if symbols[0] in left else (ours, theirs)
    if more % less == 0:
        r.symbols.require_equal(symbols[0], more // less)


def _flatten(r: Reader, n: ir.Node) -> fx.Node:
    x, axis = r.x(n, 0), number(n, "axis", 1)
    rank = len(_sizes(x))
    axis = axis % rank if axis != rank else rank
    if axis == rank:
        return r.call(aten.reshape.default, x, [-1, 1])
    if all(isinstance(m, int) for m in _sizes(x)[axis:]):
        return r.call(aten.reshape.default, x, [-1, math.prod(_sizes(x)[axis:])])
    return r.call(aten.reshape.default, x, [_product(r, x, range(axis)), -1])


def _product(r: Reader, x: fx.Node, axes: Sequence[int]) -> int | fx.Node:
    """Return the product of some sizes of ``x`` as an argument."""
    out: int | fx.Node = 1
    for axis in axes:
        size = _sizes(x)[axis]
        factor = size if isinstance(size, int) else r.call(aten.sym_size.int, x, axis)
        out = factor if isinstance(out, int) and out == 1 else r.call(operator.mul, out, factor)
    return out


def _unsqueeze(r: Reader, n: ir.Node) -> fx.Node:
    x, axes = r.x(n, 0), axes_of(r, n, 13) or []
    rank = len(_sizes(x)) + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = r.call(aten.unsqueeze.default, x, axis)
    return x


def _squeeze(r: Reader, n: ir.Node) -> fx.Node:
    x, axes = r.x(n, 0), axes_of(r, n, 13)
    if axes is None:
        axes = [i for i, size in enumerate(_sizes(x)) if is_one(size)]
    if not axes:
        return x
    return r.call(aten.squeeze.dims, x, [a % len(_sizes(x)) for a in axes])


def _expand(r: Reader, n: ir.Node) -> fx.Node:
    x, to = r.x(n, 0), r.arguments(n, 1)
    entry = r.entry(n, 1)
    assert entry is not None, "arguments() has read it"
    assert entry.items is not None, "arguments() has read it"
    sizes = _sizes(x)
    to = [*([1] * (len(sizes) - len(to))), *to]
    wanted: list[Any] = [*([1] * (len(sizes) - entry.items.size)), *entry.items.flat]
    for i in range(1, len(sizes) + 1):
        if is_one(wanted[-i]) or same(sizes[-i], wanted[-i]):
            to[-i] = -1
        elif not is_one(sizes[-i]):
            r.symbols.require_equal(sizes[-i], wanted[-i])
    return r.call(aten.expand.default, x, to)


def _tile(r: Reader, n: ir.Node) -> fx.Node:
    return r.call(aten.repeat.default, r.x(n, 0), r.arguments(n, 1))


def _slice(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    if r.opset < 10:
        starts: Sequence[Any] = ints(n, "starts") or []
        ends: Sequence[Any] = ints(n, "ends") or []
        axes, steps = ints(n, "axes"), None
    else:
        starts, ends = r.arguments(n, 1), r.arguments(n, 2)
        axes, steps = r.numbers(n, 3), r.numbers(n, 4)
    axes = axes or list(range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        axis %= len(_sizes(x))
        if step < 0:
            x = _backwards(r, x, axis, start, end, step)
            continue
        end = _TO_THE_END if isinstance(end, int) and end >= _FAR else end
        for bound in (start, end):
            place = bound.meta["val"] if isinstance(bound, fx.Node) else bound
            if place != _TO_THE_END:
                r.symbols.assume_order(abs(place) if isinstance(place, int) else place, _sizes(x)[axis])
        x = r.call(aten.slice.Tensor, x, axis, start, end, step)
    return x


def _backwards(r: Reader, x: fx.Node, axis: int, start: Any, end: Any, step: int) -> fx.Node:
    whole = start == -1 or (isinstance(start, int) and start >= _FAR)
    if step != -1 or not whole or not isinstance(end, int) or end > -_FAR:
        raise UnreadError("a part is read backwards")
    return r.call(aten.flip.default, x, [axis])


def _split(r: Reader, n: ir.Node) -> list[fx.Node]:
    x, axis = r.x(n, 0), number(n, "axis", 0)
    axis %= len(_sizes(x))
    parts = (r.numbers(n, 1) if r.opset >= 13 else ints(n, "split")) or []
    if not parts:
        size, count = _sizes(x)[axis], len(n.outputs)
        if not isinstance(size, int):
            raise UnreadError("an axis of symbolic size is cut into equal parts")
        each = -(-size // count)
        parts = [min(each, size - i * each) for i in range(count)]
    starts = [sum(parts[:i]) for i in range(len(parts))]
    return [r.call(aten.slice.Tensor, x, axis, s, s + m) for s, m in zip(starts, parts, strict=True)]


def _concat(r: Reader, n: ir.Node) -> fx.Node:
    xs = [r.x(n, i) for i in range(len(n.inputs))]
    axis = number(n, "axis", 1) % len(_sizes(xs[0]))
    for x in xs[1:]:
        for i, (a, b) in enumerate(zip(_sizes(xs[0]), _sizes(x), strict=True)):
            if i != axis and not same(a, b):
                r.symbols.require_equal(a, b)
    return xs[0] if len(xs) == 1 else r.call(aten.cat.default, xs, axis)


def _gather(r: Reader, n: ir.Node) -> fx.Node:
    x, axis = r.x(n, 0), number(n, "axis", 0)
    axis %= len(_sizes(x))
    places = r.entry(n, 1)
    assert places is not None, "Gather has two inputs"
    if places.items is not None and places.items.ndim == 0:
        return r.call(aten.select.int, x, axis, r.argument(places.items.flat[0], places, 0))
    where: list[fx.Node | None] = [None] * axis
    return r.call(aten.index.Tensor, x, [*where, r.x(n, 1)])


def _gather_elements(r: Reader, n: ir.Node) -> fx.Node:
    return r.call(aten.gather.default, r.x(n, 0), number(n, "axis", 0), r.x(n, 1))


def _gather_nd(r: Reader, n: ir.Node) -> fx.Node:
    """Read an index of several axes at once: the last axis of the places counts the axes."""
    x, places = r.x(n, 0), r.x(n, 1)
    count = _sizes(places)[-1]
    if number(n, "batch_dims", 0) or not isinstance(count, int):
        raise UnreadError("it indexes in batches, or a number of axes that is not known")
    parts = [r.call(aten.select.int, places, -1, i) for i in range(count)]
    return r.call(aten.index.Tensor, x, parts)


def _trilu(r: Reader, n: ir.Node) -> fx.Node:
    k = r.scalar(n, 1) if r.entry(n, 1) is not None else 0
    if k is None:
        raise UnreadError("its diagonal is no number or size")
    return r.call(aten.triu.default if number(n, "upper", 1) else aten.tril.default, r.x(n, 0), k)


def _cumsum(r: Reader, n: ir.Node) -> fx.Node:
    axis = r.numbers(n, 1)
    if axis is None or number(n, "exclusive", 0) or number(n, "reverse", 0):
        raise UnreadError("a sum that leaves its own element out, or runs backwards, is not read")
    x = r.x(n, 0)
    return r.call(aten.cumsum.default, x, axis[0], dtype=x.meta["val"].dtype)


def _pad(r: Reader, n: ir.Node) -> fx.Node:
    x = r.x(n, 0)
    pads = r.arguments(n, 1) if r.opset >= 11 else (ints(n, "pads") or [])
    if number(n, "mode", "constant") != "constant" or r.entry(n, 3) is not None:
        raise UnreadError("it pads with more than a constant, or some axes alone")
    fill = r.scalar(n, 2) if r.opset >= 11 else number(n, "value", 0.0)
    rank = len(_sizes(x))
    ours = [p for d in reversed(range(rank)) for p in (pads[d], pads[rank + d])]
    while ours and ours[-2:] == [0, 0]:
        del ours[-2:]
    if fill is not None and not isinstance(fill, int | float):
        raise UnreadError("it pads with a size")
    return r.pad(x, ours, 0 if fill is None else fill) if ours else x


RULES: dict[str, Rule] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Trilu": _trilu,
    "CumSum": _cumsum,
    "Pad": _pad,
}
