"""Anchors spelled ``exp(s - logsumexp(s))``, which is softmax over the axis of the log-sum-exp.

``exp(s - logaddexp(logsumexp(s), z))`` is softmax with a sink of logit ``z``, as models write it whose fused
kernel returns the log-sum-exp. Where all scores of a row are the least number of their type, as in a row that
a finite fill hides whole, the log-sum-exp rounds to that number and every weight becomes 1: no softmax. Where
that may be, the normalizer is a ``RoundedSoftmax``. Source: forms/dense_variants, sections 1.1 and 4.1.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attnc.expr import ZERO, indices
from attnc.ir import Softmax
from attnc.passes.detect.env import step_into
from attnc.passes.detect.graph import argument, base_name, normal_dims, shape, tensor_of
from attnc.passes.detect.norms.anchor import Anchor, Sink, anywhere, source_of
from attnc.passes.detect.views import At


def find(graph: fx.Graph) -> list[Anchor]:
    """Return the anchors of ``graph`` in node order."""
    return [a for node in graph.nodes if base_name(node) == "exp" if (a := _of_exp(node)) is not None]


def _of_exp(exp: fx.Node) -> Anchor | None:
    less = exp.args[0]
    if not isinstance(less, fx.Node) or base_name(less) != "sub" or argument(less, 2, "alpha", 1) != 1:
        return None
    s, total = less.args[:2]
    if not isinstance(s, fx.Node) or not isinstance(total, fx.Node) or tensor_of(total) is None:
        return None
    row = anywhere(less)
    found, passed = source_of(step_into(At(less, row), total))
    if base_name(found.node) == "logaddexp":
        return _with_sink(exp, s, total, found, passed)
    return _over_axis(exp, s, found, passed)


def _with_sink(
    exp: fx.Node, s: fx.Node, total: fx.Node, sum_: At, passed: tuple[fx.Node, ...]
) -> Anchor | None:
    """Return the anchor whose log-sum-exp is one operand of ``logaddexp``; the other is the sink."""
    less, operands = exp.args[0], sum_.node.args[:2]
    assert isinstance(less, fx.Node), "an exponential has an operand"
    for lse, sink in (operands, operands[::-1]):
        found, between = source_of(step_into(sum_, lse))
        anchor = _over_axis(exp, s, found, (*between, sum_.node, *passed))
        if anchor is None:
            continue
        along = set(indices(anywhere(less)[anchor.dim]))
        if isinstance(sink, fx.Node) and not any(along & set(indices(x)) for x in sum_.index):
            return replace(anchor, sink=Sink(less, total, sink), rounds=False)
    return None


def _over_axis(exp: fx.Node, s: fx.Node, found: At, passed: tuple[fx.Node, ...]) -> Anchor | None:
    """Return the anchor if ``found`` is the log-sum-exp of the row that ``exp`` is at."""
    less = exp.args[0]
    assert isinstance(less, fx.Node), "an exponential has an operand"
    row = anywhere(less)
    if base_name(found.node) != "logsumexp" or found.node.args[0] is not s or shape(s) != shape(less):
        return None
    dims = normal_dims(argument(found.node, 1, "dim"), len(row))
    if len(dims) != 1:
        return None
    dim, kept = dims[0], bool(argument(found.node, 2, "keepdim", False))
    wanted = (*row[:dim], *((ZERO,) if kept else ()), *row[dim + 1 :])
    if found.index != wanted:
        return None
    return Anchor(exp, s, dim, Softmax(), (found.node, *passed, less, exp), rounds=True)
