"""Give rows that see no key what the spec gives them: FlexAttention leaves zeros there.

By the spec such a row is NaN (fill -inf), zeros (safe softmax, or a sink), or spread over all keys (a finite
fill).  A row whose output is all zeros is suspected; the few suspects are computed again from the spec, in
chunks, never as a whole score matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnc.codegen.flex.source import block_mask
from attnc.ir import AttentionSpec, Bias
from attnc.masks import Full, may_hide_a_whole_row

CHUNK = 1 << 22
"""The most scores computed at a time."""


def may_need_repair(spec: AttentionSpec, sq: int, sk: int) -> bool:
    """Say whether flex's zeros may be wrong for some row: one that sees no key, or whose bias is all -inf."""
    biased = any(isinstance(s, Bias) for s in spec.scores)
    spread = not isinstance(spec.mask, Full) and math.isfinite(spec.fill.value)
    zeros = spec.norm.safe and spec.norm.sink is None and not spread
    return (biased or may_hide_a_whole_row(block_mask(spec), sq, sk)) and not zeros


def repair(
    out: Tensor,
    spec: AttentionSpec,
    modifiers: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
) -> Tensor:
    """Compute the rows of ``out`` ``[B, H, Sq, Dv]`` that are all zeros again, in place, and return it."""
    lost = ~(out != 0).any(-1)
    if not bool(lost.any()):
        return out
    named = {o.name: x for o, x in zip(spec.captured, captured, strict=True)}
    step = max(1, CHUNK // (q.shape[1] * k.shape[2]))
    for b in lost.any(-1).any(-1).nonzero().flatten().tolist():
        for rows in torch.split(lost[b].any(0).nonzero().flatten(), step):
            exact = _rows(spec, modifiers, b, rows, q[b], k[b], v[b], named)
            out[b, :, rows] = torch.where(lost[b][:, rows, None], exact.to(out.dtype), out[b, :, rows])
    return out


def _rows(
    spec: AttentionSpec,
    modifiers: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    b: int,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    named: dict[str, Tensor],
) -> Tensor:
    """Return ``[H, R, Dv]`` for the queries ``rows`` of batch element ``b``.

    q is ``[H, Sq, D]``, k ``[Hkv, Sk, D]``, v ``[Hkv, Sk, Dv]``.
    """
    score_mod, mask_mod = modifiers
    h, r, sk = q.shape[0], rows.shape[0], k.shape[1]
    stacked = q[:, rows].float().reshape(k.shape[0], -1, q.shape[2])
    scores = (stacked @ k.float().mT).view(1, h, r, sk) * spec.scale
    at = (
        torch.full((1, 1, 1, 1), b, device=q.device),
        torch.arange(h, device=q.device).view(1, h, 1, 1),
        rows.view(1, 1, r, 1),
        torch.arange(sk, device=q.device).view(1, 1, 1, sk),
    )
    scores = score_mod(scores, *at)
    if not isinstance(block_mask(spec), Full):
        scores = spec.fill.apply(scores, mask_mod(*at).expand_as(scores))
    weights, _ = spec.norm.apply(scores, named)
    return (weights.reshape(k.shape[0], -1, sk) @ v.float()).view(h, r, v.shape[2])
