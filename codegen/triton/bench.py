"""Compute what an emitted file needs to time itself: sizes, and the same computation in torch."""

from __future__ import annotations

import math
from typing import Any

from attnc.ir import AttentionSpec, Scale, Softmax
from attnc.masks import CAUSAL, Full

BATCH, HEADS, TOKENS = 2, 8, 4096
"""Batch, query heads that are aimed at, and tokens: enough work for a GPU, and room for all the scores."""


def bench_holes(spec: AttentionSpec, tokens: tuple[int, int] | None) -> dict[str, Any]:
    """Return the holes of ``_bench`` for a canonical spec.

    ``tokens`` are the numbers of queries and keys, None where a file does not time itself.
    """
    heads = max(1, HEADS // spec.group_size)
    # In half precision a finite fill would overflow.
    plain = isinstance(spec.mask, Full) or spec.fill.value == -math.inf
    return {
        "bench": "" if tokens is None else (BATCH, heads, *tokens),
        "plain_dtype": "DTYPE" if plain else "torch.float32",
        "sdpa": sdpa_options(spec),
    }


def sdpa_options(spec: AttentionSpec) -> str:
    """Return the options by which torch's SDPA computes a spec, '' if it has no such thing."""
    scaled = all(isinstance(step, Scale) for step in spec.scores)
    masked = isinstance(spec.mask, Full) or (spec.mask == CAUSAL and spec.fill.value == -math.inf)
    plain = type(spec.norm) is Softmax and spec.norm.sink is None and not spec.captured
    if not (scaled and masked and plain):
        return ""
    options = [f"scale={spec.scale!r}", *([f"dropout_p={spec.dropout!r}"] if spec.dropout else [])]
    options += ["is_causal=True"] if spec.mask == CAUSAL else []
    options += ["enable_gqa=True"] if spec.group_size > 1 else []
    return ", ".join(options)
