"""Symbolic values of tensor elements: integer polynomials, comparisons and logic, loads, and float terms.

The door to three files: ``attnc.terms`` (the node type and its text), ``attnc.polynomial`` (integers) and
this one (predicates, loads, ``where``, substitution).  Equality is structural.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from attnc.polynomial import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    add,
    as_int,
    as_number,
    exact_div,
    floordiv,
    from_terms,
    generator,
    index,
    integer,
    is_int,
    mod,
    mul,
    neg,
    nonneg,
    only_generator,
    only_index,
    product,
    real,
    size,
    sub,
    terms,
)
from attnc.terms import Expr, indices, loads, show, walk

__all__ = [
    "FALSE",
    "ONE",
    "TRUE",
    "ZERO",
    "Expr",
    "add",
    "and_",
    "as_int",
    "as_number",
    "call",
    "eq0",
    "exact_div",
    "floordiv",
    "from_terms",
    "generator",
    "index",
    "indices",
    "integer",
    "is_bool",
    "is_int",
    "le0",
    "load",
    "loads",
    "mod",
    "mul",
    "neg",
    "nonneg",
    "not_",
    "only_generator",
    "only_index",
    "or_",
    "pinned",
    "product",
    "real",
    "show",
    "size",
    "sub",
    "substitute",
    "terms",
    "walk",
    "where",
]

# ---------------------------------------------------------------- comparisons and logic


def le0(p: Expr) -> Expr:
    """Return the predicate ``p <= 0``, decided where lower bounds decide it."""
    n = as_int(p)
    if n is not None:
        return TRUE if n <= 0 else FALSE
    if nonneg(neg(p), upper=False):
        return TRUE
    if nonneg(sub(p, ONE), upper=False):
        return FALSE
    g = math.gcd(*(c for m, c in terms(p) if m))
    if g > 1:
        p = from_terms({m: (c // g if m else -((-c) // g)) for m, c in terms(p)})
    return Expr("le0", p)


def eq0(p: Expr) -> Expr:
    """Return the predicate ``p == 0``."""
    n = as_int(p)
    if n is not None:
        return TRUE if n == 0 else FALSE
    if nonneg(sub(p, ONE), upper=False) or nonneg(sub(neg(p), ONE), upper=False):
        return FALSE
    g = math.gcd(*(c for m, c in terms(p) if m))
    if any(c % g for m, c in terms(p)):
        return FALSE
    if terms(p)[-1][1] < 0:
        g = -g
    return Expr("eq0", from_terms({m: c // g for m, c in terms(p)}))


def not_(c: Expr) -> Expr:
    """Return the negation, pushed through comparisons and connectives."""
    if c.op in ("true", "false"):
        return FALSE if c.op == "true" else TRUE
    if c.op == "not":
        return c.args[0]  # type: ignore[no-any-return]
    if c.op == "le0":
        return le0(sub(ONE, c.args[0]))
    if c.op in ("and", "or"):
        parts = [not_(a) for a in c.args[0]]
        return or_(*parts) if c.op == "and" else and_(*parts)
    return Expr("not", c)


def _connect(op: str, cs: Iterable[Expr], unit: Expr, zero: Expr) -> Expr:
    flat: dict[str, Expr] = {}
    for c in cs:
        for part in c.args[0] if c.op == op else (c,):
            if part == zero:
                return zero
            if part != unit:
                flat[part.key] = part
    if any(not_(a).key in flat for a in flat.values() if a.op in ("not", "le0")):
        return zero
    short = _absorbed(op, flat) if 1 < len(flat) <= ABSORBED else None
    if short is not None:
        return _connect(op, short, unit, zero)
    parts = tuple(flat[k] for k in sorted(flat))
    return unit if not parts else parts[0] if len(parts) == 1 else Expr(op, parts)


ABSORBED = 12
"""Parts of the longest connective that is searched for parts that say nothing new."""


def _absorbed(op: str, flat: dict[str, Expr]) -> list[Expr] | None:
    """Return shorter parts by ``a | (a & x) == a`` and ``a | (~a & x) == a | x``; None if there are none."""
    dual = "or" if op == "and" else "and"
    inner = [p for p in flat.values() if p.op == dual]
    if not inner:
        return None
    against = {not_(p).key for p in flat.values() if p.op in ("le0", "not", "load", "eq0")}
    out, changed = [], False
    for p in flat.values():
        if p.op == dual and any(x.key in flat for x in p.args[0]):
            changed = True
            continue
        left = [x for x in p.args[0] if x.key not in against] if p.op == dual else [p]
        changed = changed or (p.op == dual and len(left) < len(p.args[0]))
        out.append(p if p.op != dual else (and_ if dual == "and" else or_)(*left))
    return out if changed else None


def and_(*cs: Expr) -> Expr:
    """Return the conjunction."""
    return _connect("and", cs, TRUE, FALSE)


def or_(*cs: Expr) -> Expr:
    """Return the disjunction."""
    return _connect("or", cs, FALSE, TRUE)


def is_bool(e: Expr) -> bool:
    """Say whether ``e`` is a predicate (a load is one when it reads a bool tensor)."""
    return e.op in ("true", "false", "le0", "eq0", "not", "and", "or") or (
        e.op == "load" and e.args[2] == "bool"
    )


def load(name: str, at: tuple[Expr, ...], kind: str) -> Expr:
    """Return the element of tensor ``name`` at index ``at``; kind is bool, int or float.

    An int load is a polynomial.
    """
    e = Expr("load", name, at, kind)
    return generator(e) if kind == "int" else e


def where(c: Expr, a: Expr, b: Expr) -> Expr:
    """Return ``a if c else b``; equal arms merge, also after substituting what an equality in ``c`` pins."""
    if c == TRUE or a == b:
        return a
    if c == FALSE:
        return b
    if is_bool(a) and is_bool(b):
        return or_(and_(c, a), and_(not_(c), b))
    a, b = _under(a, c), _under(b, not_(c))
    if a == b:
        return a
    if is_int(a) and _vanishes(a, c):
        a = ZERO
    if is_int(b) and _vanishes(b, not_(c)):
        b = ZERO
    pins = pinned(c)
    if pins:
        narrowed = substitute(a, pins)
        if narrowed == substitute(b, pins):
            return b
        if all(x in walk(a) for x in walk(narrowed) if x.op == "load"):  # else one at a fixed place is read
            a = narrowed
    if is_int(a) and is_int(b):
        return generator(Expr("where", c, a, b))
    return Expr("where", c, a, b)


def _under(x: Expr, c: Expr) -> Expr:
    """Return the arm of a ``where`` that holds under ``c``, if its condition is that or its negation."""
    g = only_generator(x) if is_int(x) else x
    if g is None or g.op != "where":
        return x
    inner, a, b = g.args
    return _under(a, c) if inner == c else _under(b, c) if inner == not_(c) else x


def _vanishes(p: Expr, c: Expr) -> bool:
    """Say whether ``c`` is the predicate that ``p`` is zero."""
    return c.op == "eq0" and c.args[0] in (p, neg(p))


def pinned(c: Expr) -> dict[Expr, Expr]:
    """Return the values that ``c`` fixes: an index that is <= 0 is 0; ``x - n == 0`` makes x equal n."""
    out: dict[Expr, Expr] = {}
    for part in c.args[0] if c.op == "and" else (c,):
        if part.op not in ("le0", "eq0"):
            continue
        ts = terms(part.args[0])
        variables = [(m, k) for m, k in ts if m]
        if len(variables) != 1 or len(variables[0][0]) != 1 or variables[0][1] != 1:
            continue
        g, const = variables[0][0][0], sum(k for m, k in ts if not m)
        if g.op == "index" and (part.op == "eq0" or const == 0):
            out[g] = integer(-const)
    return out


def substitute(e: Expr, by: dict[Expr, Expr], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Replace generators (index variables) of ``e`` by polynomials, and simplify again."""
    memo = {} if memo is None else memo
    if e in memo:
        return memo[e]
    memo[e] = out = _substitute(e, by, memo)
    return out


