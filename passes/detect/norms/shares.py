"""Weights divided by their row's sum, now or after the value contraction: ``w / w.sum(-1, keepdim=True)``.

What keeps the divisor from being zero is part of it: a constant that is added, a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnc.expr import ZERO
from attnc.passes.detect.graph import (
    argument,
    base_name,
    inputs,
    normal_dims,
    op_name,
    ratio_of_numbers,
    shape,
    users,
)
from attnc.passes.detect.norms.anchor import anywhere, divisor_of


@dataclass(frozen=True, slots=True)
class Share:
    """``weights / max(sum of summed + added, least)``; ``denominator`` is what divides, None if it has.

    ``passed`` are the nodes between.
    """

    weights: fx.Node
    summed: fx.Node
    added: float
    least: float
    denominator: fx.Node | None
    passed: tuple[fx.Node, ...]


def early(node: fx.Node, dim: int) -> Share | None:
    """Return the share that ``node`` is, divided by a sum over axis ``dim`` of its own row."""
    row = anywhere(node)
    for weights in inputs(node):
        found = divisor_of(node, weights, row) if shape(weights) == shape(node) else None
        total = None if found is None else _total(found[0].node, dim, len(row))
        if found is None or total is None:
            continue
        kept = len(shape(found[0].node)) == len(row)
        if found[0].index == (*row[:dim], *((ZERO,) if kept else ()), *row[dim + 1 :]):
            summed, added, least, passed = total
            return Share(weights, summed, added, least, None, (*found[1], *passed))
    return None


def late(node: fx.Node, dim: int) -> Iterator[Share]:
    """Yield the shares that ``node`` may become once its contraction is divided by a sum of its rows."""
    for total in users(node):
        for whole in (total, *(u for u in users(total)), *(w for u in users(total) for w in users(u))):
            found = _total(whole, dim, len(shape(node)))
            if found is not None and found[0] is node:
                yield Share(node, node, found[1], found[2], whole, found[3])


def _total(node: fx.Node, dim: int, rank: int) -> tuple[fx.Node, float, float, tuple[fx.Node, ...]] | None:
    """Return what ``node`` sums over axis ``dim``, what is added, the lower bound, and the nodes passed."""
    passed, added, least = [node], 0.0, -math.inf
    if base_name(node) in ("clamp", "clamp_min") and isinstance(node.args[0], fx.Node):
        low = ratio_of_numbers(argument(node, 1, "min"))
        if low is None or (base_name(node) == "clamp" and argument(node, 2, "max") is not None):
            return None
        node, least = node.args[0], low
        passed.append(node)
    if base_name(node) == "add" and argument(node, 2, "alpha", 1) == 1:
        a, b = node.args[:2]
        term, number = (a, ratio_of_numbers(b)) if isinstance(a, fx.Node) else (b, ratio_of_numbers(a))
        if number is None or not isinstance(term, fx.Node):
            return None
        node, added = term, number
        passed.append(node)
    dims = argument(node, 1, "dim") if op_name(node) == "sum.dim_IntList" else None
    summed = node.args[0] if node.args else None
    if not dims or not isinstance(summed, fx.Node) or len(shape(summed)) != rank:
        return None
    return (summed, added, least, tuple(passed)) if normal_dims(dims, rank) == (dim,) else None
