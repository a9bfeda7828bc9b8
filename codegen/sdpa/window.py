"""Lower a sliding window with sinks to plain ``scaled_dot_product_attention`` over overlapping views.

With blocks of ``c`` queries, block ``i`` needs the keys from ``left`` before its first query to ``right``
after its last: always ``L = c + left + right`` of them.  So all blocks are one call, whose K and V are
*views* with overlapping rows (``unfold``; nothing is copied), and whose mask ``[c, L]`` is the same for every
block.  Blocks whose window reaches over the first or the last key are done by ordinary masked calls.  Work
falls from ``Sq * Sk`` to ``Sq * L`` pairs; no compiler is needed, and autograd works.

Sink keys would have to be copied in front of every block's keys.  Instead the sinks are copied in front of
every ``c`` keys, ``[sinks | c keys | sinks | c keys ...]``, which is again a layout of overlapping views: a
block sees several copies, and the common mask hides all but the first.  One softmax, so no key counts twice
and no merge by log-sum-exp is needed.

Source: sliding windows as in Longformer (arXiv:2004.05150, section 3.1); sinks as in StreamingLLM
(arXiv:2309.17453, section 3.2); definitions in forms/static_sparse, section 3 of the project's design notes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from attnc import logs
from attnc.errors import UnsupportedError

Empty = Literal["zero", "nan"]
log = logs.get("lower")

_BLOCK = 64  # queries per block: less waste than 128, fewer calls of the kernel than 32
_DEARER = 1.6  # time of a pair in small blocks over that of a pair in one large call (measured, float32)
_OVERHEAD = 2**17  # pairs (times heads and batch) that take as long as making the views and two more calls


@dataclass(frozen=True)
class _Band:
    """Which keys a query sees, in tokens; ``q + offset`` is the query's position among the keys."""

    left: int
    right: int
    sinks: int
    causal: bool
    offset: int

    def keep(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return bool ``[len(q), len(k)]`` for query indices ``q`` and key indices ``k``."""
        d = q[:, None] + self.offset - k[None, :]
        ok = (d >= -self.right) & (d <= self.left) | (k < self.sinks)
        return ok & (d >= 0) if self.causal else ok

    def leaves_a_row_empty(self, start: int, stop: int, sk: int) -> bool:
        """Say whether one of the queries ``start..stop-1`` sees none of ``sk`` keys."""
        first, last = start + self.offset, stop - 1 + self.offset
        if first < 0 and self.causal:
            return True
        misses = first + self.right < 0 or last - self.left >= sk
        return sk == 0 or (misses and min(self.sinks, sk) == 0)

    def is_plain_causal(self, stop: int) -> bool:
        """Say whether queries ``0..stop-1`` see exactly the keys up to their own index."""
        return self.causal and self.offset == 0 and stop - 1 <= self.left + self.sinks

    def is_full(self, start: int, stop: int, sk: int) -> bool:
        """Say whether queries ``start..stop-1`` see every one of ``sk`` keys."""
        first, last = start + self.offset, stop - 1 + self.offset
        return first + self.right >= sk - 1 and last - self.left <= self.sinks


@dataclass(frozen=True)
class _Call:
    """What every masked call shares: q ``[B, H, Sq, D]``, k and v ``[B, Hk, Sk, D]``, and their meaning."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_keep: torch.Tensor | None
    band: _Band
    scale: float
    empty: Empty


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    sinks: int = 0,
    causal: bool,
    scale: float | None,
    key_keep: torch.Tensor | None = None,
    offset: int = 0,
    empty: Empty = "zero",
) -> torch.Tensor:
    """Return softmax attention ``[B, H, Sq, Dv]`` to the keys inside a window and to the sinks.

    A pair is kept if ``-right <= p - k <= left`` or ``k < sinks``, with ``p = q + offset`` the query's
    position among the keys, and, if ``causal``, only where ``k <= p``.  A causal window of W keys, the
    query's own included, is ``left=W-1, right=0``.  The result is that of the dense masked softmax, up to the
    order of additions; so are the gradients.

    Args:
        q: queries ``[B, H, Sq, D]``.
        k: keys ``[B, Hk, Sk, D]``; ``Hk`` divides ``H``; query head ``h`` reads key head ``h // (H / Hk)``.
        v: values ``[B, Hk, Sk, Dv]``.
        left: visible keys before the query, in tokens.
        right: visible keys after the query, in tokens.
        sinks: first keys that every query sees, in tokens.
        causal: whether keys after the query are hidden, sinks included.
        scale: factor on the scores; None is ``D ** -0.5``.
        key_keep: bool ``[B, Sk]``, False where a key is padding; None keeps all.
        offset: added to a query's index; ``Sk - Sq`` lines the last query up with the last key.
        empty: what a query that sees no key gives: zeros, or NaN.

    Raises:
        UnsupportedError: operands of another rank, or whose sizes do not fit; a negative reach or number
            of sinks.
    """
    _check(q, k, v, left, right, sinks, key_keep, empty)
    causal = causal or (right == 0 and sinks == 0)
    band = _Band(left, 0 if causal else right, sinks, causal, offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dv, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    # The fused kernel wants one head size; zeros change neither scores nor the outputs that are kept
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
    call = _Call(q, k, v, key_keep, band, scale, empty)
    sq, sk, size = q.shape[2], k.shape[2], _block_size(band)
    start, count = _interior_blocks(band, sq, sk, size)
    if not _pays(call, start, count, size):
        return _dense(call, 0, sq)[..., :dv]
    stop = start + count * size
    log.debug("window: %d blocks of %d queries, edges of %d and %d", count, size, start, sq - stop)
    parts = [_interior(call, start, count, size)]
    if start > 0:
        parts.insert(0, _dense(call, 0, start))
    if stop < sq:
        parts.append(_dense(call, stop, sq))
    return (torch.cat(parts, 2) if len(parts) > 1 else parts[0])[..., :dv]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    sinks: int,
    key_keep: torch.Tensor | None,
    empty: str,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]
    if not (fits and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0):
        raise UnsupportedError(
            "window_attention: expected q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] "
            f"with Hk dividing H, found {shapes}"
        )
    if min(left, right, sinks) < 0:
        raise UnsupportedError(
            "window_attention: expected left, right and sinks >= 0, "
            f"found left={left}, right={right}, sinks={sinks}"
        )
    if empty not in ("zero", "nan"):
        raise UnsupportedError(f"window_attention: expected empty='zero' or 'nan', found {empty!r}")
    if key_keep is not None and (key_keep.dtype != torch.bool or key_keep.shape != (k.shape[0], k.shape[2])):
        found = f"{key_keep.dtype} {tuple(key_keep.shape)}"
        raise UnsupportedError(
            f"window_attention: expected key_keep bool [B, Sk] for {shapes}, found {found}"
        )


