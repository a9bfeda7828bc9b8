"""Rotary embedding (arXiv:2104.09864), by what it computes.

An operand is rotated if there is a partner p(d) for every rotated feature d, with

    y[d] = x[d] * cos(angle) + sign(d) * x[p(d)] * sin(angle),    sign(p(d)) = -sign(d),    p(p(d)) = d,

and one angle for both of a pair.  Half-split, interleaved and complex spellings, sections of several
position axes, and gains before or after are all this one identity; they differ in p and in the angles.  The
identity is proven feature by feature on the element's own expression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.analyze.operands.products import Product, apart, products
from attnc.passes.analyze.operands.tables import Tables, read


@dataclass(frozen=True, slots=True)
class Turn:
    """One way to read a feature's two products: ``x * cos`` and ``sign * partner * sin``."""

    feature: int
    cosine: Product
    sine: Product
    angle: tuple[Expr, ...]

    def partner_of(self, other: Turn) -> bool:
        """Say whether two features are one pair."""
        mine, theirs = apart(self.cosine, self.sine), apart(other.cosine, other.sine)
        return (
            mine == theirs[::-1]
            and self.cosine.number == other.cosine.number
            and self.sine.number == -other.sine.number
            and abs(self.sine.number) == abs(self.cosine.number)
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two features that turn together: features, what they are made of, and the angle."""

    features: tuple[int, int]
    sources: tuple[Expr, Expr]
    angle: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The pairs of a rotated operand of ``size`` features; the others pass through as ``plain``.

    ``given`` says that the cosines and sines are inputs, taken for what they stand for.
    """

    size: int
    pairs: tuple[Pair, ...]
    plain: tuple[Expr, ...]
    given: bool


def rotation(e: Expr, feature: Expr, size: int, tables: Tables) -> Rotation | None:
    """Return the rotation that an operand's element ``e`` is, None if the identity does not hold."""
    plain: list[Expr] = []
    turns: list[list[Turn]] = []
    for d in range(size):
        row = products(E.substitute(e, {feature: E.integer(d)}), tables.is_table)
        if row is None or not 0 < len(row) <= 2:
            return None
        if len(row) == 1:
            source = tables.source(row[0])
            if source is None or _turning(row[0]):
                return None
            plain.append(source)
            continue
        turns.append(list(_turns(d, row[0], row[1], tables)))
        if not turns[-1]:
            return None
    pairs, given = _paired(turns, tables)
    return Rotation(size, pairs, tuple(plain), given) if pairs else None


def _turning(p: Product) -> bool:
    return bool(p.calls("cos") or p.calls("sin"))


def _turns(d: int, a: Product, b: Product, tables: Tables) -> Iterator[Turn]:
    """Yield the ways to tell cosine and sine apart: by name, or two different tables beside one tensor."""
    for cosine, sine in ((a, b), (b, a)):
        if _turning(a) or _turning(b):
            cs, ss = cosine.calls("cos"), sine.calls("sin")
            if len(cs) == len(ss) == 1 and cs[0].args[1] == ss[0].args[1]:
                yield Turn(d, cosine.without(cs[0]), sine.without(ss[0]), cs[0].args[1])
            continue
        for c in filter(tables.may_hold_angles, cosine.factors):
            for s in filter(tables.may_hold_angles, sine.factors):
                if c != s:
                    yield Turn(d, cosine.without(c), sine.without(s), (c, s))


def _paired(turns: Sequence[Sequence[Turn]], tables: Tables) -> tuple[tuple[Pair, ...], bool]:
    """Match features into pairs; () if one is left over or the angles of a pair differ."""
    by_shared: dict[frozenset[Expr], list[Turn]] = {}
    for options in turns:
        for t in options:
            x, y = apart(t.cosine, t.sine)
            by_shared.setdefault(frozenset((*x, *y)), []).append(t)
    done: set[int] = set()
    pairs: list[Pair] = []
    given = False
    for options in turns:
        if options[0].feature in done:
            continue
        found = _partner(options, by_shared, done, tables)
        if found is None:
            return (), False
        t, other, certain = found
        given = given or not certain
        done |= {t.feature, other.feature}
        one, two = tables.source(t.cosine), tables.source(other.cosine)
        if one is None or two is None or one == two:
            return (), False
        pairs.append(Pair((t.feature, other.feature), (one, two), t.angle))
    return tuple(pairs), given


def _partner(
    options: Sequence[Turn], by_shared: dict[frozenset[Expr], list[Turn]], done: set[int], tables: Tables
) -> tuple[Turn, Turn, bool] | None:
    """Return a reading of a feature, one of its partner, and whether the angle is certain."""
    for t in options:
        x, y = apart(t.cosine, t.sine)
        for other in by_shared[frozenset((*x, *y))]:
            if other.feature in done or other.feature == t.feature or not t.partner_of(other):
                continue
            certain = tables.same_turn(t.angle, other.angle) if _one_tensor(t, other, tables) else None
            if certain is not None:
                return t, other, certain
    return None


def _one_tensor(t: Turn, other: Turn, tables: Tables) -> bool:
    """Say whether a pair is read from one tensor, which tells data from the tables beside it."""
    if len(t.angle) == 1:
        return True
    x, y = tables.source(t.cosine), tables.source(other.cosine)
    a, b = (read(e) if e is not None else None for e in (x, y))
    return a is not None and b is not None and a.args[0] == b.args[0]
