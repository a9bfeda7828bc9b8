"""Sites whose weights are not normalized, and names for what uses scores in another way."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.contraction import Contraction
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask, RawMod, RawPointwise, step_into
from attnc.passes.detect.finite import is_total
from attnc.passes.detect.graph import base_name, inputs
from attnc.passes.detect.norms.elementwise import Weighing, weighings
from attnc.passes.detect.scores.fill import condition_mask
from attnc.passes.detect.sites import Pieces, Skeleton, skeleton
from attnc.passes.detect.views import At
from attnc.pointwise import text

_KNOWN = {
    "sigmoid": "sigmoid",
    "relu": "ReLU",
    "exp": "exponential",
    "softplus": "softplus",
    "gelu": "GELU",
    "silu": "SiLU",
}


def unnormalized(graph: fx.Graph, env: Env, taken: frozenset[str]) -> list[Skeleton | Miss]:
    """Return a skeleton or a Miss for each contraction that consumes scores without a normalizer.

    ``taken`` are nodes of sites and other misses.
    """
    out: list[Skeleton | Miss] = []
    for node in graph.nodes:
        c = env.scores_of(node)
        if c is None or node.name in taken:
            continue
        operand = next((x for x in (c.lhs, c.rhs) if env.carries(x)), None)
        chain = [] if operand is None else _back_to_scores(operand, env)
        if operand is not None and not taken & {n.name for n in chain}:
            out.append(_read(c, operand, chain, env))
    return out


def _read(c: Contraction, operand: fx.Node, chain: list[fx.Node], env: Env) -> Skeleton | Miss:
    found, site = None, None
    for found in weighings(c, operand, env):
        site = skeleton(found.anchor, env)
        if isinstance(site, Skeleton):
            break
    if found is not None and isinstance(site, Skeleton):
        threshold = _threshold(site)
        if threshold is None:
            return _with_zeros(site, found, env)
        why = (
            f"the weights are scores less a threshold, {threshold.name}, that is found from all scores of "
            "the row: sparsemax or entmax, which takes several passes"
        )
        return Miss("entmax", c.node.name, why)
    if isinstance(site, Pieces):
        why = "weights that are no softmax are contracted with several values"
        return Miss("several-value-contractions", c.node.name, why)
    if isinstance(site, Miss):
        return replace(site, node=c.node.name)
    via = next((_KNOWN[base_name(n)] for n in chain if base_name(n) in _KNOWN), None)
    if via is None:
        why = (
            "a contraction of two computed tensors is contracted again with no normalizer between: linear "
            "attention or a chain of products"
        )
        return Miss("linear-attention", c.node.name, why)
    why = f"scores are weighted by a {via} and no softmax, and not by each score alone: not rewritten"
    return Miss("not-softmax", c.node.name, why)


def _with_zeros(s: Skeleton, found: Weighing, env: Env) -> Skeleton | Miss:
    """Add the mask that zeroes weights as one that hides scores; the function gives those zero."""
    if found.zeroed is None:
        return s
    if found.guarded and not all(map(_stays_finite, s.mods)):
        why = "weights are zeroed by a mask, and a score of -inf from elsewhere would not weigh zero"
        return Miss("not-softmax", s.anchor.weights.name, why)
    node, condition, keeps = found.zeroed
    s.mods.append(condition_mask(step_into(At(node, s.weights), condition), keeps, env))
    s.trail.append("zeroed-weights")
    return s


def _stays_finite(mod: RawMod) -> bool:
    """Say whether a step makes no -inf of finite scores, whatever the tensors that it reads hold."""
    if isinstance(mod, RawMask):
        return math.isfinite(mod.value)
    if isinstance(mod, RawPointwise):
        return not mod.sides and is_total(mod.term) and "-inf" not in text(mod.term)
    return not isinstance(mod, RawBias)


def _threshold(s: Skeleton) -> fx.Node | None:
    """Return a tensor beside the scores that is computed from them, None if there is none."""
    places = [m.at for m in s.mods if isinstance(m, RawBias | RawGain)]
    places += [x for m in s.mods if isinstance(m, RawPointwise) for x in m.sides]
    return next((x.node for x in places if _depends(x.node, s.scores.node)), None)


def _depends(node: fx.Node, on: fx.Node) -> bool:
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        if n is on:
            return True
        above = [x for x in n.all_input_nodes if x not in seen]
        seen.update(above)
        stack += above
    return False


def _back_to_scores(node: fx.Node, env: Env) -> list[fx.Node]:
    """Return the carrying nodes from ``node`` back to the scores contraction, included."""
    out, stack, seen = [], [node], set()
    while stack:
        n = stack.pop()
        if n.name in seen:
            continue
        seen.add(n.name)
        out.append(n)
        if env.scores_of(n) is None:
            stack += [x for x in inputs(n) if env.carries(x)]
    return out
