"""Elementwise arithmetic on symbolic values, exact or not at all.

Integers are polynomials, predicates are kept apart from numbers, and a ``where`` is carried outwards through
the operation. What a tensor's dtype cannot hold exactly is not computed here: bf16 has no 257, and uint8 no
-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnc import expr as E
from attnc.expr import FALSE, ONE, TRUE, ZERO, Expr
from attnc.sizes import dim

LONGEST = 2**20
"""The most tokens a symbolic length is taken to have when it is asked whether a float holds it."""


def literal(x: Any) -> Expr:
    """Return a Python number as a constant."""
    if isinstance(x, bool):
        return TRUE if x else FALSE
    if isinstance(x, int):
        return E.integer(x)
    if isinstance(x, torch.SymInt):
        return dim(x)
    return E.real(float(x))


# ---------------------------------------------------------------- what a dtype holds


def held(x: Expr, dtype: torch.dtype) -> Expr | None:
    """Return ``x`` as a tensor of ``dtype`` holds it: constants rounded, predicates as numbers.

    None if a value that is not constant might be rounded or wrap around.
    """
    if dtype == torch.bool:
        return to_bool(x)
    if E.is_bool(x):
        x = E.where(x, *((ONE, ZERO) if not dtype.is_floating_point else (E.real(1.0), E.real(0.0))))
    if x.op == "where":
        arms = [held(arm, dtype) for arm in x.args[1:]]
        return None if arms[0] is None or arms[1] is None else E.where(x.args[0], arms[0], arms[1])
    if dtype.is_floating_point:
        return _in_float(x, dtype)
    if x.op == "const":
        return to_int(x)
    return x if not E.is_int(x) or _fits(x, dtype) else None


def _choice(x: Expr) -> tuple[Expr, Expr, Expr] | None:
    """Return (condition, value if it holds, value if not) of a piecewise value.

    In a sum of integers the first piecewise term chooses.
    """
    if x.op == "where":
        c, a, b = x.args
        return c, a, b
    gs = _piecewise(x)
    if not gs:
        return None
    g, k = gs[0]
    rest = E.sub(x, E.mul(E.integer(k), E.generator(g)))
    a, b = (E.add(rest, E.mul(E.integer(k), arm)) for arm in g.args[1:])
    return g.args[0], a, b


def _piecewise(x: Expr) -> list[tuple[Expr, int]]:
    """Return the piecewise terms of an integer with their factors."""
    if not E.is_int(x):
        return []
    return [(m[0], k) for m, k in E.terms(x) if len(m) == 1 and m[0].op == "where"]


def _in_float(x: Expr, dtype: torch.dtype) -> Expr | None:
    number = E.as_number(x)
    if number is not None:
        value = rounded(number, dtype)
        return x if value == number or math.isnan(value) else E.real(value)
    if not E.is_int(x):
        return x
    exact = 2 / torch.finfo(dtype).eps
    if magnitude(x) <= exact:
        return x
    # Rounding is monotone, so an integer that was loaded compares with a small constant as its rounding does.
    variables = [(m, c) for m, c in E.terms(x) if m]
    constants = [abs(c) for m, c in E.terms(x) if not m]
    alone = len(variables) == 1 and abs(variables[0][1]) == 1 and [g.op for g in variables[0][0]] == ["load"]
    return x if alone and exact >= 2**24 and all(c < LONGEST for c in constants) else None


def rounded(x: float, dtype: torch.dtype) -> float:
    """Return a number as a tensor of a floating ``dtype`` holds it; what is too large becomes infinite."""
    return float(torch.tensor(float(x), dtype=dtype))


def _fits(x: Expr, dtype: torch.dtype) -> bool:
    """Say whether an integer polynomial stays in range; 32 and 64 bits are taken to be enough."""
    if dtype in (torch.int64, torch.int32):
        return True
    info = torch.iinfo(dtype)
    return magnitude(x) <= info.max and (info.min < 0 or E.nonneg(x))


def magnitude(x: Expr) -> float:
    """Return a bound on the absolute value of an integer polynomial, infinity if it reads data."""
    return sum(abs(c) * math.prod(_most(g) for g in m) for m, c in E.terms(x))


def _most(g: Expr) -> float:
    if g.op == "size":
        return LONGEST
    if g.op in ("index", "mod"):
        n = E.as_int(g.args[1])
        return LONGEST if n is None else max(n - 1, 0)
    if g.op == "floordiv":
        return magnitude(g.args[0])
    if g.op == "where":
        return max(magnitude(a) for a in g.args[1:])
    return math.inf


# ---------------------------------------------------------------- casts


def to_bool(x: Expr) -> Expr:
    """Return ``x != 0``."""
    if E.is_bool(x):
        return x
    choice = _choice(x) if _pieces(x) <= PIECES else None
    if choice is not None:
        return E.where(choice[0], to_bool(choice[1]), to_bool(choice[2]))
    if E.is_int(x):
        return E.not_(E.eq0(x))
    n = E.as_number(x)
    return (TRUE if n else FALSE) if n is not None else E.not_(E.call("is_zero", x))


def to_int(x: Expr) -> Expr | None:
    """Return a predicate as 0 or 1, an integer as it is; None for floats that are no whole constants."""
    if E.is_int(x):
        return x
    if E.is_bool(x):
        return E.where(x, ONE, ZERO)
    if x.op == "where":
        a, b = to_int(x.args[1]), to_int(x.args[2])
        return None if a is None or b is None else E.where(x.args[0], a, b)
    n = E.as_number(x)
    return E.integer(int(n)) if n is not None and math.isfinite(n) and n == int(n) else None


# ---------------------------------------------------------------- operations

PIECES = 6
"""The most pairs of arms that an operation on two piecewise values is carried into."""


def _pieces(x: Expr) -> int:
    """Return the number of arms of a piecewise value."""
    if x.op == "where":
        return _pieces(x.args[1]) + _pieces(x.args[2])
    return math.prod(_pieces(g.args[1]) + _pieces(g.args[2]) for g, _ in _piecewise(x))


def _may_multiply(a: Expr, b: Expr) -> bool:
    """Say whether an operation on all pairs of arms stays small; one piecewise value may have many arms."""
    alone = len(_piecewise(a)) + len(_piecewise(b)) + (a.op == "where") + (b.op == "where") <= 1
    return alone or _pieces(a) * _pieces(b) <= PIECES


def _lift(f: Callable[[Expr, Expr], Expr | None], a: Expr, b: Expr) -> Expr | None:
    """Apply ``f`` inside the arms of a ``where``, unless two of them would multiply to too many pieces."""
    if not _may_multiply(a, b):
        return f(a, b)
    for x, other, swap in ((a, b, False), (b, a, True)):
        choice = _choice(x)
        if choice is None:
            continue
        arms = [_lift(f, other, arm) if swap else _lift(f, arm, other) for arm in choice[1:]]
        if arms[0] is None or arms[1] is None:
            return None
        return E.where(choice[0], arms[0], arms[1])
    return f(a, b)


_INTEGER: dict[str, Callable[[Expr, Expr], Expr]] = {"add": E.add, "sub": E.sub, "mul": E.mul}


def arithmetic(op: str, a: Expr, b: Expr) -> Expr:
    """Return ``a op b`` for op in add, sub, mul, div.

    Exact on integers, folded on constants, else symbolic.
    """
    if E.is_int(a) and E.is_int(b) and op in ("add", "sub"):
        return _INTEGER[op](a, b)
    out = _lift(lambda x, y: _plain(op, x, y), a, b)
    return E.call(op, a, b) if out is None else out


def _plain(op: str, x: Expr, y: Expr) -> Expr | None:
    m, n = E.as_number(x), E.as_number(y)
    if m is not None and n is not None and not (E.is_int(x) and E.is_int(y) and op != "div"):
        return _constants(op, m, n, x, y)
    if E.is_bool(x) or E.is_bool(y):
        x, y = (E.where(v, ONE, ZERO) if E.is_bool(v) else v for v in (x, y))
        return arithmetic(op, x, y)
    if op == "mul" and 0 in (m, n) and E.is_int(y if m == 0 else x):
        return ZERO if E.is_int(x) and E.is_int(y) else E.real(0.0)
    x, y = _same_kind(x, y)
    if E.is_int(x) and E.is_int(y) and op != "div":
        return _INTEGER[op](x, y)
    if (op in ("add", "sub") and n == 0) or (op in ("mul", "div") and n == 1):
        return x
    if (op == "add" and m == 0) or (op == "mul" and m == 1):
        return y
    return E.call(op, x, y)


def _constants(op: str, m: float, n: float, x: Expr, y: Expr) -> Expr:
    if op == "div":
        return E.real(m / n) if n != 0 else E.call(op, x, y)
    return E.real({"add": m + n, "sub": m - n, "mul": m * n}[op])


def _same_kind(x: Expr, y: Expr) -> tuple[Expr, Expr]:
    """Turn whole float constants and their ``where`` into integers when the other side is or can be one."""
    if E.is_int(x) and not E.is_int(y) and y.op in ("const", "where"):
        return x, to_int(y) or y
    if E.is_int(y) and not E.is_int(x) and x.op in ("const", "where"):
        return to_int(x) or x, y
    if x.op == y.op == "where":
        i, j = to_int(x), to_int(y)
        return (x, y) if i is None or j is None else (i, j)
    return x, y


def extreme(op: str, a: Expr, b: Expr) -> Expr | None:
    """Return the ``max`` or ``min`` of two integers or constants, None for others.

    Integers are compared whole, so that a later comparison sees the extreme and not its arms.
    """
    if E.is_int(a) and E.is_int(b):
        return _extreme(op, a, b)
    return _lift(lambda x, y: _extreme(op, x, y), a, b)


def _extreme(op: str, x: Expr, y: Expr) -> Expr | None:
    m, n = E.as_number(x), E.as_number(y)
    if m is not None and n is not None:
        return x if (m >= n) == (op == "max") else y
    i, j = to_int(x), to_int(y)
    if i is None or j is None:
        far = m if m is not None else n
        if far is None or not math.isinf(far) or not (E.is_int(x) or E.is_int(y)):
            return None
        return (y if m is not None else x) if (far < 0) == (op == "max") else E.real(far)
    return E.where(E.le0(E.sub(i, j)), *((j, i) if op == "max" else (i, j)))


# ---------------------------------------------------------------- comparisons


def compare(op: str, a: Expr, b: Expr) -> Expr:
    """Return ``a op b`` as a predicate for op in le, lt, ge, gt, eq, ne.

    Both sides must be integers, predicates or constants; else the predicate is opaque.
    """
    out = _compared(op, a, b)
    return E.not_(E.call("is_zero", E.call(op, a, b))) if out is None else out


_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}


def _compared(op: str, a: Expr, b: Expr) -> Expr | None:
    if E.is_int(a) and E.is_int(b):
        a, b, op = _isolated(a, b, op)
    for x, y, how in ((a, b, op), (b, a, _MIRRORED[op])):
        found = _bound(how, x, y)
        if found is not None:
            return found
    return _lift(lambda x, y: _decided(op, x, y), a, b)


def _isolated(a: Expr, b: Expr, op: str) -> tuple[Expr, Expr, str]:
    """Bring the one piecewise term of a comparison to its left side, alone."""
    d = E.sub(a, b)
    found = [(m[0], c) for m, c in E.terms(d) if len(m) == 1 and m[0].op == "where"]
    if len(found) != 1 or abs(found[0][1]) != 1:
        return a, b, op
    g, c = E.generator(found[0][0]), found[0][1]
    rest = E.sub(d, E.mul(E.integer(c), g))
    return (g, E.neg(rest), op) if c > 0 else (g, rest, _MIRRORED[op])


def _bound(op: str, x: Expr, y: Expr) -> Expr | None:
    """Compare a maximum or minimum by its parts: ``max(a, b) <= y`` is ``a <= y`` and ``b <= y``."""
    kind = _extreme_of(x)
    if kind is None:
        return None
    which, a, b = kind
    if op in ("eq", "ne"):
        return _equal_extreme(op, which, a, b, y)
    parts = [_compared(op, a, y), _compared(op, b, y)]
    if parts[0] is None or parts[1] is None:
        return None
    return (E.and_ if (which == "max") == (op in ("le", "lt")) else E.or_)(parts[0], parts[1])


def _equal_extreme(op: str, which: str, a: Expr, b: Expr, y: Expr) -> Expr | None:
    """Return ``max(a, b) == y``: one is y, and the other is not beyond it."""
    other = "le" if which == "max" else "ge"
    parts = [_compared(o, x, y) for o, x in (("eq", a), (other, b), ("eq", b), (other, a))]
    if any(p is None for p in parts):
        return None
    p, q, r, s = (x for x in parts if x is not None)
    same = E.or_(E.and_(p, q), E.and_(r, s))
    return same if op == "eq" else E.not_(same)


def _extreme_of(x: Expr) -> tuple[str, Expr, Expr] | None:
    """Return ("max" or "min", a, b) if an integer ``where`` chooses by the order of its arms."""
    g = E.only_generator(x) if E.is_int(x) else None
    if g is None or g.op != "where" or g.args[0].op != "le0":
        return None
    c, a, b = g.args
    for which, d in (("min", E.sub(a, b)), ("max", E.sub(b, a))):
        if c in (E.le0(d), E.le0(E.add(d, ONE))):
            return which, a, b
    return None


def _decided(op: str, x: Expr, y: Expr) -> Expr | None:
    if E.is_bool(x) and E.is_bool(y) and op in ("eq", "ne"):
        same = E.or_(E.and_(x, y), E.and_(E.not_(x), E.not_(y)))
        return same if op == "eq" else E.not_(same)
    m, n = E.as_number(x), E.as_number(y)
    if m is not None and n is not None:
        ok = {"le": m <= n, "lt": m < n, "ge": m >= n, "gt": m > n, "eq": m == n, "ne": m != n}[op]
        return TRUE if ok else FALSE
    i, j = to_int(x), to_int(y)
    if i is not None and j is not None:
        if max(_pieces(i), _pieces(j)) > 1 and _may_multiply(i, j) and not (x == i and y == j):
            return _lift(lambda u, v: _decided(op, u, v), i, j)
        d = E.sub(i, j)
        table = {"le": d, "lt": E.add(d, ONE), "ge": E.neg(d), "gt": E.add(E.neg(d), ONE)}
        return E.le0(table[op]) if op in table else E.eq0(d) if op == "eq" else E.not_(E.eq0(d))
    if i is not None and n is not None:
        return _with_fraction(op, i, n)
    return _with_fraction(_MIRRORED[op], j, m) if j is not None and m is not None else None


def _with_fraction(op: str, i: Expr, n: float) -> Expr | None:
    """Compare an integer with a number that is no integer: a fraction or an infinity."""
    if math.isnan(n):
        return TRUE if op == "ne" else FALSE
    if op in ("eq", "ne"):
        return TRUE if op == "ne" else FALSE
    below = op in ("le", "lt")
    if math.isinf(n):
        return TRUE if (n > 0) == below else FALSE
    edge = E.integer(math.floor(n))
    return E.le0(E.sub(i, edge)) if below else E.le0(E.add(E.sub(edge, i), ONE))
