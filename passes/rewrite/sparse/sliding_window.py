"""A sliding window with sinks over a dense site.

BOUNDED, without retraining; the error falls to zero as the window grows to the length.

A causal site keeps ``0 <= q - k < window`` or ``k < sinks``; a bidirectional one ``|q - k| <= window`` or ``k
< sinks``; on top of the site's own mask. The knob is ``window``: what is dropped is the softmax mass beyond
it, so the output moves by at most that mass times the spread of the values. Source: StreamingLLM, section 3.2
(arXiv:2309.17453); Longformer, section 3.1 (arXiv:2004.05150).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from attnc.errors import RewriteError
from attnc.ir import AttentionSpec, Contract, Elementwise, Fill, Miss, RoundedSoftmax, Softmax
from attnc.masks import And, Band, Mask, Range, both, either


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RewriteError(
            f"sliding_window: expected {name} as a whole number of tokens >= {least}, found {value!r}"
        )


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Attend within ``window`` keys, and to the first ``sinks`` keys.

    The window includes the query's own key when causal, and reaches to either side when not.  ``causal`` None
    follows the site's own mask.

    Raises:
        RewriteError: ``window`` < 1, ``sinks`` < 0 or larger than the window's reach, or not whole numbers.
    """

    window: int
    sinks: int = 0
    causal: bool | None = None
    name: ClassVar[str] = "sliding_window"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        _whole("window", self.window, 1)
        _whole("sinks", self.sinks, 0)
        if self.sinks > self.window:
            reach = f"at most window={self.window} sinks (its reach)"
            raise RewriteError(f"sliding_window: expected {reach}, found sinks={self.sinks}")
        if self.causal is not None and not isinstance(self.causal, bool):
            raise RewriteError(
                f"sliding_window: expected causal as True, False or None, found {self.causal!r}"
            )

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites whose queries and keys are not as many, and so not the same positions."""
        queries, keys = spec.q.shape[2], spec.k.shape[2]
        if queries != keys:
            why = f"queries {queries} and keys {keys} are not the same positions"
            return Miss("window-needs-self-attention", "", why)
        if isinstance(spec.norm, Elementwise) and not spec.norm.hides:
            return Miss("window-norm", "", f"{spec.norm} gives hidden keys a weight")
        return None

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the window."""
        parts = spec.mask.parts if isinstance(spec.mask, And) else (spec.mask,)
        causal = (
            any(isinstance(p, Band) and p.right == 0 for p in parts) if self.causal is None else self.causal
        )
        band = Band(self.window - 1, 0) if causal else Band(self.window, self.window)
        window = either(band, Range("k", 0, self.sinks)) if self.sinks else band
        return both(spec.mask, *((Band(None, 0),) if causal and self.sinks else ()), window)

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the window; queries that see no key (padding) give zeros."""
        norm = Softmax() if isinstance(spec.norm, RoundedSoftmax) else spec.norm
        norm = replace(norm, safe=True) if isinstance(norm, Softmax) else norm
        return replace(spec, mask=self.mask(spec), fill=Fill(-math.inf), norm=norm)
