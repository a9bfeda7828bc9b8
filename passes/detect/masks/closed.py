"""Comparisons of positions in closed form: bands, ranges, and formulas over canonical positions.

A comparison of ``q - k`` with a constant (or with a constant plus ``Sk - Sq``) is a band; of ``k`` or ``q``
alone a range.  Any other comparison of integers made of positions is a formula.  Where it reads integer
tensors, each sum of them that varies along (b, q), (b, k) or b alone becomes one operand, so document ids are
two rows and never a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from attnc import expr as E
from attnc import formula as F
from attnc import masks as M
from attnc.expr import Expr
from attnc.intervals import FAR, Intervals

Name = Callable[[str, Expr], str]
"""Given axes and a value, the name of the operand that holds it."""


@dataclass(frozen=True)
class Positions:
    """Canonical positions as polynomials: ``q`` and ``k`` with their lengths, and the atoms of each role."""

    q: Expr
    k: Expr
    sq: Expr
    sk: Expr
    roles: tuple[tuple[Expr, ...], ...]
    used: list[str] = field(default_factory=list, compare=False)
    """What a closed form took from fixed lengths, in words: it holds there and may not elsewhere."""

    @cached_property
    def symbols(self) -> dict[Expr, Expr]:
        """Atoms and symbolic sizes as digits of canonical positions, and as lengths."""
        by: dict[Expr, Expr] = {}
        for axis, atoms in zip(F.AXES, self.roles, strict=False):
            below = E.ONE
            for i, a in reversed(list(enumerate(atoms))):
                digit = E.floordiv(F.POSITIONS[axis], below)
                by[a] = digit if i == 0 else E.mod(digit, a.args[1])
                below = E.mul(below, a.args[1])
        for length, symbol in ((self.sq, F.SQ), (self.sk, F.SK)):
            known = _solved(length, symbol, by)
            if known is not None:
                by[known[0]] = known[1]
        return by

    def canonical(self, e: Expr) -> Expr:
        """Return the condition over canonical positions and lengths."""
        return E.substitute(e, self.symbols)


def _solved(length: Expr, symbol: Expr, by: dict[Expr, Expr]) -> tuple[Expr, Expr] | None:
    """Solve ``length == symbol`` for the one size in it that is still unknown."""
    rest = E.substitute(length, by)
    unknown = [m[0] for m, c in E.terms(rest) if len(m) == 1 and c == 1 and m[0].op == "size"]
    unknown = [g for g in unknown if E.generator(g) not in (F.SQ, F.SK)]
    if len(unknown) != 1:
        return None
    others = E.sub(rest, E.generator(unknown[0]))
    if unknown[0] in list(E.walk(others)):
        return None
    return unknown[0], E.sub(symbol, others)


def closed(c: Expr, at: Positions) -> M.Mask | None:
    """Return a condition without data as bands, ranges and formulas, None if it reads any."""
    if c == E.TRUE:
        return M.FULL
    if c.op in ("and", "or"):
        parts = [closed(p, at) for p in c.args[0]]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        return (M.both if c.op == "and" else M.either)(*known)
    if c.op == "not":
        part = closed(c.args[0], at)
        return None if part is None else M.Not(part)
    if c.op not in ("le0", "eq0"):
        return None
    plain = _interval(c, at)
    if plain is not None:
        return plain
    value = normal(at.canonical(c))
    if value.op == "le0" and F.is_closed(value) and _always(value, at):
        return M.FULL
    if value.op in ("true", "false"):
        return M.FULL if value == E.TRUE else M.Not(M.FULL)
    return M.Formula(value) if F.is_closed(value) and not F.operands(value) else None


def _always(c: Expr, at: Positions) -> bool:
    """Prove ``p <= 0`` for all positions below their lengths.

    Fixed lengths count where one position is compared alone; a window keeps its width whatever the length.
    """
    if E.nonneg(E.neg(c.args[0])):
        return True
    axes = {x.args[0] for x in E.walk(c) if x.op == "index"}
    alone = len(axes) < 2
    ends = [n - 1 if (n := E.as_int(size)) is not None and alone else FAR for size in (at.sq, at.sk)]
    anywhere = {"q": (0, FAR), "k": (0, FAR), "Sq": (1, FAR), "Sk": (1, FAR)}
    if F.fold(c, Intervals(anywhere))[1]:
        return True
    if not F.fold(c, Intervals({**anywhere, "q": (0, ends[0]), "k": (0, ends[1])}))[1]:
        return False
    at.used.extend(text for axis in sorted(axes) for text in _fixed(at, axis))
    return True


def _fixed(at: Positions, axis: str) -> list[str]:
    """Return that the axis has its fixed length, nothing where the length is free."""
    n = E.as_int(at.sk if axis == "k" else at.sq)
    return [] if n is None else [f"S{axis} <= {n}"]


def _interval(c: Expr, at: Positions) -> M.Mask | None:
    if c.op == "le0":
        return _compare(c.args[0], at)
    low, high = _compare(c.args[0], at), _compare(E.neg(c.args[0]), at)
    return M.both(low, high) if low is not None and high is not None else None


def _compare(p: Expr, at: Positions) -> M.Mask | None:
    """Return the predicate ``p <= 0`` for ``p`` = (k - q or q - k or k or q or -k or -q) + constant."""
    gap = E.sub(at.sk, at.sq)
    for sign, base in ((1, E.sub(at.k, at.q)), (-1, E.sub(at.q, at.k))):
        rest = E.sub(p, base)
        n = E.as_int(rest)
        if n is not None:
            return M.Band(None, -n) if sign > 0 else M.Band(-n, None)
        n = E.as_int(E.add(rest, gap) if sign > 0 else E.sub(rest, gap))
        if n is not None:
            return M.Band(None, -n, "end") if sign > 0 else M.Band(-n, None, "end")
    for axis, x in (("k", at.k), ("q", at.q)):
        n = E.as_int(E.sub(p, x))
        if n is not None and E.nonneg(E.neg(p)):
            at.used.extend(_fixed(at, axis))
            return M.FULL  # a position is below its length
        if n is not None and -n + 1 >= 0:
            return M.Range("k" if axis == "k" else "q", 0, -n + 1)
        n = E.as_int(E.add(p, x))
        if n is not None:
            return M.Not(M.Range("k" if axis == "k" else "q", 0, n)) if n > 0 else M.Full()
    return None


def normal(c: Expr) -> Expr:
    """Return a comparison in the form that names are given to."""
    c = turned(unfolded(c))
    return divided(c)


def unfolded(c: Expr) -> Expr:
    """Write ``x - x % n`` as ``n * (x // n)``, where that is shorter."""
    p = c.args[0]
    for m, k in E.terms(p):
        if len(m) != 1 or m[0].op != "mod":
            continue
        x, n = m[0].args
        whole = E.sub(x, E.mul(n, E.floordiv(x, n)))
        other = E.add(p, E.mul(E.integer(-k), E.generator(m[0])), E.mul(E.integer(k), whole))
        if len(E.terms(other)) < len(E.terms(p)):
            return unfolded(E.le0(other) if c.op == "le0" else E.eq0(other))
    return c


def turned(c: Expr) -> Expr:
    """Write ``(k - q) % n == r`` as ``(q - k) % n == -r % n``."""
    ts = E.terms(c.args[0]) if c.op == "eq0" else ()
    ms = [(m[0], k) for m, k in ts if m and len(m) == 1]
    if len(ms) != 1 or len(ms[0][0].args) != 2 or ms[0][0].op != "mod" or abs(ms[0][1]) != 1:
        return c
    x, n = ms[0][0].args
    number = E.as_int(n)
    rest = -sum(k for m, k in ts if not m) * ms[0][1]
    lead = next((k for m, k in E.terms(x) if m == E.terms(F.Q)[0][0]), 0)
    if number is None or lead >= 0 or not 0 <= rest < number or len(ts) > 2:
        return c
    return E.eq0(E.sub(E.mod(E.neg(x), n), E.integer(-rest % number)))


def divided(c: Expr) -> Expr:
    """Write ``n * (x // n) + r <= 0`` as ``x // n + ceil(r / n) <= 0``: block ends become block numbers."""
    if c.op != "le0":
        return c
    ts = E.terms(c.args[0])
    divisors = {n for m, k in ts for n in _divisors(m) if k % n == 0}
    for n in sorted(divisors, reverse=True):
        whole = {m: k // n for m, k in ts if n in _divisors(m) and k % n == 0}
        rest = E.from_terms({m: k for m, k in ts if m not in whole})
        if n == 1 or not any(m for m, _ in E.terms(rest)):
            continue
        number = E.integer(n)
        rising = sum(k for m, k in E.terms(rest) if m) > 0
        up = E.floordiv(E.add(rest, E.integer(n - 1)), number) if rising else None
        ceiling = up if up is not None else E.neg(E.floordiv(E.neg(rest), number))
        return divided(E.le0(E.add(E.from_terms(whole), ceiling)))
    return c


def _divisors(m: tuple[Expr, ...]) -> set[int]:
    """Return n if the product is one quotient ``x // n``."""
    if len(m) != 1 or m[0].op != "floordiv":
        return set()
    n = E.as_int(m[0].args[1])
    return {n} if n is not None else set()


# ---------------------------------------------------------------- with data


def formula_of_rows(c: Expr, at: Positions, name: Name) -> M.Mask | None:
    """Return a comparison of rows of integers and positions as a formula, None if it reads anything else."""
    if c.op == "not" and c.args[0].op == "eq0":
        part = formula_of_rows(c.args[0], at, name)
        return None if part is None else M.Not(part)
    if c.op not in ("le0", "eq0"):
        return None
    groups: dict[str, dict[tuple[Expr, ...], int]] = {}
    for m, n in E.terms(c.args[0]):
        axes = axes_of(E.from_terms({m: n}), at)
        if axes is None:
            return None
        groups.setdefault(axes, {})[m] = n
    if not set(groups) & {"bq", "bk", "b"}:
        return None
    total = at.canonical(E.from_terms(groups.pop("", {})))
    sums = {axes: E.from_terms(terms) for axes, terms in groups.items()}
    if not F.is_closed(E.le0(total)) and E.as_int(total) is None:
        return None
    for axes in sorted(sums):
        rows, sign = sums[axes], 1
        if E.terms(rows)[-1][1] < 0:
            rows, sign = E.neg(rows), -1
        places = tuple(F.POSITIONS[a] for a in axes)
        total = E.add(total, E.mul(E.integer(sign), E.load(name(axes, rows), places, "int")))
    return M.Formula(E.le0(total) if c.op == "le0" else E.eq0(total))


def axes_of(p: Expr, at: Positions) -> str | None:
    """Return along which axes the data of a term varies: ``bq bk b``, '' for none, None for any others."""
    if not E.loads(p):
        return ""
    if any(x.args[2] != "int" for x in E.loads(p)):
        return None
    b, q, k = (set(at.roles[i]) for i in (0, 2, 3))
    used = set(E.indices(p))
    if not used <= b | q | k or (used & q and used & k):
        return None
    return "bq" if used & q else "bk" if used & k else "b"
