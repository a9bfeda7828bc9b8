"""What forms share that hide keys by their positions: they need self-attention, and hide for good."""

from __future__ import annotations

import math
from dataclasses import replace

from attnc.errors import RewriteError
from attnc.ir import AttentionSpec, Elementwise, Fill, Miss, RoundedSoftmax, Softmax
from attnc.masks import And, Band, Mask


def whole(form: str, name: str, value: object, least: int, unit: str = "tokens") -> None:
    """Refuse an option that is no whole number of at least ``least``.

    Raises:
        RewriteError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RewriteError(f"{form}: expected {name} as a whole number of {unit} >= {least}, found {value!r}")


def same_positions(spec: AttentionSpec) -> Miss | None:
    """Refuse sites whose queries and keys are other positions, or where a hidden key weighs something."""
    queries, keys = spec.q.shape[2], spec.k.shape[2]
    if queries != keys:
        why = f"queries {queries} and keys {keys} are not the same positions"
        return Miss("pattern-needs-self-attention", "", why)
    if isinstance(spec.norm, Elementwise) and not spec.norm.hides:
        return Miss("pattern-norm", "", f"{spec.norm} gives hidden keys a weight")
    return None


def is_causal(spec: AttentionSpec) -> bool:
    """Say whether the site's own mask hides all keys after the query."""
    parts = spec.mask.parts if isinstance(spec.mask, And) else (spec.mask,)
    return any(isinstance(p, Band) and p.right == 0 for p in parts)


def hiding(spec: AttentionSpec, mask: Mask) -> AttentionSpec:
    """Return the spec under ``mask``; queries that see no key (padding) give zeros."""
    norm = Softmax() if isinstance(spec.norm, RoundedSoftmax) else spec.norm
    norm = replace(norm, safe=True) if isinstance(norm, Softmax) else norm
    return replace(spec, mask=mask, fill=Fill(-math.inf), norm=norm)
