"""Symbolic values of tensor elements: integer polynomials over index variables and sizes, comparisons, and float terms.

Integers are polynomials ``sum coef * product of generators``; a generator is an index variable, a symbolic size, or an
opaque term (a load, a floor division, a remainder).  Equality is structural: every expression carries a digest that is
the same in every process, so expressions sort, compare and serve as keys in constant time.

Facts that simplification may use: an index is at least 0, a size is at least 1, and, only where ``upper`` says so, an index
is below its size.  Views may use the last fact (it is what a view means); masks may not, because a closed form must
hold at every length (``index < size`` at the traced length says nothing about others).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any


class Expr:
    """An immutable term ``op(args)``.  Compare with ``==``; ``key`` is its digest."""

    __slots__ = ("args", "key", "op")

    def __init__(self, op: str, *args: Any) -> None:
        self.op, self.args = op, args
        text = "\0".join(_keys(args))
        self.key = hashlib.blake2b(f"{op}\1{text}".encode(), digest_size=12).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return show(self)


def _keys(args: Iterable[Any]) -> Iterator[str]:
    for a in args:
        if isinstance(a, Expr):
            yield a.key
        elif isinstance(a, tuple):
            yield "(" + "\0".join(_keys(a)) + ")"
        else:
            yield f"{type(a).__name__}:{a!r}"


Mono = tuple[Expr, ...]
Terms = tuple[tuple[Mono, int], ...]

# ---------------------------------------------------------------- construction


def _poly(acc: dict[Mono, int]) -> Expr:
    items = [(m, c) for m, c in acc.items() if c]
    items.sort(key=lambda t: (len(t[0]), [g.key for g in t[0]]))
    return Expr("poly", tuple(items))


@lru_cache(maxsize=4096)
def integer(n: int) -> Expr:
    """Return the constant polynomial ``n``."""
    return Expr("poly", (((), n),) if n else ())


def generator(g: Expr) -> Expr:
    """Return the polynomial that is the one generator ``g``."""
    return Expr("poly", (((g,), 1),))


def index(name: str, size: Expr) -> Expr:
    """Return an index variable ``0 <= name < size`` as a polynomial."""
    return generator(Expr("index", name, size))


@lru_cache(maxsize=4096)
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
    return _poly(acc)


def _fold_division(acc: dict[Mono, int]) -> None:
    for mono in list(acc):
        for g in mono:
            if g.op != "mod" or not acc.get(mono):
                continue
            x, m = g.args
            rest, c = tuple(h for h in mono if h is not g), acc[mono]
            whole = mul(mul(m, generator(Expr("floordiv", x, m))), _poly({rest: c}))
            pieces = terms(whole)
            if all(acc.get(pm) == pc for pm, pc in pieces):
                del acc[mono]
                for pm, _ in pieces:
                    del acc[pm]
                for xm, xc in terms(mul(x, _poly({rest: c}))):
                    acc[xm] = acc.get(xm, 0) + xc
                break


def mul(a: Expr, b: Expr) -> Expr:
    """Return the product of two polynomials."""
    acc: dict[Mono, int] = {}
    for ma, ca in terms(a):
        for mb, cb in terms(b):
            m = tuple(sorted((*ma, *mb), key=lambda g: g.key)) if ma and mb else ma or mb
            acc[m] = acc.get(m, 0) + ca * cb
    return _poly(acc)


def neg(a: Expr) -> Expr:
    """Return ``-a``."""
    return _poly({m: -c for m, c in terms(a)})


def sub(a: Expr, b: Expr) -> Expr:
    """Return ``a - b``."""
    return add(a, neg(b))


def product(ps: Iterable[Expr]) -> Expr:
    """Return the product of polynomials, 1 if there are none."""
    out = ONE
    for p in ps:
        out = mul(out, p)
    return out


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
        q = _poly({tuple(left): c // lead_c})
        quotient, rest = add(quotient, q), sub(rest, mul(q, b))
    return None


def _bounded(g: Expr) -> bool:
    return g.op in ("index", "mod")


def _at_least_zero(g: Expr) -> bool:
    return g.op in ("index", "size", "mod") or (g.op == "floordiv" and nonneg(g.args[0]))


def _upper(g: Expr) -> Expr:
    return sub(g.args[1], ONE)


def nonneg(p: Expr, upper: bool = True) -> bool:
    """Prove ``p >= 0``; False means not proved.  ``upper`` allows the fact that an index is below its size."""
    for _ in range(8):
        acc: list[Expr] = []
        again = False
        for m, c in terms(p):
            if not all(_at_least_zero(g) for g in m):
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
                acc.append(mul(_poly({tuple(rest): c}), _upper(g)))
                again = True
            else:
                acc.append(_poly({m: c}))
        p = add(*acc) if acc else ZERO
        if not again:
            break
    return all(c >= 0 for _, c in terms(_shifted(p)))


def _shifted(p: Expr) -> Expr:
    """Replace each size s by s' + 1, so that coefficients >= 0 mean value >= 0."""
    out = ZERO
    for m, c in terms(p):
        t = integer(c)
        for g in m:
            t = mul(t, add(generator(g), ONE) if g.op == "size" else generator(g))
        out = add(out, t)
    return out


