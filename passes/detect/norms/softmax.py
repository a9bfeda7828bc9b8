"""Anchors that are a softmax op, whole or as ``exp(log_softmax)``."""

from __future__ import annotations

import math

import torch
from torch import fx

from attnc.ir import Softmax
from attnc.passes.detect.graph import (
    argument,
    base_name,
    normal_dims,
    ratio_of_numbers,
    shape,
    tensor_of,
)
from attnc.passes.detect.norms.anchor import Anchor, without_maximum

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
        scores, peeled, _ = without_maximum(src, dim)
        zeroed = _zeroed_where_all_hidden(weights, src, dim) or _zeroed_where_nan(weights)
        if zeroed is not None:
            weights, inner = zeroed[0], [*inner, *zeroed]
        norm = Softmax(None, upcast, base_name(node) == "_safe_softmax" or zeroed is not None)
        out.append(Anchor(weights, scores, dim, norm, (*peeled, *inner)))
    return out


def _zeroed_where_all_hidden(weights: fx.Node, scores: fx.Node, dim: int) -> list[fx.Node] | None:
    """Return the nodes of ``where(every score of the row is -inf, 0, weights)``, the choice first.

    That is what ``scaled_dot_product_attention`` decomposes to.
    """
    for user in weights.users:
        if base_name(user) != "where" or len(user.args) != 3 or shape(user) != shape(weights):
            continue
        cond, a, b = user.args
        other, when = (a, True) if b is weights else (b, False)
        if not isinstance(cond, fx.Node) or not isinstance(other, fx.Node) or not _is_zero(other):
            continue
        path = _all_hidden(cond, scores, dim, when)
        if path is not None:
            return [user, other, *path]
    return None


def _zeroed_where_nan(weights: fx.Node) -> list[fx.Node] | None:
    """Return the node of ``nan_to_num(weights)``: of finite scores and -inf only a row all -inf is."""
    for user in weights.users:
        if base_name(user) == "nan_to_num" and argument(user, 1, "nan", 0.0) in (None, 0):
            return [user]
    return None


def _is_zero(node: fx.Node) -> bool:
    if base_name(node) in ("zeros_like", "zeros", "new_zeros"):
        return True
    at = 2 if base_name(node) == "new_full" else 0 if base_name(node) == "scalar_tensor" else 1
    filled = base_name(node) in ("full_like", "full", "new_full", "scalar_tensor")
    return filled and ratio_of_numbers(node.args[at]) == 0


def _all_hidden(cond: fx.Node, scores: fx.Node, dim: int, holds: bool) -> list[fx.Node] | None:
    """Return the nodes by which ``cond`` is ``holds`` for exactly the rows whose scores are all -inf."""
    path, node, seen_row = [], cond, False
    while base_name(node) not in ("eq", "ne"):
        path.append(node)
        name, above = base_name(node), node.args[0]
        if name in ("logical_not", "bitwise_not"):
            holds = not holds
        elif name in ("any", "all") and not seen_row and (name == "all") == holds:
            seen_row = True
            if argument(node, 1, "dim") is None or not argument(node, 2, "keepdim", False):
                return None
            if normal_dims(argument(node, 1, "dim"), len(shape(node))) != (dim,):
                return None
        else:
            return None
        if not isinstance(above, fx.Node):
            return None
        node = above
    same = node.args[0] is scores and node.args[1] == -math.inf and (base_name(node) == "eq") == holds
    return [*path, node] if same and seen_row else None
