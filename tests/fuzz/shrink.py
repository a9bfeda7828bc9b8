"""Make a failing program plainer: one axis after the other to its plainest value, while it still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.fuzz.axes import Spelling, settled


def shrunk(x: Spelling, fails: Callable[[Spelling], bool]) -> Spelling:
    """Return a program that still fails and in which no single axis can be made plainer.

    A change that the rules take back, or that sets off others, counts by its number of axes not plain.
    """
    while True:
        smaller = next((y for y in _plainer(x) if fails(y)), None)
        if smaller is None:
            return x
        x = smaller


def _plainer(x: Spelling) -> list[Spelling]:
    """Return the programs with one axis more at its plainest, the near miss last."""
    out = []
    for f, value in sorted(x.choices(), key=lambda c: c[0].name == "near_miss"):
        if value != f.default:
            y = settled(replace(x, **{f.name: f.default}))
            if weight(y) < weight(x):
                out.append(y)
    return out


def weight(x: Spelling) -> int:
    """Count the axes that are not at their plainest."""
    return sum(value != f.default for f, value in x.choices())
