"""Cover a head size by tiles whose widths are powers of two.

A tile of Triton is a power of two wide, so a head size of 192 would be padded to 256, a third more work.
It becomes two parts instead, 128 and 64, each a tile of its own: ``q0``, ``q1``.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnc.ir import AttentionSpec

LEAST, WIDEST = 16, 256
"""The least size of a contraction on tensor cores, and the widest tile that one TMA copy fills."""


MOST = 576
"""The largest head size: a latent of 512 features beside 64 that carry positions (DeepSeek-V2)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tile over a stretch of a head's features.

    ``tag`` ends the names of what belongs to it, '' if it is the only one; ``start`` is its first feature,
    ``size`` its width, ``used`` how many of these exist.  Features count from the part's own start.
    """

    tag: str
    start: int
    size: int
    used: int

    def bound(self, letter: str) -> str:
        """Return which of its features exist, as kernel text, '' if all do."""
        return f"({letter}{self.tag} < {self.used})" if self.used < self.size else ""

    def base(self, address: str, stride: str = "") -> str:
        """Return where it begins in memory, as kernel text; no stride: features are next to each other."""
        step = f"{self.start} * {stride}" if stride else str(self.start)
        return f"{address} + {step}" if self.start else address


def parts(size: int) -> tuple[Part, ...]:
    """Return the parts of a head size, widest first: two where that is narrower than one padded tile."""
    widths: list[int] = []
    rest = size
    while rest > 0:
        whole = _padded(rest)
        below = min(whole // 2, WIDEST)
        pays = whole > WIDEST or (LEAST <= below < rest and below + _padded(rest - below) < whole)
        widths.append(below if pays else whole)
        rest -= widths[-1]
    starts = [sum(widths[:at]) for at in range(len(widths))]
    return tuple(
        Part(str(at) if len(widths) > 1 else "", start, width, min(width, size - start))
        for at, (start, width) in enumerate(zip(starts, widths, strict=True))
    )


def _padded(size: int) -> int:
    """Return the width of one tile that holds ``size`` features."""
    return max(LEAST, 1 << (size - 1).bit_length())


def head_parts(spec: AttentionSpec) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return the parts of the head size of queries and keys, and of that of values; both are numbers."""
    dqk, dv = spec.q.shape[3], spec.v.shape[3]
    assert isinstance(dqk, int), f"expected a fixed head size, found {dqk}"
    assert isinstance(dv, int), f"expected a fixed head size, found {dv}"
    return parts(dqk), parts(dv)
