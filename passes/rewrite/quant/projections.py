"""Find the linear layers around a site: those that make its operands, and the one that takes its result."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from attnc.passes.detect.found import Found
from attnc.passes.detect.graph import base_name, users

_STOP = frozenset(
    {
        "softmax",
        "_softmax",
        "matmul",
        "bmm",
        "baddbmm",
        "einsum",
        "scaled_dot_product_attention",
        "embedding",
        "layer_norm",
        "native_layer_norm",
    }
)
_THROUGH = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "clone",
        "contiguous",
        "_to_copy",
        "to",
        "dropout",
        "unsqueeze",
        "squeeze",
        "slice",
        "flatten",
        "alias",
    ]
)


def projections(work: fx.Graph, found: Found, fqn: Mapping[str, str]) -> list[str]:
    """Return the module paths of the linear layers around ``found``, operands' first.

    ``fqn`` maps weight inputs of ``work`` to parameter names; layers whose weight has no name
    ``<path>.weight`` are left out.
    """
    nodes = {n.name: n for n in work.nodes}
    out: dict[str, None] = {}
    for recipe in found.operands.values():
        for linear in (x for n in recipe.reads for x in _back(nodes[n])):
            _note(linear, fqn, out)
    for linear in _forward(nodes[found.match.output]):
        _note(linear, fqn, out)
    return list(out)


def _note(linear: fx.Node, fqn: Mapping[str, str], out: dict[str, None]) -> None:
    weight = linear.args[1]
    name = fqn.get(weight.name, "") if isinstance(weight, fx.Node) else ""
    if name.endswith(".weight"):
        out[name.removesuffix(".weight")] = None


def _back(node: fx.Node) -> list[fx.Node]:
    out: list[fx.Node] = []
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n.name in seen or n.op != "call_function":
            continue
        seen.add(n.name)
        if base_name(n) == "linear":
            out.append(n)
        elif base_name(n) not in _STOP:
            stack += n.all_input_nodes
    return sorted(out, key=lambda n: n.name)


def _forward(node: fx.Node) -> list[fx.Node]:
    out: list[fx.Node] = []
    stack = [node]
    while stack:
        for u in users(stack.pop()):
            if base_name(u) == "linear":
                out.append(u)
            elif base_name(u) in _THROUGH:
                stack.append(u)
    return out
