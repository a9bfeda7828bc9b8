"""Sites that are fused already: calls of ``scaled_dot_product_attention``.

They are read into the same skeleton as spelled-out ones.

Such a call is worth reading because its mask tensor may have a closed form (a causal or padding mask that
every key pays for), its keys may be repeated for grouped heads, and because sparse and quantized forms apply
to it all the same. SDPA gives zeros to a query that sees no key.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.ir import Miss, Scale, Softmax
from attnc.passes.detect.arithmetic import to_bool
from attnc.passes.detect.contraction import Contraction
from attnc.passes.detect.env import Env, RawMask, RawMod, step_into
from attnc.passes.detect.graph import argument, base_name, ratio_of_numbers, shape, tensor_of
from attnc.passes.detect.norms.anchor import Anchor
from attnc.passes.detect.scores.additive import additive
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.views import At, Index

SDPA = frozenset({"scaled_dot_product_attention"})


def fused_calls(graph: fx.Graph, env: Env) -> list[Skeleton | Miss]:
    """Return a skeleton (or a Miss) for each SDPA call of ``graph``, in node order."""
    return [_read(n, env) for n in graph.nodes if base_name(n) in SDPA]


def _read(node: fx.Node, env: Env) -> Skeleton | Miss:
    q, k, v = node.args[:3]
    if not isinstance(q, fx.Node) or not isinstance(k, fx.Node) or not isinstance(v, fx.Node):
        return Miss("sdpa-operands", node.name, "expected tensors as query, key and value")
    sizes, width = shape(q), E.as_int(shape(q)[-1])
    scale = argument(node, 6, "scale")
    if scale is None and width is None:
        return Miss("size-not-decided", node.name, "the default scale needs a fixed feature size")
    factor = ratio_of_numbers(scale) if scale is not None else 1.0 / math.sqrt(width or 1)
    if factor is None or len(sizes) < 3 or any(len(shape(x)) != len(sizes) for x in (k, v)):
        return Miss("sdpa-operands", node.name, "expected operands of one rank >= 3 and a number as scale")
    batch = tuple(_atom(f"a{i}", n) for i, n in enumerate(sizes[:-2]))
    row, key = _atom("q", sizes[-2]), _atom("t", shape(k)[-2])
    feature, value = _atom("e.d", sizes[-1]), _atom("o", shape(v)[-1])
    weights = (*batch, row, key)
    mods: list[RawMod] = [Scale(factor)]
    mask = _mask(node, env, weights, row, key)
    if isinstance(mask, Miss):
        return mask
    anchor = Anchor(node, node, len(weights) - 1, Softmax(safe=True), (node,))
    values = Contraction(node, q, v, "", "", "")
    grouped = bool(argument(node, 7, "enable_gqa", False))
    kv = _kv_index(batch, shape(k), grouped, sizes)
    if kv is None:
        return Miss("sdpa-operands", node.name, f"keys {shape(k)} do not fit queries {sizes}")
    features = tuple(g for x in (feature,) if (g := E.only_index(x)) is not None)
    s = Skeleton(
        anchor,
        values,
        scores=At(node, weights),
        q=At(q, (*batch, row, feature)),
        k=At(k, (*kv, key, feature)),
        v=At(v, (*kv, key, value)),
        key=key,
        out=(*batch, row, value),
        output=node,
        mods=[*mods, *mask],
        interior=[node],
        trail=["sdpa-call"],
        features=features,
        weights=weights,
    )
    s.dropout = float(ratio_of_numbers(argument(node, 4, "dropout_p", 0.0)) or 0.0)
    return s


def _atom(name: str, n: Expr) -> Expr:
    return ZERO if n == ONE else E.index(name, n)


def _kv_index(batch: Index, sizes: tuple[Expr, ...], grouped: bool, q: tuple[Expr, ...]) -> Index | None:
    """Return the key/value index of a query's batch index: broadcast axes at 0, grouped heads divided."""
    out = []
    for i, (x, n, m) in enumerate(zip(batch, sizes[:-2], q[:-2], strict=True)):
        if n == m:
            out.append(x)
        elif n == ONE:
            out.append(ZERO)
        elif grouped and i == len(batch) - 1:
            group = E.exact_div(m, n)
            if group is None:
                return None
            out.append(E.floordiv(x, group))
        else:
            return None
    return tuple(out)


def _mask(node: fx.Node, env: Env, weights: Index, row: Expr, key: Expr) -> tuple[RawMod, ...] | Miss:
    if argument(node, 5, "is_causal", False):
        return (RawMask(E.le0(E.sub(key, row)), -math.inf, "replace", None),)
    mask = argument(node, 3, "attn_mask")
    if mask is None:
        return ()
    t = tensor_of(mask)
    if t is None:
        return Miss("sdpa-operands", node.name, "expected a tensor as attn_mask")
    at = At(node, weights)
    if t.dtype != torch.bool:
        return additive(at, mask, env, 1)
    there = step_into(at, mask)
    value = env.derive(there)
    keep = to_bool(value) if value is not None else E.load(there.node.name, there.index, "bool")
    return () if keep == E.TRUE else (RawMask(keep, -math.inf, "replace", there),)
