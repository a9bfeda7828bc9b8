"""The fused form: the same function, by the best kernel of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc.ir import AttentionSpec, Contract, Miss


@dataclass(frozen=True, slots=True)
class Fused:
    """Run the spec as found."""

    name: ClassVar[str] = "fused"
    contract: ClassVar[Contract] = "SAME"

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Every spec can be fused."""
        return None

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec itself."""
        return spec
