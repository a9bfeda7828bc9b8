"""Execute a spec over packed sequences in plain torch, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attnc.codegen.calls import work_dtype
from attnc.codegen.ops import execute, gradients
from attnc.codegen.triton.holes import places
from attnc.ir import AttentionSpec


def execute_packed(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Return out ``[Tq, H, Dv]`` and the log-sum-exp ``[H, Tq]``; arguments as those of ``run_varlen``.

    Reads ``cu_q`` and ``cu_k``, and so waits for a GPU.

    Raises:
        UnsupportedError, ValueError: as ``attnc.codegen.ops.execute``.
    """
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=work_dtype(q))
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for b, ((first, last), (low, high)) in enumerate(bounds):
        # A sequence that computes with its number keeps it: those before it come along.
        entries = slice(0 if "batch" in places(spec) else b, b + 1)
        queries, keys, values = (
            x[None].transpose(1, 2).expand(entries.stop - entries.start, -1, -1, -1)
            for x in (q[first:last], k[low:high], v[low:high])
        )
        pairs = zip(captured, spec.captured, strict=True)
        rest = [_cut(x, o.axes, entries, last - first, high - low) for x, o in pairs]
        some, sums = execute(spec, queries, keys, values, rest)
        out[first:last], lse[:, first:last] = some[-1].transpose(0, 1), sums[-1]
    return out, lse


def packed_gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    captured: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of those of (q, k, v, *captured) that ``needs`` marks, in plain torch.

    A gradient ``dout`` ``[Tq, H, Dv]`` or ``dlse`` ``[H, Tq]`` of None stands for zeros.  What sequences
    share has the sum of their gradients, what belongs to no token has zeros.

    Raises:
        UnsupportedError, ValueError: as ``attnc.codegen.ops.gradients``.
    """
    inputs = (q, k, v, *captured)
    wide = [torch.promote_types(x.dtype, work_dtype(q)) if x.is_floating_point() else x.dtype for x in inputs]
    sums = [torch.zeros_like(x, dtype=dtype) for x, dtype in zip(inputs, wide, strict=True)]
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for b, ((first, last), (low, high)) in enumerate(bounds):
        count = b + 1 if "batch" in places(spec) else 1  # copies, the last of which has the sequence's number
        tokens = (slice(first, last), slice(low, high), slice(low, high))
        own = [
            _copies(x[n].transpose(0, 1)[None], "bhqk", count) for x, n in zip(inputs, tokens, strict=False)
        ]
        at = slice(b, b + 1), last - first, high - low
        for x, dtype, o in zip(captured, wide[3:], spec.captured, strict=True):
            own.append(_copies(_cut(x, o.axes, *at).to(dtype), o.axes, count))
        dy = None if dout is None else _last(dout[first:last].transpose(0, 1)[None], count)
        dl = None if dlse is None else _last(dlse[None, :, first:last], count)
        found = iter(gradients(spec, own[0], own[1], own[2], own[3:], dy, dl, needs))
        for i, total in enumerate(sums):
            if needs[i] and i < 3:
                total[tokens[i]] = next(found)[-1].transpose(0, 1)
            elif needs[i]:
                o, g = spec.captured[i - 3], next(found)
                part = _cut(total, o.axes, *at)
                part += (g[-1:] if count > 1 and o.axes[:1] == "b" else g).sum_to_size(part.shape)
    return [s.to(x.dtype) for s, x, need in zip(sums, inputs, needs, strict=True) if need]


def _copies(x: Tensor, axes: str, count: int) -> Tensor:
    """Return so many batch entries of a tensor of one, where it has such an axis."""
    if count == 1 or axes[:1] != "b":
        return x
    whole = x[(None,) * (len(axes) - x.dim())]
    return whole.expand(count, *whole.shape[1:])


def _last(x: Tensor, count: int) -> Tensor:
    """Return so many batch entries, zeros but for the last."""
    return torch.cat([x.new_zeros(count - 1, *x.shape[1:]), x])


def _cut(x: Tensor, axes: str, entries: slice, sq: int, sk: int) -> Tensor:
    """Return what of a captured tensor belongs to some batch entries and to so many tokens of each.

    ``axes`` ends with the tensor's own; those of size 1 broadcast.
    """
    part = {"b": entries, "h": slice(None), "q": slice(sq), "k": slice(sk)}
    own = axes[len(axes) - x.dim() :]
    return x[tuple(part[a] if n > 1 else slice(None) for a, n in zip(own, x.shape, strict=True))]
