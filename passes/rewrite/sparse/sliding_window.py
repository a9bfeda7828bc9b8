"""A sliding window with sinks over a dense site.

BOUNDED, without retraining; the error falls to zero as the window grows to the length.

A causal site keeps ``0 <= q - k < window`` or ``k < sinks``; a bidirectional one ``|q - k| <= window`` or ``k
< sinks``; on top of the site's own mask. The knob is ``window``: what is dropped is the softmax mass beyond
it, so the output moves by at most that mass times the spread of the values. Source: StreamingLLM, section 3.2
(arXiv:2309.17453); Longformer, section 3.1 (arXiv:2004.05150).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.errors import RewriteError
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Band, Mask, Range, both, either
from attnc.passes.rewrite.sparse.patterns import hiding, is_causal, same_positions, whole


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
        whole(self.name, "window", self.window, 1)
        whole(self.name, "sinks", self.sinks, 0)
        if self.sinks > self.window:
            reach = f"at most window={self.window} sinks (its reach)"
            raise RewriteError(f"sliding_window: expected {reach}, found sinks={self.sinks}")
        if self.causal is not None and not isinstance(self.causal, bool):
            raise RewriteError(
                f"sliding_window: expected causal as True, False or None, found {self.causal!r}"
            )

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites whose queries and keys are not as many, and so not the same positions."""
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the window."""
        causal = is_causal(spec) if self.causal is None else self.causal
        band = Band(self.window - 1, 0) if causal else Band(self.window, self.window)
        window = either(band, Range("k", 0, self.sinks)) if self.sinks else band
        return both(spec.mask, *((Band(None, 0),) if causal and self.sinks else ()), window)

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the window; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))
