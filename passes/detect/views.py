"""Index maps of view-like ops: "what is this element?" asked of the input instead of the output.

Every function takes the index of an element of the op's output and returns where that element lives in the
op's input. With that, layouts, packed projections, grouped heads and windows need no patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.expr import ONE, ZERO, Expr, add, as_int, exact_div, floordiv, integer, mod, mul, nonneg, sub
from attnc.passes.detect.graph import (
    argument,
    base_name,
    normal_dims,
    op_name,
    ratio_of_numbers,
    shape,
    strides,
    tensor_of,
)
from attnc.sizes import dim

Index = tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class At:
    """One element of a node's value: ``index`` has one polynomial per axis."""

    node: fx.Node
    index: Index


def view(at: At) -> tuple[At, bool] | None:
    """Return the element of the input that ``at`` reads, and whether the op repeats elements.

    None if it is no view.
    """
    rule = _RULES.get(base_name(at.node))
    if rule is None or op_name(at.node) in _OTHER_BITS:
        return None
    src = at.node.args[0] if at.node.args else at.node.kwargs.get("self")
    if not isinstance(src, fx.Node) or tensor_of(src) is None:
        return None
    out = rule(at.node, src, at.index)
    return (
        None
        if out is None
        else (At(src, out), base_name(at.node) in _REPEATS and shape(src) != shape(at.node))
    )


def broadcast(index: Sequence[Expr], src: fx.Node) -> Index:
    """Return the index into ``src`` when its value is broadcast to a result indexed by ``index``."""
    sizes = shape(src)
    tail = tuple(index)[len(index) - len(sizes) :] if sizes else ()
    return tuple(ZERO if n == ONE else i for i, n in zip(tail, sizes, strict=True))


def reshape(index: Index, to: Sequence[Expr], frm: Sequence[Expr]) -> Index | None:
    """Map an index of shape ``to`` to one of shape ``frm`` with the same elements in row-major order.

    The axes are cut into the shortest runs with equal products, so indices of untouched axes pass as they
    are.
    """
    out: list[Expr] = []
    i = j = 0
    while i < len(frm) or j < len(to):
        run = _run(frm, to, i, j)
        if run is None:
            return None
        a, b = run
        out += _within(index[j:b], to[j:b], frm[i:a])
        i, j = a, b
    return tuple(out)


def _run(frm: Sequence[Expr], to: Sequence[Expr], i: int, j: int) -> tuple[int, int] | None:
    """Return the ends of the next run: the least axes of both shapes with equal products."""
    if i < len(frm) and frm[i] == ONE:
        return i + 1, j
    if j < len(to) and to[j] == ONE:
        return i, j + 1
    if i >= len(frm) or j >= len(to):
        return None
    a, b = i + 1, j + 1
    left, right = frm[i], to[j]
    while left != right:
        if b < len(to) and (exact_div(left, right) is not None or a >= len(frm)):
            right, b = mul(right, to[b]), b + 1
        elif a < len(frm):
            left, a = mul(left, frm[a]), a + 1
        else:
            return None
    return a, b


def _within(index: Sequence[Expr], to: Sequence[Expr], frm: Sequence[Expr]) -> list[Expr]:
    if len(frm) == 1 and len(to) == 1:
        return [index[0]]
    if not to:
        return [ZERO] * len(frm)
    flat = add(*(mul(x, s) for x, s in zip(index, strides(to), strict=True)))
    if len(frm) == 1:
        return [flat]
    out = []
    for axis, (n, s) in enumerate(zip(frm, strides(frm), strict=True)):
        digit = floordiv(flat, s)
        out.append(ZERO if n == ONE else digit if axis == 0 else mod(digit, n))
    return out


# ---------------------------------------------------------------- rules