def _substitute(e: Expr, by: dict[Expr, Expr], memo: dict[Expr, Expr]) -> Expr:
    def go(x: Expr) -> Expr:
        return substitute(x, by, memo)

    if e.op == "poly":
        if not any(m for m, _ in terms(e)):
            return e
        out = ZERO
        for m, c in terms(e):
            out = add(out, mul(integer(c), product(_generator(g, by, go) for g in m)))
        return out
    if e.op in ("const", "true", "false"):
        return e
    if e.op == "le0":
        return le0(go(e.args[0]))
    if e.op == "eq0":
        return eq0(go(e.args[0]))
    if e.op == "not":
        return not_(go(e.args[0]))
    if e.op in ("and", "or"):
        return (and_ if e.op == "and" else or_)(*(go(a) for a in e.args[0]))
    if e.op == "where":
        return where(*(go(a) for a in e.args))
    if e.op == "load":
        return Expr("load", e.args[0], tuple(go(a) for a in e.args[1]), e.args[2])
    if e.op == "call":
        return Expr("call", e.args[0], tuple(go(a) if isinstance(a, Expr) else a for a in e.args[1]))
    raise AssertionError(f"cannot substitute in {e.op}")


def _generator(g: Expr, by: dict[Expr, Expr], go: Any) -> Expr:
    if g in by:
        return by[g]
    if g.op in ("index", "size", "opaque"):
        return generator(g)
    if g.op == "floordiv":
        return floordiv(go(g.args[0]), g.args[1])
    if g.op == "mod":
        return mod(go(g.args[0]), g.args[1])
    if g.op == "where":
        return where(*(go(a) for a in g.args))
    out: Expr = go(g)
    return out if out.op == "poly" else generator(out)


def call(fn: str, *args: Any) -> Expr:
    """Return an uninterpreted elementwise function of terms and plain values."""
    return Expr("call", fn, args)
