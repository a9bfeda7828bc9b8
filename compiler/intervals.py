"""Interval reasoning: what a formula may be on a tile of positions, without building the tile.

Bounds are Python integers or, for many tiles at once, integer tensors; a condition is a pair (holds nowhere
is impossible, holds everywhere is proved), written (may, must).  The answer is sound, not always exact: two
uses of one position are bounded apart.

Source: forms/static_sparse, section 22, P2: each predicate has an interval evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

Bound = Any
"""An int or an int64 tensor."""
Span = tuple[Bound, Bound]
Truth = tuple[Any, Any]
"""(some pair may satisfy it, every pair does), bools or bool tensors."""

FAR = 1 << 40
"""Beyond every position, and what run-time integers are taken to be within."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """The algebra of intervals: ``tile`` has the least and the greatest value of each position and length."""

    tile: Mapping[str, Span]

    def number(self, n: int) -> Span:
        """Return a point."""
        return n, n

    def symbol(self, name: str) -> Span:
        """Return the tile's bounds; batch entries and heads are any."""
        return self.tile.get(name, (0, FAR))

    def read(self, operand: str, axes: str) -> Span:
        """Return that nothing is known."""
        return -FAR, FAR

    def add(self, a: Span, b: Span) -> Span:
        """Return the bounds of a sum."""
        return a[0] + b[0], a[1] + b[1]

    def sub(self, a: Span, b: Span) -> Span:
        """Return the bounds of a difference."""
        return a[0] - b[1], a[1] - b[0]

    def mul(self, a: Span, b: Span) -> Span:
        """Return the bounds of a product."""
        corners = [x * y for x in a for y in b]
        return _fold(_least, corners), _fold(_most, corners)

    def floordiv(self, a: Span, n: int) -> Span:
        """Return the bounds of a quotient."""
        return a[0] // n, a[1] // n

    def mod(self, a: Span, n: int) -> Span:
        """Return the remainders, exact where the interval lies within one period."""
        one = a[0] // n == a[1] // n
        return _pick(one, a[0] % n, 0), _pick(one, a[1] % n, n - 1)

    def where(self, c: Truth, a: Span, b: Span) -> Span:
        """Return one arm where the condition is decided, else what holds both."""
        may, must = c
        low = _pick(must, a[0], _pick(may, _least(a[0], b[0]), b[0]))
        high = _pick(must, a[1], _pick(may, _most(a[1], b[1]), b[1]))
        return low, high

    def le(self, a: Span, b: Span) -> Truth:
        """Compare bounds."""
        return a[0] <= b[1], a[1] <= b[0]

    def eq(self, a: Span, b: Span) -> Truth:
        """Compare bounds."""
        may = (a[0] <= b[1]) & (b[0] <= a[1])
        return may, (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])

    def both(self, a: Truth, b: Truth) -> Truth:
        """Return the conjunction."""
        return a[0] & b[0], a[1] & b[1]

    def either(self, a: Truth, b: Truth) -> Truth:
        """Return the disjunction."""
        return a[0] | b[0], a[1] | b[1]

    def negate(self, a: Truth) -> Truth:
        """Return the negation."""
        return _not(a[1]), _not(a[0])


def _not(x: Any) -> Any:
    return not x if isinstance(x, bool) else ~x


def _pick(c: Any, a: Bound, b: Bound) -> Bound:
    return (a if c else b) if isinstance(c, bool) else torch.where(c, a, b)


def _tensors(a: Bound, b: Bound) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(a), torch.as_tensor(b)


def _least(a: Bound, b: Bound) -> Bound:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.minimum(*_tensors(a, b))


def _most(a: Bound, b: Bound) -> Bound:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.maximum(*_tensors(a, b))


def _fold(f: Any, xs: list[Bound]) -> Bound:
    out = xs[0]
    for x in xs[1:]:
        out = f(out, x)
    return out
