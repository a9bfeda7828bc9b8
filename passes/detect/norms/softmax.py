"""Anchors that are a softmax op, whole or as ``exp(log_softmax)``."""

from __future__ import annotations

import torch
from torch import fx

from attnc.ir import Softmax
from attnc.passes.detect.graph import argument, base_name, shape, tensor_of
from attnc.passes.detect.norms.anchor import Anchor, without_row_maximum

_OPS = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"})


def find(graph: fx.Graph) -> list[Anchor]:
    """Return the anchors of ``graph`` in node order."""
    out = []
    for node in graph.nodes:
        if base_name(node) not in _OPS:
            continue
        src = node.args[0]
        t = tensor_of(src)
        if t is None or t.dim() < 2:
            continue
        dim = argument(node, 1, "dim") % len(shape(src))
        weights, inner = node, [node]
        if "log" in base_name(node):
            exps = [u for u in node.users if base_name(u) == "exp"]
            if len(exps) != 1:
                continue
            weights, inner = exps[0], [node, exps[0]]
        typed = not base_name(node).startswith("_") or "safe" in base_name(node)
        dtype = argument(node, 2, "dtype") if typed else None
        upcast = dtype in (torch.float32, torch.float64) and t.dtype != dtype
        scores, peeled = without_row_maximum(src, dim)
        norm = Softmax(None, upcast, base_name(node) == "_safe_softmax")
        out.append(Anchor(weights, scores, dim, norm, (*peeled, *inner)))
    return out