def _same(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    return index


def _reshape(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    return reshape(index, shape(node), shape(src))


def _permute(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    out = [ZERO] * len(index)
    for position, axis in enumerate(_order(node, len(index))):
        out[axis] = index[position]
    return tuple(out)


def _order(node: fx.Node, rank: int) -> tuple[int, ...]:
    """Return which axis of the input each axis of the result is."""
    name = base_name(node)
    if name == "permute":
        return normal_dims(argument(node, 1, "dims"), rank)
    if name in ("movedim", "moveaxis"):
        return _moved(node, rank)
    if name == "numpy_T":
        return tuple(reversed(range(rank)))
    pair: tuple[Any, Any] = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
    a, b = (0, 1) if name == "t" else (-2, -1) if name == "mT" else pair
    order = list(range(rank))
    if rank >= 2:
        order[a], order[b] = order[b], order[a]
    return tuple(order)


def inserted_axes(node: fx.Node) -> frozenset[int]:
    """Return which axes of a tensor an ``unsqueeze`` made, as far as views in front of it show."""
    axes = {d: d for d in range(len(shape(node)))}  # of ``node``, by axis of the view at hand
    made: set[int] = set()
    while isinstance(src := node.args[0] if node.args else None, fx.Node) and tensor_of(src) is not None:
        name, rank = base_name(node), len(shape(node))
        if name == "unsqueeze":
            d = argument(node, 1, "dim") % rank
            made.add(axes.pop(d))
            axes = {i - (i > d): axis for i, axis in axes.items()}
        elif _RULES.get(name) is _permute:
            order = _order(node, rank)
            axes = {order[i]: axis for i, axis in axes.items()}
        elif _RULES.get(name) not in (_same, _slice, _cast):
            break
        node = src
    return frozenset(made)


def _moved(node: fx.Node, rank: int) -> tuple[int, ...]:
    source = normal_dims(argument(node, 1, "source"), rank)
    target = normal_dims(argument(node, 2, "destination"), rank)
    order: list[int] = [d for d in range(rank) if d not in source]
    for at, axis in sorted(zip(target, source, strict=True)):
        order.insert(at, axis)
    return tuple(order)


def _unsqueeze(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    d = argument(node, 1, "dim") % len(index)
    return index[:d] + index[d + 1 :]


def _expand(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    return broadcast(index, src)


def _number_or_node(x: Any) -> Expr | None:
    if isinstance(x, int):
        return integer(x)
    if isinstance(x, fx.Node) and x.meta.get("val") is not None and tensor_of(x) is None:
        return dim(x.meta["val"])
    return None


_FAR = 2**62  # what torch writes for "to the end"


def _slice(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    d = argument(node, 1, "dim", 0) % len(index)
    start, step = _number_or_node(argument(node, 2, "start") or 0), argument(node, 4, "step", 1)
    if start is None or not isinstance(step, int):
        return None
    end = argument(node, 3, "end")
    to_the_end = (
        end is None or (isinstance(end, int) and end >= _FAR) or _number_or_node(end) == shape(src)[d]
    )
    if not nonneg(start) and to_the_end and step == 1:
        start = sub(shape(src)[d], shape(node)[d])
    elif not nonneg(start):
        start = _from_the_start(start, shape(src)[d])
        start = start if start is not None and nonneg(start) else None  # else torch cuts it off at 0
    return None if start is None else (*index[:d], add(start, mul(index[d], integer(step))), *index[d + 1 :])


def _from_the_start(at: Expr, n: Expr) -> Expr | None:
    """Return a position in an axis of ``n`` elements, counted from its start; None if unsure.

    A negative position counts from the end, and is cut off at the start.
    """
    if nonneg(at):
        return at
    if as_int(at) is None:
        return None
    at = add(at, n)
    number = as_int(at)
    return at if number is None or number >= 0 else ZERO


def _narrow(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    d = argument(node, 1, "dim") % len(index)
    start = _number_or_node(argument(node, 2, "start"))
    start = None if start is None else _from_the_start(start, shape(src)[d])
    return None if start is None else (*index[:d], add(index[d], start), *index[d + 1 :])


def _select(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    sizes = shape(src)
    d = argument(node, 1, "dim") % len(sizes)
    at = _number_or_node(argument(node, 2, "index"))
    at = None if at is None else _from_the_start(at, sizes[d])
    return None if at is None else (*index[:d], at, *index[d:])


def _repeat(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    sizes = shape(src)
    tail = index[len(index) - len(sizes) :]
    repeated = shape(node)[len(index) - len(sizes) :]
    return tuple(i if n == m else mod(i, n) for i, n, m in zip(tail, sizes, repeated, strict=True))


def _repeat_interleave(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    times, d = argument(node, 1, "repeats"), argument(node, 2, "dim")
    n = ratio_of_numbers(times)
    d = 0 if d is None and len(shape(src)) == 1 else d
    if op_name(node) != "repeat_interleave.self_int" or n is None or not isinstance(d, int):
        return None
    d %= len(index)
    return (*index[:d], floordiv(index[d], integer(int(n))), *index[d + 1 :])


def _dropout(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    return index if argument(node, 2, "train") is False or argument(node, 1, "p") == 0 else None


def _cast(node: fx.Node, src: fx.Node, index: Index) -> Index | None:
    """Follow a cast that changes nothing."""
    here, there = tensor_of(node), tensor_of(src)
    same = here is not None and there is not None and (here.dtype, here.device) == (there.dtype, there.device)
    return index if same else None


_Rule = Callable[[fx.Node, fx.Node, Index], Index | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "lift"), _same
    ),
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "view_copy",
            "view_as",
            "reshape_as",
            "ravel",
        ),
        _reshape,
    ),
    **dict.fromkeys(
        ("permute", "transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "movedim", "moveaxis"),
        _permute,
    ),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "dropout": _dropout,
}
_OTHER_BITS = frozenset({"view.dtype", "view_copy.dtype"})
_REPEATS = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave"})


def piece(at: At) -> At | None:
    """Return the element of the tensor that ``at`` reads a part of, by split, chunk or unbind."""
    if op_name(at.node) != "py.getitem":
        return None
    whole, position = at.node.args
    if not isinstance(whole, fx.Node) or not isinstance(position, int) or position < 0:
        return None
    name = base_name(whole)
    src = whole.args[0] if whole.args else None
    if not isinstance(src, fx.Node) or tensor_of(src) is None:
        return None
    rank = len(shape(src))
    if name == "unbind":
        d = argument(whole, 1, "dim", 0) % rank
        return At(src, (*at.index[:d], integer(position), *at.index[d:]))
    if name in ("split", "split_with_sizes", "chunk"):
        d = argument(whole, 2, "dim", 0) % rank
        parts = whole.meta["val"][:position]
        start = add(ZERO, *(dim(p.shape[d]) for p in parts))
        return At(src, (*at.index[:d], add(at.index[d], start), *at.index[d + 1 :]))
    return None


def stepped(at: At) -> tuple[At, bool] | None:
    """Follow one view or one piece; the flag says that elements repeat."""
    part = piece(at)
    return (part, False) if part is not None else view(at)


def moves(node: fx.Node) -> bool:
    """Say whether the node is a view or copy that holds every element of its first argument once."""
    return _RULES.get(base_name(node)) in (_reshape, _unsqueeze, _permute, _same) and (
        op_name(node) not in _OTHER_BITS and isinstance(node.args[0] if node.args else None, fx.Node)
    )


def forward(node: fx.Node, index: Index) -> Index | None:
    """Return where element ``index`` of the input is in a node that ``moves`` elements, None if unsure."""
    rule, src = _RULES[base_name(node)], node.args[0]
    assert isinstance(src, fx.Node), "a view has an input"
    if rule in (_reshape, _unsqueeze):
        return reshape(index, shape(src), shape(node))
    return index if rule is _same else tuple(index[axis] for axis in _order(node, len(index)))
