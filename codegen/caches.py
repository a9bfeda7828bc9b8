"""Attention over keys that lie in pieces, in plain torch: pages, and parts merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.codegen.ops import execute
from attnc.ir import AttentionSpec, Operand


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention over all keys from the (out, lse) over each of several sets of them.

    ``out`` is ``[B, H, Sq, Dv]`` and ``lse`` ``[B, H, Sq]``, a natural logarithm.  The sets are disjoint and
    all parts have one spec, a softmax without a sink, which each part would count anew.  A part in which a
    row saw nothing (lse -inf) adds nothing to it, whatever its ``out`` holds; a row that saw nothing in any
    part gets zeros.  A row to which a finite fill hides every key of every part gets the mean of its parts.
    Source: FlashAttention (arXiv:2205.14135), section 3.1, the softmax of concatenated blocks.

    Raises:
        ValueError: there are no parts, or their shapes differ.
    """
    shapes = [(tuple(out.shape), tuple(lse.shape)) for out, lse in parts]
    if not shapes or any(s != shapes[0] or s[0][:3] != s[1] for s in shapes):
        raise ValueError(
            f"merge: expected parts [B, H, Sq, Dv] and [B, H, Sq] of one shape, found {shapes or 'none'}"
        )
    sums = torch.stack([lse for _, lse in parts])
    weights = torch.softmax(sums, 0).nan_to_num(0.0)  # NaN: every part is -inf
    out = torch.zeros_like(parts[0][0], dtype=sums.dtype)
    for weight, (x, _) in zip(weights[..., None], parts, strict=True):
        out = out + torch.where(weight > 0, weight * x, 0.0)
    return out.to(parts[0][0].dtype), torch.logsumexp(sums, 0)


def execute_paged(
    spec: AttentionSpec,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Run a spec for each sequence on the keys that it has in pages; return (out, lse) as ``execute`` does.

    ``q`` is ``[B, H, Sq, Dqk]``, ``k_cache`` ``[pages, page size, Hkv, Dqk]``, ``v_cache`` ``[pages, page
    size, Hkv, Dv]``, ``block_table`` ``[B, M]`` of int32 or int64: the pages of each sequence in order.
    Sequence b has ``seqlens[b]`` keys (int32), at most ``M * page size``, which is also the length of a
    captured tensor along the keys.  Entries of the table past them are not looked at.

    Raises:
        ValueError: a shape or a dtype is none of these, or a length is more than the table has room for.
    """
    from attnc.codegen.triton.holes import places  # that package imports this module

    room = _room(q, k_cache, v_cache, block_table, seqlens)
    lengths = seqlens.tolist()
    if any(not 0 <= n <= room for n in lengths):
        raise ValueError(f"seqlens: expected lengths of 0 to {room}, found {lengths}")
    page, parts = k_cache.shape[1], []
    for b, n in enumerate(lengths):
        pages = block_table[b, : -(-n // page)].long()
        # A sequence that computes with its number keeps it: those before it come along.
        entries = slice(0 if "batch" in places(spec) else b, b + 1)
        some = q[entries]
        k, v = (
            x[pages].flatten(0, 1)[:n].transpose(0, 1).expand(len(some), -1, -1, -1)
            for x in (k_cache, v_cache)
        )
        own = [_own(o, x, entries, n) for o, x in zip(spec.captured, captured, strict=True)]
        parts.append([x[-1:] for x in execute(spec, some, k, v, own)])
    if not parts:
        return q.new_empty((*q.shape[:3], v_cache.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _own(operand: Operand, x: Tensor, entries: slice, n: int) -> Tensor:
    """Return what of a captured tensor belongs to some batch entries, and to so many keys."""
    if operand.axes[0] == "b" and x.shape[0] > 1:
        x = x[entries]
    return x[..., :n] if operand.axes[-1] == "k" and x.shape[-1] > 1 else x


def _room(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqlens: Tensor) -> int:
    """Return how many keys a row of the table has room for; raise if the tensors do not fit each other."""
    batch, kv_heads, dqk = q.shape[0], k_cache.shape[-2], q.shape[-1]
    pages = (*k_cache.shape[:2], kv_heads)
    wanted = {
        "q": (q, (batch, *q.shape[1:3], dqk), (q.dtype,)),
        "k_cache": (k_cache, (*pages, dqk), (q.dtype,)),
        "v_cache": (v_cache, (*pages, v_cache.shape[-1]), (v_cache.dtype,)),
        "block_table": (block_table, (batch, block_table.shape[-1]), (torch.int32, torch.int64)),
        "seqlens": (seqlens, (batch,), (torch.int32,)),
    }
    for name, (x, shape, dtypes) in wanted.items():
        if tuple(x.shape) != shape or x.dtype not in dtypes:
            either = " or ".join(map(str, dtypes))
            raise ValueError(f"{name}: expected {either} {list(shape)}, found {x.dtype} {list(x.shape)}")
    return block_table.shape[1] * k_cache.shape[1]
