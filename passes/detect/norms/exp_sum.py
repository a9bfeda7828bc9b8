"""Anchors spelled out: ``e = exp(s)`` divided by its sum over an axis, now or after the value contraction.

``exp(s - m) / sum(exp(s - m)) == softmax(s)`` for any ``m`` that does not change along the summed axis, so a
row maximum in front of the exponential is no part of the meaning. ``e / (1 + sum e)`` is softmax with a sink
of logit 0; there the row maximum would change the value, and is not peeled. Source: forms/dense_variants,
sections 1.1 and 4.1.
"""

from __future__ import annotations

from torch import fx

from attnc.expr import ZERO
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
from attnc.passes.detect.norms.anchor import Anchor, anywhere, source_of, without_row_maximum
from attnc.passes.detect.views import At


def find(graph: fx.Graph) -> list[Anchor]:
    """Return the anchors of ``graph`` in node order."""
    return [a for node in graph.nodes if base_name(node) == "exp" for a in _of_exp(node)]


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
        for denominator, plus in _denominators(total):
            scores, peeled = without_row_maximum(src, dim)
            if plus not in (0.0, 1.0) or (plus == 1.0 and scores is not src):
                continue
            norm = Softmax(0.0 if plus == 1.0 else None)
            inner = (*peeled, exp)
            early = [
                (u, path) for u in users(exp) if (path := _divides(u, exp, denominator, dim)) is not None
            ]
            if early:
                (division, between), whole = early[0], (total, denominator)
                out.append(Anchor(division, scores, dim, norm, (*inner, *whole, *between, division)))
            else:
                out.append(Anchor(exp, scores, dim, norm, inner, denominator))
    return out


def _denominators(total: fx.Node) -> list[tuple[fx.Node, float]]:
    """Return the sum itself, or the sums of it and a constant."""
    plus = []
    for u in users(total):
        if base_name(u) == "add" and argument(u, 2, "alpha", 1) == 1:
            other = u.args[1] if u.args[0] is total else u.args[0]
            n = ratio_of_numbers(other)
            if n is not None:
                plus.append((u, n))
    return plus or [(total, 0.0)]


def _divides(node: fx.Node, exp: fx.Node, denominator: fx.Node, dim: int) -> tuple[fx.Node, ...] | None:
    """Return the nodes between sum and division, None unless ``node`` divides by the row's own sum."""
    if base_name(node) != "div" or node.args[0] is not exp or node.kwargs.get("rounding_mode"):
        return None
    if not isinstance(node.args[1], fx.Node) or shape(node) != shape(exp):
        return None
    row = anywhere(node)
    found, passed = source_of(step_into(At(node, row), node.args[1]))
    kept = len(shape(denominator)) == len(row)
    wanted = (*row[:dim], *((ZERO,) if kept else ()), *row[dim + 1 :])
    return passed if found.node is denominator and found.index == wanted else None
