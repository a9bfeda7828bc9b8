"""Anchors of signed weights, ``sign(s) * softmax(|s|)``: the softmax may be masked behind the magnitudes.

Source: Cog Attention (arXiv:2411.07176), section 3.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attnc.ir import SignedSoftmax, Softmax
from attnc.passes.detect.graph import base_name, inputs, shape
from attnc.passes.detect.norms import softmax
from attnc.passes.detect.norms.anchor import Anchor

_SIGNS = frozenset({"sign", "sgn"})
_FAR = 12
"""Ops between the magnitudes and the softmax."""


def find(graph: fx.Graph) -> list[Anchor]:
    """Return the anchors of ``graph`` in node order."""
    out = []
    for anchor in softmax.find(graph):
        for user in anchor.weights.users:
            signed = _signed(user, anchor)
            if signed is not None:
                out.append(signed)
    return out


def _signed(product: fx.Node, anchor: Anchor) -> Anchor | None:
    if base_name(product) != "mul" or anchor.norm != Softmax():
        return None
    others = [x for x in inputs(product) if x is not anchor.weights]
    if len(others) != 1 or base_name(others[0]) not in _SIGNS or shape(product) != shape(anchor.weights):
        return None
    if not _is_magnitude_of(anchor.scores, others[0].args[0]):
        return None
    return replace(anchor, weights=product, norm=SignedSoftmax(), inner=(*anchor.inner, others[0], product))


def _is_magnitude_of(node: fx.Node, score: object) -> bool:
    """Say whether each way back from ``node`` that meets magnitudes meets those of ``score``."""
    front, met = [node], []
    for _ in range(_FAR):
        met += [x for x in front if base_name(x) == "abs"]
        front = [y for x in front if x not in met for y in inputs(x) if shape(y) == shape(x)]
    return len(met) == 1 and met[0].args[0] is score
