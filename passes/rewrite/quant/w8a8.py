"""W8A8 linear layers: int8 weights per output channel, int8 activations per row, chosen at run time.

BOUNDED.

Each product is off by at most half a step of either scale times the other side's sum of magnitudes
(forms/quantized, section 0.1); there is no knob but which layers take part.  Source: dynamic quantization as
in LLM.int8() without outliers (arXiv:2208.07339, section 2), symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from attnc.errors import RewriteError
from attnc.ir import AttentionSpec, Contract, Miss


@dataclass(frozen=True, slots=True)
class W8A8:
    """Quantize the linear layers that feed and follow attention sites.

    (``scope="projections"``), or ``"all"`` of the model.

    Raises:
        RewriteError: another scope.
    """

    scope: Literal["projections", "all"] = "projections"
    name: ClassVar[str] = "w8a8"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        if self.scope not in ("projections", "all"):
            raise RewriteError(f"w8a8: expected scope 'projections' or 'all', found {self.scope!r}")

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Linear layers do not depend on the spec."""
        return None

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec itself: the site keeps its arithmetic."""
        return spec
