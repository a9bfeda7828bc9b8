"""Lower a plan to ``scaled_dot_product_attention``.

Plain, causal by flag, windows as overlapping views, the rest by a mask.

Exactness is decided here and nowhere else: what a spec needs and SDPA has not (soft caps, sinks, gains) is
refused by ``can_run``. Causal is the ``is_causal`` flag, never a tensor; grouped keys and values stay grouped
(``enable_gqa``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from attnc.editing import Builder
from attnc.formula import fold
from attnc.formula_nodes import Nodes
from attnc.ir import AttentionSpec, Bias, Miss, Scale, Softmax
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range, may_hide_a_whole_row
from attnc.sizes import dim

aten = torch.ops.aten
WINDOW_MIN = 256
"""Windows pay from about this many keys on; below, one masked call is as fast."""


def can_run(spec: AttentionSpec) -> Miss | None:
    """Say what of ``spec`` SDPA does not have, None if it has all."""
    kinds = {type(s).__name__ for s in spec.scores} - {"Scale", "Bias"}
    if kinds:
        return Miss("sdpa-scores", "", f"SDPA has no {', '.join(sorted(kinds)).lower()}")
    if any(isinstance(s, Scale) for s in spec.scores[1:]):
        return Miss("sdpa-scale-after-bias", "", "SDPA scales before it adds, the model after")
    if not isinstance(spec.norm, Softmax):
        return Miss("sdpa-norm", "", f"SDPA weighs by a softmax, the model by {spec.norm}")
    if spec.norm.sink is not None:
        return Miss("sdpa-sink", "", "SDPA has no sink in its denominator")
    if spec.dropout:
        return Miss("sdpa-dropout", "", "SDPA would draw other random numbers than the model")
    empty = may_hide_a_whole_row(spec.mask, *spec.lengths())
    finite = not isinstance(spec.mask, Full) and math.isfinite(spec.fill.value)
    if empty and finite and spec.q.dtype == torch.float16:
        return Miss(
            "sdpa-fp16-empty-rows",
            "",
            "in fp16 a finite fill overflows with the score; no kernel gives such rows what the model does",
        )
    return None


def lower(
    spec: AttentionSpec,
    build: Builder,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    captured: Sequence[fx.Node],
    portable: bool,
) -> fx.Node:
    """Insert nodes that compute ``spec`` and return the output ``[B, H, Sq, Dv]``.

    ``can_run(spec)`` must hold.

    ``portable`` asks for plain ATen only (for artefacts that run without attnc).
    """
    k, v = (
        x if o.dtype == spec.q.dtype else build.call(aten.to.dtype, x, spec.q.dtype)
        for x, o in ((k, spec.k), (v, spec.v))
    )
    named = {o.name: n for o, n in zip(spec.captured, captured, strict=True)}
    scale = spec.scores[0].factor if spec.scores and isinstance(spec.scores[0], Scale) else 1.0
    grouped = spec.group_size > 1
    bias = _bias(spec, build, named, q)
    mask = spec.mask
    if isinstance(mask, Full) and bias is None:
        return _plain(build, q, k, v, None, False, scale, grouped)
    if mask == Band(None, 0) and bias is None:
        return _plain(build, q, k, v, None, True, scale, grouped)
    if isinstance(mask, Full):
        assert bias is not None
        return _biased(build, spec, q, k, v, bias, scale, portable)
    finite = "uniform" if spec.fill.how == "add" else "replaced"
    empty = finite if math.isfinite(spec.fill.value) else "zero" if spec.norm.safe else "nan"
    window = None if bias is not None or portable else as_window(mask)
    if (
        window is not None
        and not (empty == finite and may_hide_a_whole_row(mask, *spec.lengths()))
        and _long(spec)
    ):
        left, right, sinks, causal, padding = window
        keep = named[padding] if padding else None
        return build.call(
            torch.ops.attnc.window_sdpa.default, q, k, v, left, right, sinks, causal, scale, empty, keep
        )
    if not may_hide_a_whole_row(mask, *spec.lengths()):
        empty = "zero"
    fill = _fill(spec)
    data, causal = _data(mask)
    if data is None:
        added = _added(build, _keep(build, mask, named, q, k), bias, fill, q)
        if bias is not None or empty == "nan":
            return _biased(build, spec, q, k, v, added, scale, portable)
        return _plain(build, q, k, v, _over_queries(build, added, q), False, scale, grouped)
    if not portable:
        keep = _keep(build, data, named, q, k)
        return build.call(
            torch.ops.attnc.masked_sdpa.default, q, k, v, keep, bias, fill, empty, causal, scale, grouped
        )
    keep = _keep(build, mask, named, q, k)
    added = _added(build, keep, bias, fill, q)
    if bias is not None:
        return _biased(build, spec, q, k, v, added, scale, portable)
    out = _plain(build, q, k, v, _over_queries(build, added, q), False, scale, grouped)
    if empty == "nan":
        lost = build.call(aten.bitwise_not.default, build.call(aten.any.dim, keep, -1, True))
        out = build.call(aten.masked_fill.Scalar, out, lost, math.nan)
    return out


def as_window(mask: Mask) -> tuple[int, int, int, bool, str | None] | None:
    """Return (left, right, sinks, causal, padding operand) if the mask is a sliding window, else None."""
    parts = list(mask.parts) if isinstance(mask, And) else [mask]
    padding = next((p.operand for p in parts if isinstance(p, Padding) and p.axis == "k"), None)
    rest = [p for p in parts if not isinstance(p, Padding)]
    causal = any(isinstance(p, Band) and p.left is None and p.right == 0 and p.align == "start" for p in rest)
    rest = [p for p in rest if p != Band(None, 0)]
    if len(rest) != 1 or len(parts) - len(rest) - causal > (1 if padding else 0):
        return None
    inner = list(rest[0].parts) if isinstance(rest[0], Or) else [rest[0]]
    bands = [p for p in inner if isinstance(p, Band)]
    ranges = [p for p in inner if isinstance(p, Range) and p.axis == "k" and p.lo == 0]
    if len(bands) != 1 or len(bands) + len(ranges) != len(inner) or len(ranges) > 1:
        return None
    b, sinks = bands[0], ranges[0].hi if ranges else 0
    if b.left is None or b.right is None or b.align != "start" or b.left < 0 or b.right < 0:
        return None
    return b.left, b.right, sinks, causal or (b.right == 0 and not sinks), padding


def _long(spec: AttentionSpec) -> bool:
    n = spec.lengths()[1]
    return n is None or n >= WINDOW_MIN


def _plain(
    build: Builder,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    grouped: bool,
) -> fx.Node:
    return build.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def _biased(
    build: Builder,
    spec: AttentionSpec,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    bias: fx.Node,
    scale: float,
    portable: bool,
) -> fx.Node:
    """Attend with an added tensor.

    Rows of -inf give NaN as a softmax does, unless the model's own is safe.
    """
    grouped, safe = spec.group_size > 1, spec.norm.safe
    if not portable:
        return build.call(torch.ops.attnc.biased_sdpa.default, q, k, v, bias, safe, scale, grouped)
    out = _plain(build, q, k, v, _over_queries(build, bias, q), False, scale, grouped)
    if safe:
        return out
    lost = build.call(aten.eq.Scalar, build.call(aten.amax.default, bias, [-1], True), -math.inf)
    return build.call(aten.masked_fill.Scalar, out, lost, math.nan)


def _fill(spec: AttentionSpec) -> float:
    """Return the value to add: a replaced score becomes the dtype's minimum.

    Which swallows any score in fp32 and bf16.
    """
    if spec.fill.how == "replace" and math.isfinite(spec.fill.value):
        return torch.finfo(spec.q.dtype).min
    return spec.fill.value


def _bias(spec: AttentionSpec, build: Builder, named: dict[str, fx.Node], q: fx.Node) -> fx.Node | None:
    total: fx.Node | None = None
    for step in spec.scores:
        if not isinstance(step, Bias):
            continue
        x = named[step.operand]
        if x.meta["val"].dtype != q.meta["val"].dtype:
            x = build.call(aten.to.dtype, x, q.meta["val"].dtype)
        if step.sign < 0:
            x = build.call(aten.neg.default, x)
        total = x if total is None else build.call(aten.add.Tensor, total, x)
    return total


def _data(mask: Mask) -> tuple[Mask | None, bool]:
    """Split a mask into (the part that must be a tensor, whether plain causal is the other part).

    No data gives (None, False).
    """
    if not mask.operands:
        return None, False
    parts = mask.parts if isinstance(mask, And) else (mask,)
    rest = tuple(p for p in parts if p != Band(None, 0))
    whole = rest[0] if len(rest) == 1 else And(rest)
    return whole, len(rest) < len(parts)


def _keep(build: Builder, mask: Mask, named: dict[str, fx.Node], q: fx.Node, k: fx.Node) -> fx.Node:
    """Insert the predicate as a bool tensor that broadcasts to ``[B, H, Sq, Sk]``."""
    call = build.call
    sq, sk = (dim(x.meta["val"].shape[2]) for x in (q, k))
    device = q.meta["val"].device
    if isinstance(mask, And | Or):
        op = aten.bitwise_and.Tensor if isinstance(mask, And) else aten.bitwise_or.Tensor
        out = _keep(build, mask.parts[0], named, q, k)
        for p in mask.parts[1:]:
            out = call(op, out, _keep(build, p, named, q, k))
        return out
    if isinstance(mask, Not):
        return call(aten.bitwise_not.default, _keep(build, mask.part, named, q, k))
    if isinstance(mask, Padding):
        row = call(aten.unsqueeze.default, named[mask.operand], 1)
        return call(aten.unsqueeze.default, row, 2 if mask.axis == "k" else 3)
    if isinstance(mask, Dense):
        return named[mask.operand]
    if isinstance(mask, Formula):
        return fold(mask.value, Nodes(build, q, k, named))
    i = call(aten.arange.default, build.size(sq, q), device=device)
    j = call(aten.arange.default, build.size(sk, k), device=device)
    i = call(aten.unsqueeze.default, i, 1)
    if isinstance(mask, Range):
        x = j if mask.axis == "k" else i
        keep = call(
            aten.bitwise_and.Tensor, call(aten.ge.Scalar, x, mask.lo), call(aten.lt.Scalar, x, mask.hi)
        )
        return (
            call(aten.unsqueeze.default, call(aten.unsqueeze.default, keep, 0), 0)
            if mask.axis == "q"
            else call(aten.reshape.default, keep, [1, 1, 1, -1])
        )
    assert isinstance(mask, Band), f"{mask} has no emission"
    distance = call(aten.sub.Tensor, i, j)
    if mask.align == "end":
        from attnc import expr as E

        distance = call(aten.add.Scalar, distance, build.size(E.sub(sk, sq), k))
    keeps = []
    if mask.left is not None:
        keeps.append(call(aten.le.Scalar, distance, mask.left))
    if mask.right is not None:
        keeps.append(call(aten.ge.Scalar, distance, -mask.right))
    keep = keeps[0] if len(keeps) == 1 else call(aten.bitwise_and.Tensor, *keeps)
    return call(aten.unsqueeze.default, call(aten.unsqueeze.default, keep, 0), 0)


def _added(build: Builder, keep: fx.Node, bias: fx.Node | None, fill: float, q: fx.Node) -> fx.Node:
    dtype, device = q.meta["val"].dtype, q.meta["val"].device
    value = max(fill, torch.finfo(dtype).min) if math.isfinite(fill) else fill
    zero = build.call(aten.zeros.default, [1], dtype=dtype, device=device)
    mask = build.call(aten.masked_fill.Scalar, zero, build.call(aten.bitwise_not.default, keep), value)
    return mask if bias is None else build.call(aten.add.Tensor, mask, bias)


def _over_queries(build: Builder, mask: fx.Node, q: fx.Node) -> fx.Node:
    sizes = [dim(n) for n in mask.meta["val"].shape]
    sq = dim(q.meta["val"].shape[2])
    return build.expand(mask, [*sizes[:2], sq, sizes[3]]) if sizes[2] != sq else mask
