"""Integers as polynomials ``sum coef * product of generators``, with floor division and remainder.

A generator is an index variable, a symbolic size, or an opaque term (a load, a floor division, a remainder).

Facts that simplification may use: an index is at least 0, a size is at least 1, and, only where ``upper``
says so, an index is below its size.  Views may use the last fact (it is what a view means); masks may not,
because a closed form must hold at every length (``index < size`` at the traced length says nothing about
others).

Terms are immutable and equal by their digests, so the arithmetic is remembered by value: layers that are
alike put the same questions, and only the first one pays for the answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from attnc.terms import Expr

Mono = tuple[Expr, ...]
Terms = tuple[tuple[Mono, int], ...]

remembered = lru_cache(maxsize=1 << 14)

# ---------------------------------------------------------------- construction


def from_terms(acc: dict[Mono, int]) -> Expr:
    """Return the polynomial with these coefficients; generators of each product sorted by their keys."""
    items = [(m, c) for m, c in acc.items() if c]
    items.sort(key=lambda t: (len(t[0]), [g.key for g in t[0]]))
    return Expr("poly", tuple(items))


@remembered
def integer(n: int) -> Expr:
    """Return the constant polynomial ``n``."""
    return Expr("poly", (((), n),) if n else ())


@remembered
def generator(g: Expr) -> Expr:
    """Return the polynomial that is the one generator ``g``."""
    return Expr("poly", (((g,), 1),))


@remembered
def index(name: str, size: Expr) -> Expr:
    """Return an index variable ``0 <= name < size`` as a polynomial."""
    return generator(Expr("index", name, size))


@remembered
def size(name: str) -> Expr:
    """Return the symbolic size ``name >= 1`` as a polynomial."""
    return generator(Expr("size", name))


def real(x: float) -> Expr:
    """Return a float constant."""
    return Expr("const", float(x))


TRUE, FALSE = Expr("true"), Expr("false")
ZERO, ONE = integer(0), integer(1)


def terms(p: Expr) -> Terms:
    """Return the terms of a polynomial as (generators, coefficient)."""
    assert p.op == "poly", p.op
    out: Terms = p.args[0]
    return out


def is_int(e: Expr) -> bool:
    """Say whether ``e`` is an integer polynomial."""
    return e.op == "poly"


def as_int(e: Expr) -> int | None:
    """Return the number if ``e`` is a constant polynomial, else None."""
    if e.op != "poly":
        return None
    t = e.args[0]
    if not t:
        return 0
    return t[0][1] if len(t) == 1 and not t[0][0] else None


def as_number(e: Expr) -> float | int | bool | None:
    """Return the value of a constant of any type, else None."""
    if e.op == "const":
        return e.args[0]  # type: ignore[no-any-return]
    if e.op in ("true", "false"):
        return e.op == "true"
    return as_int(e)


def only_index(e: Expr) -> Expr | None:
    """Return the index generator if ``e`` is exactly one index variable, else None."""
    g = only_generator(e)
    return g if g is not None and g.op == "index" else None


def only_generator(e: Expr) -> Expr | None:
    """Return the generator if ``e`` is exactly one generator with coefficient 1, else None."""
    if e.op == "poly" and len(e.args[0]) == 1:
        (mono, c) = e.args[0][0]
        if c == 1 and len(mono) == 1:
            return mono[0]  # type: ignore[no-any-return]
    return None


# ---------------------------------------------------------------- polynomial arithmetic


@remembered
def add(*ps: Expr) -> Expr:
    """Return the sum, with ``m * (x // m) + x % m`` folded to ``x``."""
    acc: dict[Mono, int] = {}
    opaque = False
    for p in ps:
        for m, c in terms(p):
            acc[m] = acc.get(m, 0) + c
            opaque = opaque or any(g.op in ("mod", "floordiv") for g in m)
    if opaque:
        _fold_division(acc)
    return from_terms(acc)


def _fold_division(acc: dict[Mono, int]) -> None:
    for mono in list(acc):
        for g in mono:
            if g.op != "mod" or not acc.get(mono):
                continue
            x, m = g.args
            rest, c = tuple(h for h in mono if h is not g), acc[mono]
            whole = mul(mul(m, generator(Expr("floordiv", x, m))), from_terms({rest: c}))
            pieces = terms(whole)
            if all(acc.get(pm) == pc for pm, pc in pieces):
                del acc[mono]
                for pm, _ in pieces:
                    del acc[pm]
                for xm, xc in terms(mul(x, from_terms({rest: c}))):
                    acc[xm] = acc.get(xm, 0) + xc
                break


@remembered
def mul(a: Expr, b: Expr) -> Expr:
    """Return the product of two polynomials."""
    acc: dict[Mono, int] = {}
    for ma, ca in terms(a):
        for mb, cb in terms(b):
            m = tuple(sorted((*ma, *mb), key=lambda g: g.key)) if ma and mb else ma or mb
            acc[m] = acc.get(m, 0) + ca * cb
    return from_terms(acc)


@remembered
def neg(a: Expr) -> Expr:
    """Return ``-a``."""
    return from_terms({m: -c for m, c in terms(a)})


@remembered
def sub(a: Expr, b: Expr) -> Expr:
    """Return ``a - b``."""
    return add(a, neg(b))


def product(ps: Iterable[Expr]) -> Expr:
    """Return the product of polynomials, 1 if there are none."""
    out = ONE
    for p in ps:
        out = mul(out, p)
    return out


@remembered
def exact_div(a: Expr, b: Expr) -> Expr | None:
    """Return ``a / b`` if the division of polynomials leaves nothing, else None."""
    if b == ONE:
        return a
    if a == b:
        return ONE
    if not terms(b):
        return None
    lead_m, lead_c = terms(b)[-1]
    rest, quotient = a, ZERO
    for _ in range(16):
        if not terms(rest):
            return quotient
        m, c = terms(rest)[-1]
        left = list(m)
        for g in lead_m:
            if g not in left:
                return None
            left.remove(g)
        if c % lead_c:
            return None
        q = from_terms({tuple(left): c // lead_c})
        quotient, rest = add(quotient, q), sub(rest, mul(q, b))
    return None


_SIZES = ("size", "opaque")


def _bounded(g: Expr) -> bool:
    return g.op in ("index", "mod")


def _at_least_zero(g: Expr, upper: bool) -> bool:
    return g.op in ("index", "size", "mod") or (g.op == "floordiv" and nonneg(g.args[0], upper))


def _upper(g: Expr) -> Expr:
    return sub(g.args[1], ONE)


@remembered
def nonneg(p: Expr, upper: bool = True) -> bool:
    """Prove ``p >= 0``; False means not proved.

    ``upper`` allows the fact that an index is below its size.
    """
    for _ in range(8):
        acc: list[Expr] = []
        again = False
        for m, c in terms(p):
            if not all(_at_least_zero(g, upper) for g in m):
                return False
            bounded = [g for g in m if _bounded(g)]
            if c > 0 and any(g.op != "size" for g in m):
                continue
            if c < 0 and any(g.op != "size" for g in m):
                if not bounded or not upper:
                    return False
                g = bounded[0]
                rest = list(m)
                rest.remove(g)
                acc.append(mul(from_terms({tuple(rest): c}), _upper(g)))
                again = True
            else:
                acc.append(from_terms({m: c}))
        p = add(*acc) if acc else ZERO
        if not again:
            return all(c >= 0 for _, c in terms(_shifted(p)))
    return False


def _shifted(p: Expr) -> Expr:
    """Replace each size s by s' + 1, so that coefficients >= 0 mean value >= 0."""
    out = ZERO
    for m, c in terms(p):
        t = integer(c)
        for g in m:
            t = mul(t, add(generator(g), ONE) if g.op == "size" else generator(g))
        out = add(out, t)
    return out


@remembered
def _split(p: Expr, m: Expr) -> tuple[Expr, Expr]:
    """Write ``p = m * quotient + rest``, dividing every part of ``p`` that ``m`` divides exactly."""
    groups: dict[Mono, dict[Mono, int]] = {}
    for mono, c in terms(p):
        var = tuple(g for g in mono if g.op not in _SIZES)
        groups.setdefault(var, {})[tuple(g for g in mono if g.op in _SIZES)] = c
    quotient, rest = ZERO, ZERO
    for var, coefs in groups.items():
        part, v = from_terms(coefs), from_terms({var: 1})
        q = exact_div(part, m)
        if q is not None:
            quotient = add(quotient, mul(q, v))
            continue
        n = as_int(m)
        if n is not None and not any(k for k in coefs):
            whole, left = divmod(coefs[()], n)
            if not var:
                quotient, part = add(quotient, integer(whole)), integer(left)
        rest = add(rest, mul(part, v))
    return quotient, rest


@remembered
def floordiv(p: Expr, m: Expr) -> Expr:
    """Return ``p // m`` for a positive ``m``, simplified by exact division and by the ranges of indices."""
    quotient, rest = _split(p, m)
    if not terms(rest) or (nonneg(rest) and nonneg(sub(sub(m, ONE), rest))):
        return quotient
    return add(quotient, generator(Expr("floordiv", rest, m)))


@remembered
def mod(p: Expr, m: Expr) -> Expr:
    """Return ``p % m`` for a positive ``m``; see ``floordiv``."""
    _, rest = _split(p, m)
    if not terms(rest) or (nonneg(rest) and nonneg(sub(sub(m, ONE), rest))):
        return rest
    return generator(Expr("mod", rest, m))
