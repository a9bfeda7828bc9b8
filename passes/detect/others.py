"""Name what uses scores without a softmax: sigmoid, unnormalized and linear attention, chains of products."""

from __future__ import annotations

from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.env import Env
from attnc.passes.detect.graph import base_name, inputs

_KNOWN = {
    "sigmoid": "sigmoid",
    "relu": "ReLU",
    "exp": "exponential",
    "softplus": "softplus",
    "gelu": "GELU",
    "silu": "SiLU",
}


def unnormalized(graph: fx.Graph, env: Env, taken: frozenset[str]) -> list[Miss]:
    """Return a Miss for each contraction that consumes scores directly.

    ``taken`` are nodes of sites and other misses.
    """
    out: list[Miss] = []
    for node in graph.nodes:
        c = env.scores_of(node)
        if c is None or node.name in taken:
            continue
        for operand in (c.lhs, c.rhs):
            if not env.carries(operand):
                continue
            chain = _back_to_scores(operand, env)
            if taken & {n.name for n in chain}:
                continue
            via = next((_KNOWN[base_name(n)] for n in chain if base_name(n) in _KNOWN), None)
            if via is not None:
                out.append(
                    Miss(
                        "not-softmax",
                        node.name,
                        f"scores are weighted by a {via} and no softmax: not rewritten",
                    )
                )
            else:
                why = (
                    "a contraction of two computed tensors is contracted again with no normalizer between: "
                    "linear attention or a chain of products"
                )
                out.append(Miss("linear-attention", node.name, why))
            break
    return out


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
