"""S2-Attention: every key/value head sees a local window and its own shard of far blocks, over a dense site.

BOUNDED in that all shards together hold every block; a dense model needs training to use it well.

With blocks ``i = q // block``, ``j = k // block`` and key/value head ``g``, a causal site keeps ``i - j <
local`` or ``(j + g * step + offset) % vertical == 0``, ``step = max(1, vertical // query heads)``; the last
``dense_heads`` key/value heads keep all.  A bidirectional site keeps, in every head, the blocks whose
distance beyond the window is a multiple of ``vertical``.  The knobs are ``local`` and ``vertical``.  Source:
Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads
(arXiv:2407.17678) and its released kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc import expr as E
from attnc.expr import Expr
from attnc.formula import POSITIONS, K, Q
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Formula, Mask, both
from attnc.passes.rewrite.sparse.patterns import hiding, is_causal, same_positions, whole


@dataclass(frozen=True, slots=True)
class S2:
    """Attend within ``local`` blocks, and to every ``vertical``-th block, another one in each head.

    Raises:
        RewriteError: an option is no whole number, or less than 1 (``dense_heads`` and ``offset``: 0).
    """

    block: int = 64
    local: int = 4
    vertical: int = 4
    dense_heads: int = 0
    offset: int = 0
    name: ClassVar[str] = "s2"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        for name, least, unit in (
            ("block", 1, "tokens"),
            ("local", 1, "blocks"),
            ("vertical", 1, "blocks"),
            ("dense_heads", 0, "heads"),
            ("offset", 0, "blocks"),
        ):
            whole(self.name, name, getattr(self, name), least, unit)

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse cross-attention, unknown numbers of heads, and shards that leave blocks to nobody."""
        heads = spec.q.shape[1]
        if not isinstance(heads, int):
            return Miss("s2-heads", "", f"the number of heads is {heads}")
        if is_causal(spec) and not self.dense_heads:
            step, kv_heads = max(1, self.vertical // heads), heads // spec.group_size
            seen = {-(g * step + self.offset) % self.vertical for g in range(kv_heads)}
            missing = sorted({*range(self.vertical)} - seen)
            if missing:
                why = f"{kv_heads} key/value heads see no far block j with j % {self.vertical} in {missing}"
                return Miss("s2-coverage", "", why)
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the shards."""
        i, j = (E.floordiv(x, E.integer(self.block)) for x in (Q, K))
        far = E.integer(self.local - 1)
        every = E.integer(self.vertical)
        if not is_causal(spec):
            beyond = E.add(_positive(E.sub(E.sub(i, j), far)), _positive(E.sub(E.sub(j, i), far)))
            return both(spec.mask, Formula(E.eq0(E.mod(beyond, every))))
        heads = spec.q.shape[1]
        assert isinstance(heads, int), "applies refuses other numbers"
        head = E.floordiv(POSITIONS["h"], E.integer(spec.group_size))
        shift = E.mul(head, E.integer(max(1, self.vertical // heads)))
        kept = [
            E.le0(E.sub(E.sub(i, j), far)),
            E.eq0(E.mod(E.add(j, shift, E.integer(self.offset)), every)),
        ]
        if self.dense_heads:
            kept.append(E.le0(E.sub(E.integer(heads // spec.group_size - self.dense_heads), head)))
        return both(spec.mask, Formula(E.or_(*kept)))

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the shards; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))


def _positive(x: Expr) -> Expr:
    return E.where(E.le0(x), E.ZERO, x)
