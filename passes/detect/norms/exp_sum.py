"""Anchors spelled out: ``e = exp(s)`` divided by its sum over an axis, now or after the value contraction.

``exp(s - m) / sum(exp(s - m)) == softmax(s)`` for any ``m`` that does not change along the summed axis, so a row maximum in front of the
exponential is no part of the meaning.  ``e / (1 + sum e)`` is softmax with a sink of logit 0; there the row maximum would change
the value, and is not peeled.  Source: forms/dense_variants, sections 1.1 and 4.1.
"""

from __future__ import annotations

from torch import fx

from attnc.ir import Softmax
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
from attnc.passes.detect.norms.anchor import VIEWS, Anchor, without_row_maximum


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
        kept = bool(argument(total, 2, "keepdim", False))
        for denominator, plus in _denominators(total):
            scores, peeled = without_row_maximum(src, dim)
            if plus not in (0.0, 1.0) or (plus == 1.0 and scores is not src):
                continue
            norm = Softmax(0.0 if plus == 1.0 else None)
            inner = (*peeled, exp)
            early = [d for d in users(exp) if base_name(d) == "div" and d.args[0] is exp and _reads(d.args[1], denominator) and (kept or d.args[1] is not denominator)]
            if early:
                between = _chain(early[0].args[1], denominator)
                out.append(Anchor(early[0], scores, dim, norm, (*inner, total, *between, denominator, early[0])))
            else:
                out.append(Anchor(exp, scores, dim, norm, inner, denominator))
    return out


def _denominators(total: fx.Node) -> list[tuple[fx.Node, float]]:
    """Return the sum itself, or the sum plus a constant where every user adds one."""
    plus = []
    for u in users(total):
        if base_name(u) == "add" and u.kwargs.get("alpha", 1) == 1:
            other = u.args[1] if u.args[0] is total else u.args[0]
            n = ratio_of_numbers(other)
            if n is not None:
                plus.append((u, n))
    return plus or [(total, 0.0)]


def _chain(x: object, end: fx.Node) -> list[fx.Node]:
    out = []
    while isinstance(x, fx.Node) and x is not end:
        out.append(x)
        x = x.args[0]
    return out


def _reads(x: object, denominator: fx.Node) -> bool:
    while isinstance(x, fx.Node) and x is not denominator and base_name(x) in VIEWS:
        x = x.args[0]
    return x is denominator
