"""Anchors spelled out: ``e = exp(s)`` divided by its sum over an axis, now or after the value contraction.

``exp(s - m) / sum(exp(s - m)) == softmax(s)`` for any ``m`` that does not change along the summed axis, so a
row maximum in front of the exponential is no part of the meaning. ``e / (c + sum e)`` is softmax with a sink
of logit ``log c``; there a row maximum would change the value, and is peeled only where ``c`` is ``exp(-m)``.
Where the row's greatest exponential is 1, the sum is at least 1: a lower bound of at most 1 changes nothing,
nor does a constant below half a rounding unit. Source: forms/dense_variants, sections 1.1 and 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from attnc.expr import ZERO, indices
from attnc.ir import Softmax
from attnc.passes.detect.env import step_into
from attnc.passes.detect.graph import (
    argument,
    base_name,
    normal_dims,
    op_name,
    ratio_of_numbers,
    shape,
    tensor_of,
    users,
)
from attnc.passes.detect.norms.anchor import Anchor, anywhere, divisor_of, source_of, without_maximum
from attnc.passes.detect.views import At


def find(graph: fx.Graph) -> list[Anchor]:
    """Return the anchors of ``graph`` in node order."""
    return [a for node in graph.nodes if base_name(node) == "exp" for a in _of_exp(node)]


@dataclass(frozen=True, slots=True)
class _Sum:
    """A row's sum of exponentials of ``scores``: the node that divides, what lies before it, its sink.

    ``bare`` is that of the ``Anchor``.
    """

    node: fx.Node
    scores: fx.Node
    sink: float | None
    inner: tuple[fx.Node, ...]
    bare: bool = True


def _of_exp(exp: fx.Node) -> list[Anchor]:
    src = exp.args[0]
    if not isinstance(src, fx.Node) or tensor_of(src) is None:
        return []
    out = []
    for total in users(exp):
        dims = argument(total, 1, "dim") if op_name(total) == "sum.dim_IntList" else None
        if not dims or len(dims) != 1:
            continue
        dim = normal_dims(dims, len(shape(exp)))[0]
        for whole in _sums(src, total, dim):
            inner = (*whole.inner, exp)
            early = [(u, path) for u in users(exp) if (path := _divides(u, exp, whole.node, dim)) is not None]
            norm, bare = Softmax(whole.sink), whole.bare
            if early:
                division, between = early[0]
                nodes = (*inner, total, whole.node, *between, division)
                out.append(Anchor(division, whole.scores, dim, norm, nodes, bare=bare))
            else:
                out.append(Anchor(exp, whole.scores, dim, norm, inner, whole.node, bare=bare))
    return out


def _sums(src: fx.Node, total: fx.Node, dim: int) -> list[_Sum]:
    """Return what ``total``, the sum of ``exp(src)``, may divide as: itself, bounded, or with a sink."""
    scores, peeled, own = without_maximum(src, dim)
    out: list[_Sum] = []
    edited = False
    for u in users(total):
        if base_name(u) in ("clamp", "clamp_min") and own:
            edited, low = True, ratio_of_numbers(argument(u, 1, "min"))
            if low is not None and low <= 1 and argument(u, 2, "max") is None:
                out.append(_Sum(u, scores, None, peeled, bare=False))
        if base_name(u) != "add" or argument(u, 2, "alpha", 1) != 1:
            continue
        other = u.args[1] if u.args[0] is total else u.args[0]
        n, t = ratio_of_numbers(other), tensor_of(total)
        assert t is not None, "a sum is a tensor"
        edited = edited or n is not None
        if n is not None and own and 0 <= n <= torch.finfo(t.dtype).eps / 2:
            out.append(_Sum(u, scores, None, peeled, bare=False))
        elif n is not None and n > 0 and scores is src:
            out.append(_Sum(u, scores, math.log(n), ()))
        elif (shifted := _one_at_the_shift(src, u, other, dim)) is not None:
            edited = True
            out.append(_Sum(u, shifted[0], 0.0, shifted[1]))
    return out if edited else [_Sum(total, scores, None, peeled, bare=not own)]


def _one_at_the_shift(
    src: fx.Node, plus: fx.Node, other: object, dim: int
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Return ``s`` and the nodes passed where ``src`` is ``s - m`` and ``other`` is ``exp(-m)``.

    ``plus`` is the node that adds the latter to a row's sum.  ``m``
    must be the same along the normalized axis; which value it has does not matter.
    """
    if base_name(src) != "sub" or argument(src, 2, "alpha", 1) != 1 or not isinstance(other, fx.Node):
        return None
    s, m = src.args[:2]
    if not isinstance(s, fx.Node) or not isinstance(m, fx.Node) or tensor_of(m) is None:
        return None
    row = anywhere(src)
    along = set(indices(row[dim]))
    kept = len(shape(plus)) == len(row)
    of_sum = (*row[:dim], *((ZERO,) if kept else ()), *row[dim + 1 :])
    one, passed = source_of(step_into(At(plus, of_sum), other))
    less = one.node.args[0] if base_name(one.node) == "exp" else None
    if not isinstance(less, fx.Node) or base_name(less) != "neg":
        return None
    here, by_score = source_of(step_into(At(src, row), m))
    there, by_one = source_of(step_into(At(less, one.index), less.args[0]))
    if here != there or any(along & set(indices(x)) for x in here.index) or shape(s) != shape(src):
        return None
    return s, (src, *passed, one.node, less, *by_score, *by_one)


def _divides(node: fx.Node, exp: fx.Node, denominator: fx.Node, dim: int) -> tuple[fx.Node, ...] | None:
    """Return the nodes between sum and division, None unless ``node`` divides by the row's own sum."""
    if shape(node) != shape(exp):
        return None
    row = anywhere(node)
    divisor = divisor_of(node, exp, row)
    if divisor is None:
        return None
    found, passed = divisor
    kept = len(shape(denominator)) == len(row)
    wanted = (*row[:dim], *((ZERO,) if kept else ()), *row[dim + 1 :])
    return passed if found.node is denominator and found.index == wanted else None
