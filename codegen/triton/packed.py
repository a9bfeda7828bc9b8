"""Execute a spec over packed sequences in plain torch, one sequence after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attnc.codegen.ops import execute
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
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))
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


def _cut(x: Tensor, axes: str, entries: slice, sq: int, sk: int) -> Tensor:
    """Return what of a captured tensor belongs to some batch entries and to so many tokens of each.

    ``axes`` ends with the tensor's own; those of size 1 broadcast.
    """
    part = {"b": entries, "h": slice(None), "q": slice(sq), "k": slice(sk)}
    own = axes[len(axes) - x.dim() :]
    return x[tuple(part[a] if n > 1 else slice(None) for a, n in zip(own, x.shape, strict=True))]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