def _split(p: Expr, m: Expr) -> tuple[Expr, Expr]:
    """Write ``p = m * quotient + rest``, dividing every part of ``p`` that ``m`` divides exactly."""
    groups: dict[Mono, dict[Mono, int]] = {}
    for mono, c in terms(p):
        var = tuple(g for g in mono if g.op != "size")
        groups.setdefault(var, {})[tuple(g for g in mono if g.op == "size")] = c
    quotient, rest = ZERO, ZERO
    for var, coefs in groups.items():
        part, v = _poly(coefs), _poly({var: 1})
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


def floordiv(p: Expr, m: Expr) -> Expr:
    """Return ``p // m`` for a positive ``m``, simplified by exact division and by the ranges of indices."""
    quotient, rest = _split(p, m)
    if not terms(rest) or (nonneg(rest) and nonneg(sub(sub(m, ONE), rest))):
        return quotient
    return add(quotient, generator(Expr("floordiv", rest, m)))


def mod(p: Expr, m: Expr) -> Expr:
    """Return ``p % m`` for a positive ``m``; see ``floordiv``."""
    _, rest = _split(p, m)
    if not terms(rest) or (nonneg(rest) and nonneg(sub(sub(m, ONE), rest))):
        return rest
    return generator(Expr("mod", rest, m))


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
        p = _poly({m: (c // g if m else -((-c) // g)) for m, c in terms(p)})
    return Expr("le0", p)


def eq0(p: Expr) -> Expr:
    """Return the predicate ``p == 0``."""
    n = as_int(p)
    if n is not None:
        return TRUE if n == 0 else FALSE
    if nonneg(sub(p, ONE), upper=False) or nonneg(sub(neg(p), ONE), upper=False):
        return FALSE
    if terms(p)[-1][1] < 0:
        p = neg(p)
    return Expr("eq0", p)


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
    parts = tuple(flat[k] for k in sorted(flat))
    if any(not_(a).key in flat for a in parts if a.op in ("not", "le0")):
        return zero
    return unit if not parts else parts[0] if len(parts) == 1 else Expr(op, parts)


def and_(*cs: Expr) -> Expr:
    """Return the conjunction."""
    return _connect("and", cs, TRUE, FALSE)


def or_(*cs: Expr) -> Expr:
    """Return the disjunction."""
    return _connect("or", cs, FALSE, TRUE)


def is_bool(e: Expr) -> bool:
    """Say whether ``e`` is a predicate (a load is one when it reads a bool tensor)."""
    return e.op in ("true", "false", "le0", "eq0", "not", "and", "or") or (e.op == "load" and e.args[2] == "bool")


def load(name: str, at: tuple[Expr, ...], kind: str) -> Expr:
    """Return the element of tensor ``name`` at index ``at``; kind is bool, int or float.  An int load is a polynomial."""
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
    pins = pinned(c)
    if pins:
        narrowed = substitute(a, pins)
        if narrowed == substitute(b, pins):
            return b
        a = narrowed
    if is_int(a) and is_int(b):
        return generator(Expr("where", c, a, b))
    return Expr("where", c, a, b)


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
    out = go(g)
    return out if out.op == "poly" else generator(out)  # type: ignore[no-any-return]


def call(fn: str, *args: Any) -> Expr:
    """Return an uninterpreted elementwise function of terms and plain values."""
    return Expr("call", fn, args)


def walk(e: Any, seen: set[str] | None = None) -> Iterator[Expr]:
    """Visit every distinct sub-expression once, generators and index tuples included."""
    seen = set() if seen is None else seen
    if isinstance(e, tuple):
        for x in e:
            yield from walk(x, seen)
    elif isinstance(e, Expr) and e.key not in seen:
        seen.add(e.key)
        yield e
        yield from walk(e.args if e.op != "index" else (), seen)


def indices(e: Expr) -> tuple[Expr, ...]:
    """Return the index generators that ``e`` depends on, in order of their keys."""
    return tuple(sorted((x for x in walk(e) if x.op == "index"), key=lambda g: g.key))


def loads(e: Expr) -> tuple[Expr, ...]:
    """Return the loads inside ``e``."""
    return tuple(x for x in walk(e) if x.op == "load")


# ---------------------------------------------------------------- text


def show(e: Any) -> str:
    """Return a readable text; index variables and sizes by name."""
    if not isinstance(e, Expr):
        return str(e)
    a = e.args
    if e.op == "poly":
        parts = []
        for m, c in a[0]:
            body = "*".join(show(g) for g in m)
            parts.append(f"{c}" if not m else body if c == 1 else f"-{body}" if c == -1 else f"{c}*{body}")
        return (" + ".join(reversed(parts)) or "0").replace("+ -", "- ")
    if e.op in ("index", "size", "opaque", "const"):
        return str(a[0])
    if e.op in ("true", "false"):
        return e.op
    if e.op in ("le0", "eq0"):
        return f"{show(a[0])} {'<=' if e.op == 'le0' else '=='} 0"
    if e.op in ("and", "or"):
        return "(" + (" & " if e.op == "and" else " | ").join(show(x) for x in a[0]) + ")"
    if e.op == "not":
        return f"~({show(a[0])})"
    if e.op == "load":
        return f"{a[0]}[{', '.join(show(x) for x in a[1])}]"
    if e.op == "call":
        return f"{a[0]}({', '.join(show(x) for x in a[1])})"
    if e.op in ("floordiv", "mod"):
        return f"({show(a[0])}) {'//' if e.op == 'floordiv' else '%'} ({show(a[1])})"
    return f"{e.op}({', '.join(show(x) for x in a)})"
