"""Why weights and scores that nearly make attention do not: names for what mixes, convolves or sums them."""

from __future__ import annotations

from torch import fx

from attnc import expr as E
from attnc.ir import Miss
from attnc.passes.detect.contraction import contraction
from attnc.passes.detect.env import Env
from attnc.passes.detect.graph import CARRIERS, base_name, inputs, users
from attnc.passes.detect.norms.anchor import Anchor
from attnc.passes.detect.scores.walk import meeting
from attnc.passes.detect.views import At, Index

_CONVOLUTIONS = frozenset({"convolution", "conv1d", "conv2d", "conv3d"})
_PRODUCTS = frozenset({"linear", "matmul", "bmm", "mm", "einsum", "addmm", "baddbmm"})
_FAR = 64
"""Nodes looked at between a normalizer and the scores that something hides."""


def why_no_scores(anchor: Anchor, env: Env) -> Miss:
    """Name what stands between the normalizer and the scores."""
    stack: list[fx.Node] = [anchor.scores]
    seen = {anchor.scores}
    while stack and len(seen) < _FAR:
        node = stack.pop()
        name = base_name(node)
        behind = any(env.carries(x) for x in inputs(node))
        if behind and name in _CONVOLUTIONS:
            why = (
                f"{node.name} convolves the scores before the normalizer: a score reads its neighbors, so no "
                "tile of scores stands alone (multi-token attention)"
            )
            return Miss("score-convolution", node.name, why)
        if behind and name in _PRODUCTS:
            why = (
                f"{node.name} mixes the scores of several heads before the normalizer: each head would need "
                "the scores of all"
            )
            return Miss("talking-heads", node.name, why)
        if name not in _PRODUCTS | _CONVOLUTIONS:
            above = [x for x in inputs(node) if x not in seen]
            seen.update(above)
            stack += above
    why = (
        "the weights are contracted with values, but what is normalized is no elementwise function of one "
        "contraction of two computed tensors"
    )
    return Miss("no-scores", anchor.weights.name, why)


def mixed_by_layers(anchor: Anchor, env: Env) -> Miss | None:
    """Name talking heads (arXiv:2003.02436) spelled as linear layers over the heads; None for anything else.

    Scores pass through one layer to the normalizer, and the weights through views, or one more layer, to a
    contraction with values: a router's do not.
    """
    layer = anchor.scores
    while base_name(layer) in CARRIERS and isinstance(layer.args[0], fx.Node):
        layer = layer.args[0]
    if base_name(layer) != "linear" or not any(env.carries(x) for x in inputs(layer)):
        return None
    stack = [anchor.weights]
    while stack:
        for u in users(stack.pop()):
            if env.scores_of(u) is not None:
                why = (
                    f"{layer.name} mixes the scores of several heads: each head would need the scores of all"
                )
                return Miss("talking-heads", layer.name, why)
            if base_name(u) in CARRIERS or base_name(u) == "linear":
                stack.append(u)
    return None


def why_not_summed(anchor: Anchor, weights: Index, summed: frozenset[E.Expr], env: Env, miss: Miss) -> Miss:
    """Name a contraction that sums another axis of the weights than the normalized one.

    ``weights`` is the index of the weights in the contraction, ``summed`` its summed indices.
    """
    at: At | None = At(anchor.scores, weights)
    while at is not None and env.scores_of(at.node) is None:
        at = meeting(at, env)
    if at is None or anchor.denominator is not None:
        return miss
    scores = contraction(at.node)
    assert scores is not None, "the way down ends at a contraction"
    lhs, rhs, _ = scores.operands(at.index, "w")
    left, right = ({g for x in side.index for g in E.indices(x)} for side in (lhs, rhs))
    normal = set(E.indices(weights[anchor.dim]))
    if normal and normal <= left & right:
        why = (
            "the softmax runs over an axis that queries and keys share, such as the heads, and not over keys"
        )
        return Miss("softmax-over-shared-axis", miss.node, why)
    if normal & summed or not normal <= left ^ right or not summed:
        return miss
    if summed <= left & right:
        why = "the weights of several heads are mixed before the values: each head needs the weights of all"
        return Miss("talking-heads", miss.node, why)
    if summed <= left ^ right:
        why = (
            "the weights of each key are normalized over the queries, so a kernel needs the sums of all "
            "columns before it can start: two passes"
        )
        return Miss("query-axis-softmax", miss.node, why)
    return miss
