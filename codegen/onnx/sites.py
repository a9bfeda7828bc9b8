"""Say what an attention site asks of a fused operator, in the few words that such operators have.

A fused operator computes ``softmax(softcap(scale * q k^T) + bias [+ causal or window])`` and no more, so a
spec fits if its steps fold into that shape.  ``Folded`` is that shape; ``Split`` says which part of the mask
can be an attribute and which part must be written into the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnc.ir import AttentionSpec, Bias, Pointwise, Scale, Softcap, Softmax, Step
from attnc.masks import And, Band, Full, Mask, both, may_hide_a_whole_row

Size = int | str

ABSORBS = -1e30
"""Added to any score this swallows it, so that a row that sees no key is exactly uniform.

It is far from the least number, which some runtimes take for "hidden" and answer with zeros.
"""

HIDES = -1e4
"""A finite fill at or below this has weight exactly 0 in fp32 beside any visible key of ordinary score."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Score steps as a fused operator has them: ``softcap(scale * prod(gains) * s) + sum(factor * bias)``."""

    scale: float = 1.0
    softcap: float = 0.0
    gains: tuple[str, ...] = ()
    biases: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """A mask as ``band``, an attribute (causal, maybe ``left + 1`` keys wide), and ``rest``, in the bias.

    ``guarded`` holds a band and the other part of the mask, where the attribute means the same if, at run
    time, that part hides nothing.
    """

    band: Band | None
    rest: Mask
    guarded: tuple[Band, Mask] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One attend node: its spec and what the traced graph knows about its tensors.

    ``heads`` is (H, Hkv), ``head_sizes`` is (Dqk, Dv), ``lengths`` is (Sq, Sk), symbolic sizes as text;
    ``last`` holds the size of the last axis of each captured tensor (1 for a scalar).
    """

    index: int
    id: str
    spec: AttentionSpec
    text: str
    heads: tuple[Size, Size]
    head_sizes: tuple[Size, Size]
    lengths: tuple[Size, Size]
    last: tuple[Size, ...]
    lse_used: bool = False

    @classmethod
    def of(cls, spec: AttentionSpec) -> Call:
        """Return a call of the sizes that the spec names."""
        q, k, v = spec.q.shape, spec.k.shape, spec.v.shape
        last = tuple((1, *o.shape)[-1] for o in spec.captured)
        return cls(0, "site", spec, str(spec), (q[1], k[1]), (q[3], v[3]), (q[2], k[2]), last)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Return (H, Hkv, Dqk, Dv), which an operator's attributes need as numbers.

        Raises:
            ValueError: one of them is symbolic.
        """
        h, hkv, dqk, dv = (int(n) for n in (*self.heads, *self.head_sizes))
        return h, hkv, dqk, dv

    @property
    def is_self(self) -> bool:
        """Sq and Sk are proved equal."""
        return self.lengths[0] == self.lengths[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of q, k and v."""
        return self.spec.q.dtype

    def folded(self) -> Folded | str:
        """Fold the score steps, or say in words why they do not fold."""
        out, last = Folded(), {o.name: n for o, n in zip(self.spec.captured, self.last, strict=True)}
        if not isinstance(self.spec.norm, Softmax):
            return f"the weights are no softmax but {self.spec.norm}"
        for step in self.spec.scores:
            found = _fold(out, step, last)
            if isinstance(found, str):
                return found
            out = found
        return out

    def split(self, *, windows: bool, unequal: bool) -> Split:
        """Take a causal band that starts with the keys out of the mask, where an attribute means the same.

        ``windows`` says that the operator has a window attribute, ``unequal`` that its causal attribute
        starts with the keys when Sq != Sk.  Beside a second part of the mask, or a bias that may hold -inf, a
        query may see no key: a finite fill spreads it over *all* keys and -inf gives NaN, and no attribute
        does either; so everything stays in ``rest`` unless such rows are zero by a sink or by ``safe``.  Then
        the band is ``guarded``, if the second part of the mask is known at run time alone.
        """
        mask, norm = self.spec.mask, self.spec.norm
        biased = any(isinstance(s, Bias) for s in self.spec.scores)
        zeros = self.spec.fill.value == -math.inf and (norm.sink is not None or (norm.safe and not biased))
        parts = mask.parts if isinstance(mask, And) else (mask,)
        guarded = None
        for band in parts:
            if not isinstance(band, Band) or band.right != 0 or (band.left is not None and not windows):
                continue
            if not self.is_self and (band.align == "end" or not unequal):
                continue
            rest = both(*(p for p in parts if p is not band))
            if zeros or (isinstance(rest, Full) and not biased):
                return Split(Band(band.left, 0), rest)
            if not biased and rest.operands:
                guarded = Band(band.left, 0), rest
        return Split(None, mask, guarded)

    def may_see_nothing(self) -> bool:
        """Some query may see no key, for some length or run-time mask."""
        sq, sk = (n if isinstance(n, int) else None for n in self.lengths)
        if self.is_self and sq is None:
            sq = sk = 1024  # any number: only the order of the two lengths matters
        return may_hide_a_whole_row(self.spec.mask, sq, sk)


def _fold(out: Folded, step: Step, last: dict[str, Size]) -> Folded | str:
    if isinstance(step, Scale):
        if out.softcap:
            return "the scores are scaled after the softcap"
        biases = tuple((n, f * step.factor) for n, f in out.biases)
        return Folded(out.scale * step.factor, out.softcap, out.gains, biases)
    if isinstance(step, Bias):
        return Folded(out.scale, out.softcap, out.gains, (*out.biases, (step.operand, float(step.sign))))
    if isinstance(step, Pointwise):
        return f"there is no score step {step}"
    if out.biases or out.softcap:
        return f"{step} comes after a bias or a softcap"
    if isinstance(step, Softcap):
        return Folded(out.scale, step.cap, out.gains, out.biases)
    if last[step.operand] != 1:
        return f"{step} differs from key to key"
    return Folded(out.scale, out.softcap, (*out.gains, step.operand), out.biases)
