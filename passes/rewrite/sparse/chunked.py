"""Attention within chunks of consecutive tokens, over a dense site.

BOUNDED, without retraining; the error falls to zero as the chunk grows to the length.

A query sees the keys of its own chunk, ``q // size == k // size``, on top of the site's own mask.  The knob
is ``size``: what is dropped is the softmax mass outside the chunk.  Source: the chunked layers of Llama 4;
Recurrent Memory-Augmented Transformers with Chunked Attention (the local branch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.formula_text import chunk
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Formula, Mask, both
from attnc.passes.rewrite.sparse.patterns import hiding, same_positions, whole


@dataclass(frozen=True, slots=True)
class Chunked:
    """Attend within chunks of ``size`` tokens; the last chunk may be short.

    Raises:
        RewriteError: ``size`` is no whole number of at least 1.
    """

    size: int
    name: ClassVar[str] = "chunked"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        whole(self.name, "size", self.size, 1)

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites whose queries and keys are not the same positions."""
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the chunks."""
        return both(spec.mask, Formula(chunk(self.size)))

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the chunks; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))
