"""PowerAttention: a window of blocks, sink blocks, and the blocks at distances of powers of two.

BOUNDED; information of any block reaches any later one within logarithmically many layers.  Its authors train
models with it; over a dense model that was not trained so it loses quality, so judge it by the error.

With blocks ``i = q // block``, ``j = k // block``, a causal site keeps ``i - j < window``, ``j < sinks`` or
``i - j`` a power of two.  Source: PowerAttention: Exponentially Scaling of Receptive Fields for Effective
Sparse Attention; the defaults are those reported for 32K tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc import expr as E
from attnc.formula import K, Q
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Formula, Mask, both
from attnc.passes.rewrite.sparse.patterns import hiding, is_causal, same_positions, whole

MOST_TOKENS = 1 << 31
"""The longest sequence whose powers are written out, where the length is not fixed."""


@dataclass(frozen=True, slots=True)
class PowerAttention:
    """Attend within ``window`` blocks, to the first ``sinks`` blocks, and to blocks 1, 2, 4, 8, .. back.

    Raises:
        RewriteError: an option is no whole number, or less than 1 (``sinks``: 0).
    """

    block: int = 256
    window: int = 5
    sinks: int = 1
    name: ClassVar[str] = "power_attention"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        for name, least, unit in (("block", 1, "tokens"), ("window", 1, "blocks"), ("sinks", 0, "blocks")):
            whole(self.name, name, getattr(self, name), least, unit)

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites that are not causal self-attention."""
        if not is_causal(spec):
            return Miss(
                "pattern-needs-causal", "", f"power_attention looks back, the site's mask is {spec.mask}"
            )
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the blocks."""
        i, j = (E.floordiv(x, E.integer(self.block)) for x in (Q, K))
        back, tokens = E.sub(i, j), spec.q.shape[2]
        most = -(-(tokens if isinstance(tokens, int) else MOST_TOKENS) // self.block)
        kept = [E.le0(E.sub(back, E.integer(self.window - 1)))]
        if self.sinks:
            kept.append(E.le0(E.sub(j, E.integer(self.sinks - 1))))
        powers = (1 << n for n in range(most.bit_length()))
        kept += [E.eq0(E.sub(back, E.integer(p))) for p in powers if self.window <= p < most]
        return both(spec.mask, Formula(E.or_(*kept)))

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the blocks; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))
