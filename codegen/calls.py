"""What a call of a spec has to look like, and how grouped heads share keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.codegen.dropout import check_seed
from attnc.ir import AttentionSpec


def check(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    seed: Tensor | None = None,
) -> None:
    """Raise if a call does not fit the spec; sizes may differ from the traced ones, head counts may not.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: head counts or the number of captured tensors are not the spec's, or the seed is not one
            int64 number.
    """
    if spec.dropout:
        check_seed(seed, spec.dropout)
    if len(captured) != len(spec.captured):
        raise ValueError(f"{spec}: expected {len(spec.captured)} captured tensors, found {len(captured)}")
    if q.shape[1] != k.shape[1] * spec.group_size or v.shape[1] != k.shape[1]:
        raise ValueError(
            f"attnc::attend: expected q [B, {spec.group_size} * Hkv, Sq, Dqk], k [B, Hkv, Sk, Dqk] and"
            f" v [B, Hkv, Sk, Dv], found q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )


def stack(x: Tensor, k: Tensor) -> Tensor:
    """Stack the query heads of each key/value head along the queries: ``[B, Hkv, group * Sq, D]``."""
    b, h, sq, d = x.shape
    hkv = k.shape[1]
    return x.reshape(b, hkv, h // hkv * sq, d)


def work_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype in which scores are computed, which is that of the log-sum-exp."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
