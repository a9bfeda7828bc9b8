"""The calls that rewritten graphs make besides plain SDPA.

Masked, biased and windowed attention that look at their data.

All are ``torch.library`` operators with a composite implementation: in eager they run the Python below,
autograd included; under ``torch.compile`` or export they dissolve into plain ATen.  What they add to a bare
SDPA call is (1) a mask that hides nothing at run time costs nothing, as in transformers' own eager code; (2)
rows that see no key get exactly what the model gave them, in values and in gradients (the CPU flash kernel
rebuilds such rows wrongly in backward when the fill is finite: P becomes 1 instead of 1/n).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen.sdpa.window import window_attention

HIDES = -1e4
"""A row of the added tensor that nowhere exceeds this may hide all keys."""

_LIBRARY: Any = torch.library.Library("attnc", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "masked_sdpa(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? bias, float fill, str empty, "
    "bool causal, float scale, bool grouped) -> Tensor"
)
_LIBRARY.define(
    "biased_sdpa(Tensor q, Tensor k, Tensor v, Tensor bias, bool safe, float scale, bool grouped) -> Tensor"
)
_LIBRARY.define(
    "window_sdpa(Tensor q, Tensor k, Tensor v, int left, int right, int sinks, bool causal, "
    "float scale, str empty, Tensor? key_keep) -> Tensor"
)


def masked_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    bias: Tensor | None,
    fill: float,
    empty: str,
    causal: bool,
    scale: float,
    grouped: bool,
) -> Tensor:
    """Attend where ``keep`` (bool, broadcasts to ``[B, H, Sq, Sk]``) and, if ``causal``, ``k <= q`` hold.

    ``fill`` is what hidden scores get added; ``empty`` says what a query without keys gives: ``uniform``,
    or ``replaced`` when the fill stands in place of the score and blocks its gradient
    (finite fill), ``nan`` or ``zero``.
    """
    looks = not is_traced(q, k, v, keep)
    if looks and bool(keep.all()):
        if bias is None:
            return F.scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=grouped)
        if not causal:
            return biased_sdpa(q, k, v, bias.to(q.dtype), empty == "zero", scale, grouped)
    seen = _seen(keep, causal, q, k)
    added = _added(seen, bias, fill, q.dtype)
    if _trains(q, k, v, bias) and not (looks and bool(seen.any(-1).all())):
        if empty == "uniform":
            return _spelled_out(q, k, v, added, False, scale)
        if empty == "replaced" or (empty == "zero" and bias is not None):
            return _spelled_out(q, k, v, bias, empty == "zero", scale, ~seen)
    if bias is not None:
        return biased_sdpa(q, k, v, added, empty == "zero", scale, grouped)
    out = _attend(q, k, v, added, scale, grouped)
    return out.masked_fill(~seen.any(-1, keepdim=True), math.nan) if empty == "nan" else out


def biased_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, safe: bool, scale: float, grouped: bool
) -> Tensor:
    """Attend with a tensor added to the scores, which broadcasts to ``[B, H, Sq, Sk]`` and may hide keys.

    A row of -inf gives NaN (zeros if ``safe``), a row of large negative numbers what softmax makes of it.
    """
    top = bias.detach().amax(-1, keepdim=True)
    looks = not is_traced(q, k, v, bias)
    if _trains(q, k, v, bias) and not (looks and bool((top > HIDES).all())):
        return _spelled_out(q, k, v, bias, safe, scale)
    out = _attend(q, k, v, bias, scale, grouped)
    if safe or (looks and bool((top > -math.inf).all())):
        return out
    return out.masked_fill(top == -math.inf, math.nan)


def window_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    sinks: int,
    causal: bool,
    scale: float,
    empty: str,
    key_keep: Tensor | None,
) -> Tensor:
    """Attend in a sliding window; see ``attnc.codegen.sdpa.window``.  ``key_keep`` is bool ``[B, Sk]``."""
    if key_keep is not None and not is_traced(q, key_keep) and bool(key_keep.all()):
        key_keep = None
    rule: Literal["zero", "nan"] = "nan" if empty == "nan" else "zero"
    return window_attention(
        q,
        k,
        v,
        left=left,
        right=right,
        sinks=sinks,
        causal=causal,
        scale=scale,
        key_keep=key_keep,
        empty=rule,
    )


_LIBRARY.impl("masked_sdpa", masked_sdpa, "CompositeImplicitAutograd")
_LIBRARY.impl("biased_sdpa", biased_sdpa, "CompositeImplicitAutograd")
_LIBRARY.impl("window_sdpa", window_sdpa, "CompositeImplicitAutograd")


def is_traced(*tensors: Tensor) -> bool:
    """Say whether the call is being recorded, so that the values of tensors must not be looked at."""
    return torch.compiler.is_compiling() or any(
        type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors
    )


def _seen(keep: Tensor, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    if not causal:
        return keep
    i = torch.arange(q.shape[-2], device=q.device)[:, None]
    return keep & (torch.arange(k.shape[-2], device=q.device)[None, :] <= i)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _over_queries(mask: Tensor, q: Tensor) -> Tensor:
    """Expand a mask with one row over all queries, as a view.

    The CPU kernel is faster on that than on a broadcast axis.
    """
    return mask.expand(-1, -1, q.shape[-2], -1) if mask.shape[-2] != q.shape[-2] else mask


def _added(seen: Tensor, bias: Tensor | None, fill: float, dtype: torch.dtype) -> Tensor:
    value = max(fill, torch.finfo(dtype).min) if math.isfinite(fill) else fill
    mask = torch.zeros((), dtype=dtype, device=seen.device).masked_fill(~seen, value)
    return mask if bias is None else mask + bias.to(dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float, grouped: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, _over_queries(added, q), scale=scale, enable_gqa=grouped)


def _spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor | None,
    safe: bool,
    scale: float,
    hidden: Tensor | None = None,
) -> Tensor:
    """Attend without the flash kernel, whose backward is wrong for rows that see nothing.

    Scores at ``hidden`` are replaced by the least number, which lets no gradient through; ``added`` does.
    If ``safe``, rows that see nothing are zeros, and so are their gradients.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    scores = scores if added is None else scores + added
    scores = scores if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    if safe:
        lost = scores == -math.inf
        lost = (lost if hidden is None else lost | hidden).all(-1, keepdim=True)
        scores = scores.masked_fill(lost, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32 if q.dtype != torch.float64 else None)
    return (weights.masked_fill(lost, 0.0) if safe else weights).to(q.dtype) @ v
