"""Where an element of a canonical operand lives in the tensor that its recipe starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.detect.graph import shape
from attnc.passes.detect.layout import Recipe
from attnc.passes.detect.views import At, Index, reshape

FEATURE = "f"
"""Name of the index variable along the features."""


def place(recipe: Recipe, source: fx.Node) -> At | None:
    """Return element (b, h, position, f) of the operand as an element of ``source``.

    None if an axis has no name there or the sizes do not fit.
    """
    sizes = [shape(source)]
    for name, arg in recipe.steps:
        sizes.append(_shape_after(name, arg, sizes[-1]))
    if len(sizes[-1]) != 4:
        return None
    names = ("b", "h", "s", FEATURE)
    index: Index | None = tuple(
        ZERO if n == ONE else E.index(x, n) for x, n in zip(names, sizes[-1], strict=True)
    )
    for (name, arg), before, after in zip(reversed(recipe.steps), sizes[-2::-1], sizes[:0:-1], strict=True):
        index = None if index is None else _before(name, arg, index, before, after)
    return None if index is None else At(source, index)


def feature_of(at: At) -> Expr | None:
    """Return the index variable along the features that occurs in an element's index."""
    used = (g for x in at.index for g in E.indices(x))
    return next((g for g in used if g.args[0] == FEATURE), None)


def _shape_after(name: str, arg: Sequence[Any], sizes: Sequence[Expr]) -> tuple[Expr, ...]:
    if name == "permute":
        return tuple(sizes[a] for a in arg)
    if name == "select":
        return (*sizes[: arg[0]], *sizes[arg[0] + 1 :])
    if name == "slice":
        axis, start, end = arg
        return (*sizes[:axis], E.sub(end, start), *sizes[axis + 1 :])
    return tuple(arg)


def _before(
    name: str, arg: Sequence[Any], index: Index, before: Sequence[Expr], after: Sequence[Expr]
) -> Index | None:
    """Return the index in front of one step for an index behind it."""
    if name == "permute":
        out = [ZERO] * len(index)
        for position, axis in enumerate(arg):
            out[axis] = index[position]
        return tuple(out)
    if name == "select":
        return (*index[: arg[0]], arg[1], *index[arg[0] :])
    if name == "slice":
        axis, start = arg[:2]
        return (*index[:axis], E.add(index[axis], start), *index[axis + 1 :])
    if name == "expand":
        return tuple(ZERO if n == ONE else x for x, n in zip(index, before, strict=True))
    return reshape(index, after, before)