def _block_size(band: _Band) -> int:
    """Minimise the keys per block, ``(c + reach) * (1 + sinks / c)``, over the block size ``c``."""
    best = math.sqrt(band.sinks * (band.left + band.right))
    return min(512, max(_BLOCK, 32 * round(best / 32)))


def _interior_blocks(band: _Band, sq: int, sk: int, size: int) -> tuple[int, int]:
    """Return the first query whose window starts after the sinks, and how many blocks fit from there on."""
    start = max(0, band.sinks + band.left - band.offset)
    stop = min(sq, sk - band.right - band.offset)
    return start, max(0, stop - start) // size


def _pays(call: _Call, start: int, count: int, size: int) -> bool:
    """Say whether blocks take less time than one masked call, by the number of pairs that each computes."""
    band, (batch, heads, sq), sk = call.band, call.q.shape[:3], call.k.shape[2]
    if count == 0:
        return False
    stop, reach = start + count * size, size + band.left + band.right
    blocks = count * size * (reach + band.sinks * -(-reach // size))
    head = start * min(sk, max(start + band.offset + band.right, band.sinks))
    tail = (sq - stop) * (band.sinks + sk - max(0, stop + band.offset - band.left))
    known = batch * heads if isinstance(batch, int) else heads
    return (sq * sk - _DEARER * (blocks + head + tail)) * known > _OVERHEAD


def _dense(call: _Call, start: int, stop: int) -> torch.Tensor:
    """Compute queries ``start..stop-1`` by one masked call over the keys that any of them may see."""
    band, sk, device = call.band, call.k.shape[2], call.q.device
    q = call.q[:, :, start:stop]
    if call.key_keep is None and start == 0 and band.is_plain_causal(stop):
        hi = min(sk, stop)
        k, v = call.k[:, :, :hi], call.v[:, :, :hi]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=call.scale, enable_gqa=_grouped(q, k)
        )
    lo = min(max(0, start + band.offset - band.left), sk)
    hi = min(sk, max(lo, stop + band.offset + band.right))
    take = [slice(lo, hi)]
    if 0 < band.sinks < lo:
        take.insert(0, slice(0, band.sinks))
    elif band.sinks:
        take = [slice(0, max(hi, min(band.sinks, sk)))]
    keys = torch.cat([torch.arange(s.start, s.stop, device=device) for s in take])
    k, v = (_pick(t, take) for t in (call.k, call.v))
    if call.key_keep is None and band.is_full(start, stop, sk):
        return F.scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=_grouped(q, k))
    keep = band.keep(torch.arange(start, stop, device=device), keys)
    empty = call.key_keep is not None or band.leaves_a_row_empty(start, stop, sk)
    if call.key_keep is not None:
        keep = keep & torch.cat([call.key_keep[:, s] for s in take], 1)[:, None, None, :]
    mask, hidden = _float_mask(keep, q.dtype, empty)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale, enable_gqa=_grouped(q, k))
    return _fill(out, hidden, call.empty)


def _pick(t: torch.Tensor, take: list[slice]) -> torch.Tensor:
    parts = [t[:, :, s] for s in take]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _grouped(q: torch.Tensor, k: torch.Tensor) -> bool:
    return q.shape[1] != k.shape[1]


