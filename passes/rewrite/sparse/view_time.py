"""Fused view-time attention: a token sees all times of its view, and all views of its time.

BOUNDED over a dense site; its authors fine-tune the self-attention with it.

Tokens are views by times by the tokens of a frame, in this order: ``v(q) == v(k)`` or ``t(q) == t(k)``.
There is no knob: the share of pairs that is kept is ``(views + times - 1) / (views * times)``.  Source:
4Real-Video-V2: Fused View-Time Attention and Feedforward Reconstruction for 4D Scene Generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnc import expr as E
from attnc.formula import K, Q
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Formula, Mask, both
from attnc.passes.rewrite.sparse.patterns import hiding, same_positions, whole


@dataclass(frozen=True, slots=True)
class ViewTime:
    """Attend within one's view and one's time, of ``views * times`` frames of ``frame`` tokens.

    Raises:
        RewriteError: an option is no whole number of at least 1.
    """

    views: int
    times: int
    frame: int
    name: ClassVar[str] = "view_time"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        for name, unit in (("views", "views"), ("times", "times"), ("frame", "tokens")):
            whole(self.name, name, getattr(self, name), 1, unit)

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites whose tokens are not those of the frames."""
        tokens = self.views * self.times * self.frame
        if spec.q.shape[2] != tokens and spec.q.shape[2] == spec.k.shape[2]:
            frames = f"{self.views} views of {self.times} frames of {self.frame} tokens"
            return Miss("pattern-tokens", "", f"{frames} are {tokens} tokens, the site has {spec.q.shape[2]}")
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask, views and times."""
        if self.views == 1 or self.times == 1:
            return spec.mask
        frames = [E.floordiv(x, E.integer(self.frame)) for x in (Q, K)]
        views = [E.floordiv(x, E.integer(self.times)) for x in frames]
        times = [E.mod(x, E.integer(self.times)) for x in frames]
        return both(spec.mask, Formula(E.or_(*(E.eq0(E.sub(*x)) for x in (views, times)))))

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with views and times; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))