def _float_mask(
    keep: torch.Tensor, dtype: torch.dtype, may_be_empty: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the additive mask of ``keep`` ``[..., q, k]``, and the rows that see nothing ``[..., q, 1]``.

    Such a row is given every key, so that no kernel meets a row of -inf; ``_fill`` then replaces its output,
    and with it its gradient.
    """
    hidden = ~keep.any(-1, keepdim=True) if may_be_empty else None
    if hidden is not None:
        keep = keep | hidden
    return torch.zeros_like(keep, dtype=dtype).masked_fill_(~keep, -torch.inf), hidden


def _fill(out: torch.Tensor, hidden: torch.Tensor | None, empty: Empty) -> torch.Tensor:
    return out if hidden is None else out.masked_fill(hidden, 0.0 if empty == "zero" else torch.nan)


def _blocks(x: torch.Tensor, first: int, count: int, size: int, reach: int, sinks: int) -> torch.Tensor:
    """View ``x`` ``[B, Hk, Sk, D]`` as ``[B, Hk, count, L, D]``, block ``i`` from row ``first + i*size`` on.

    Nothing is copied without sinks, and then ``L = reach``.  With sinks, they stand before every ``size``
    rows, and ``L = reach + sinks * ceil(reach / size)``.
    """
    body = x[:, :, first : first + (count - 1) * size + reach]
    if sinks == 0:
        return body.unfold(2, reach, size).transpose(-1, -2)
    groups = count - 1 + -(-reach // size)
    body = F.pad(body, (0, 0, 0, groups * size - body.shape[2]))
    body = torch.unflatten(body, 2, (groups, size))
    sink = x[:, :, None, :sinks].expand(-1, -1, groups, -1, -1)
    mixed = torch.cat([sink, body], 3).flatten(2, 3)
    return mixed.unfold(2, reach + sinks * -(-reach // size), size + sinks).transpose(-1, -2)


def _block_keep(band: _Band, size: int, reach: int, device: torch.device) -> torch.Tensor:
    """Return bool ``[size, L]``, the mask common to all blocks laid out by ``_blocks``."""
    period = size + band.sinks
    column = torch.arange(reach + band.sinks * -(-reach // size), device=device)
    group, place = column // period, column % period
    row = torch.arange(size, device=device)[:, None]
    ahead = group * size + place - band.sinks - row  # keys from the left end of the query's window
    return torch.where(place < band.sinks, group == 0, (ahead >= 0) & (ahead <= band.left + band.right))


def _interior(call: _Call, start: int, count: int, size: int) -> torch.Tensor:
    """Compute ``count`` blocks of queries from ``start`` on, none of which meets an edge."""
    band, reach = call.band, size + call.band.left + call.band.right
    first = start + band.offset - band.left
    q = torch.unflatten(call.q[:, :, start : start + count * size], 2, (count, size))
    k, v = (
        _blocks(t if t.stride(-1) == 1 else t.contiguous(), first, count, size, reach, band.sinks)
        for t in (call.k, call.v)
    )
    keep, hidden = _block_keep(band, size, reach, q.device), None
    if call.key_keep is None:
        mask, _ = _float_mask(keep, q.dtype, False)
    else:
        rows = _blocks(call.key_keep[:, None, :, None], first, count, size, reach, band.sinks)
        mask, hidden = _float_mask(keep & rows[:, 0].transpose(-1, -2), q.dtype, True)
    out = _attend(q, k, v, mask, call.scale)
    return _fill(out, None if hidden is None else hidden[:, None], call.empty).flatten(2, 3)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend block by block: q ``[B, H, n, c, D]``, k and v ``[B, Hk, n, L, D]``, mask ``[(B, n,) c, L]``.

    The fused kernel takes two leading dimensions.  Blocks are one; batch and heads are the other where their
    strides allow a view, else there is a call for each batch element or each head, whichever are fewer.
    Expanding or copying K would cost what the blocks save.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        per_group = torch.unflatten(q, 1, (k.shape[1], groups)).unbind(2)
        return torch.stack([_attend(one, k, v, mask, scale) for one in per_group], 2).flatten(1, 2)
    batch, heads = k.shape[:2]
    fixed = isinstance(batch, int)
    if fixed and (batch == 1 or all(t.stride(0) == heads * t.stride(1) for t in (k, v))) and mask.dim() == 2:
        qs, ks, vs = (t.flatten(0, 1) for t in (q, k, v))
        out = F.scaled_dot_product_attention(qs, ks, vs, mask, scale=scale)
        return out.view(batch, heads, *out.shape[1:])
    dim = 1 if not fixed or heads <= batch else 0
    masks = [mask] * q.shape[dim]
    if mask.dim() == 4 and dim == 0:
        masks = list(mask[:, None].unbind(0))
    # The backward of unbind is one stack; that of indexing would be a tensor of zeros for each piece
    each = zip(q.unbind(dim), k.unbind(dim), v.unbind(dim), masks, strict=True)
    return torch.stack([F.scaled_dot_product_attention(*one, scale=scale) for one in each], dim)
