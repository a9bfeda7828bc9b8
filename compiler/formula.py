"""Predicates over positions as symbolic terms: integers with + - * // %, where, comparisons and connectives.

A closed formula reads the positions ``b h q k`` of one score (batch entry, head, query, key), the lengths
``Sq Sk`` in tokens and elements of integer run-time tensors at such positions (``c0[b,q]``).  ``fold`` walks
one with an ``Algebra``, which says what the operations mean: tensors, intervals of a tile, text, graph nodes.

Source: forms/static_sparse, section 22, P1 and P2, of the project's design notes: predicates are written on
coordinates, which are digits of token indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import torch

from attnc import expr as E
from attnc.expr import Expr

AXES = "bhqk"
LENGTHS: Mapping[str, Expr] = {"b": E.size("B"), "h": E.size("H"), "q": E.size("Sq"), "k": E.size("Sk")}
POSITIONS: Mapping[str, Expr] = {a: E.index(a, LENGTHS[a]) for a in AXES}
Q, K, B = POSITIONS["q"], POSITIONS["k"], POSITIONS["b"]
SQ, SK = LENGTHS["q"], LENGTHS["k"]

_NAMES = {**{p: a for a, p in POSITIONS.items()}, SQ: "Sq", SK: "Sk"}
SYMBOLS: Mapping[str, Expr] = {name: e for e, name in _NAMES.items()}
"""The symbols that a formula may name."""

T = TypeVar("T")
C = TypeVar("C")


class Algebra(Protocol[T, C]):
    """What the operations of a formula mean; ``T`` stands for integers, ``C`` for conditions."""

    def number(self, n: int) -> T:
        """Return a constant."""
        ...

    def symbol(self, name: str) -> T:
        """Return a position (``b h q k``) or a length (``Sq Sk``)."""
        ...

    def read(self, operand: str, axes: str) -> T:
        """Return the element of an integer operand at the positions ``axes``; ``?`` is elsewhere."""
        ...

    def add(self, a: T, b: T) -> T:
        """Return ``a + b``."""
        ...

    def sub(self, a: T, b: T) -> T:
        """Return ``a - b``."""
        ...

    def mul(self, a: T, b: T) -> T:
        """Return ``a * b``."""
        ...

    def floordiv(self, a: T, n: int) -> T:
        """Return ``a // n``, rounded down, for ``n > 0``."""
        ...

    def mod(self, a: T, n: int) -> T:
        """Return ``a % n`` in ``[0, n)``, for ``n > 0``."""
        ...

    def where(self, c: C, a: T, b: T) -> T:
        """Return ``a if c else b``."""
        ...

    def le(self, a: T, b: T) -> C:
        """Return ``a <= b``."""
        ...

    def eq(self, a: T, b: T) -> C:
        """Return ``a == b``."""
        ...

    def both(self, a: C, b: C) -> C:
        """Return the conjunction."""
        ...

    def either(self, a: C, b: C) -> C:
        """Return the disjunction."""
        ...

    def negate(self, a: C) -> C:
        """Return the negation."""
        ...


def is_closed(e: Expr) -> bool:
    """Say whether ``e`` is a formula: symbols, integer operands at positions, numbers as divisors."""
    return E.is_bool(e) and e.op != "load" and all(map(_is_known, E.walk(e)))


_KNOWN = frozenset(("poly", "le0", "eq0", "not", "and", "or", "true", "false"))


def _is_known(x: Expr) -> bool:
    match x.op:
        case "index" | "size":
            return E.generator(x) in _NAMES
        case "load":
            return x.args[2] == "int" and reading(x) is not None
        case "floordiv" | "mod":
            return (E.as_int(x.args[1]) or 0) > 0
        case "where":
            return E.is_int(x.args[1]) and E.is_int(x.args[2])
    return x.op in _KNOWN


def reading(load: Expr) -> str | None:
    """Return the axes of an element that is read at positions, such as ``bk``; None for any other index."""
    names = [_NAMES.get(i, "") for i in load.args[1]]
    text = "".join(names)
    return text if all(len(n) == 1 for n in names) and len(set(text)) == len(text) else None


def operands(e: Expr) -> tuple[str, ...]:
    """Return the names of the operands that a formula reads, in the order of the walk."""
    return tuple(dict.fromkeys(x.args[0] for x in E.walk(e) if x.op == "load"))


def renamed(e: Expr, names: Mapping[str, str]) -> Expr:
    """Return a formula that reads other operands."""
    by = {x: E.load(names[x.args[0]], x.args[1], "int") for x in E.walk(e) if x.op == "load"}
    return E.substitute(e, by)


def fold(e: Expr, algebra: Algebra[T, C]) -> C:
    """Return the meaning of a formula; equal parts are visited once."""
    return _Fold(algebra).condition(e)


class _Fold(Generic[T, C]):
    """One walk over a formula."""

    def __init__(self, algebra: Algebra[T, C]) -> None:
        self.a = algebra
        self.conditions: dict[Expr, C] = {}
        self.numbers: dict[Expr, T] = {}

    def condition(self, e: Expr) -> C:
        if e not in self.conditions:
            self.conditions[e] = self._condition(e)
        return self.conditions[e]

    def _condition(self, e: Expr) -> C:
        a = self.a
        if e.op in ("and", "or"):
            join = a.both if e.op == "and" else a.either
            out = self.condition(e.args[0][0])
            for part in e.args[0][1:]:
                out = join(out, self.condition(part))
            return out
        if e.op == "not":
            return a.negate(self.condition(e.args[0]))
        if e.op == "load":
            return a.eq(self._atom(e), a.number(1))
        if e.op in ("true", "false"):
            return a.le(a.number(0 if e.op == "true" else 1), a.number(0))
        more, less = sides(e.args[0])
        compare = a.le if e.op == "le0" else a.eq
        return compare(self.number(more), self.number(less))

    def number(self, p: Expr) -> T:
        """Return the sum, terms with positive factors first."""
        if p not in self.numbers:
            self.numbers[p] = self._number(p)
        return self.numbers[p]

    def _number(self, p: Expr) -> T:
        a, constant = self.a, sum(c for m, c in E.terms(p) if not m)
        terms = sorted(((m, c) for m, c in E.terms(p) if m), key=lambda t: t[1] < 0)
        if not terms:
            return a.number(constant)
        out = self._product(*terms[0])
        for m, c in terms[1:]:
            out = (a.sub if c < 0 else a.add)(out, self._product(m, abs(c)))
        if not constant:
            return out
        return (a.add if constant > 0 else a.sub)(out, a.number(abs(constant)))

    def _product(self, m: tuple[Expr, ...], c: int) -> T:
        out = self._generator(m[0])
        for g in m[1:]:
            out = self.a.mul(out, self._generator(g))
        return out if c == 1 else self.a.mul(self.a.number(c), out)

    def _generator(self, g: Expr) -> T:
        if g not in self.numbers:
            self.numbers[g] = self._atom(g)
        return self.numbers[g]

    def _atom(self, g: Expr) -> T:
        a = self.a
        if g.op in ("index", "size"):
            return a.symbol(_NAMES[E.generator(g)])
        if g.op == "load":
            return a.read(g.args[0], reading(g) or "?")
        if g.op == "where":
            c, x, y = g.args
            return a.where(self.condition(c), self.number(x), self.number(y))
        n = E.as_int(g.args[1])
        assert n is not None, f"{g} has no constant divisor"
        return (a.floordiv if g.op == "floordiv" else a.mod)(self.number(g.args[0]), n)


def sides(p: Expr) -> tuple[Expr, Expr]:
    """Write ``p`` as a difference of two sums with positive factors.

    A comparison with zero becomes one of the two, which reads better and cannot overflow sooner.
    """
    more = E.from_terms({m: c for m, c in E.terms(p) if c > 0})
    return more, E.sub(more, p)


# ---------------------------------------------------------------- tensors


class Tensors:
    """Formulas as tensors that broadcast to ``[B, H, Sq, Sk]``, int64 and bool."""

    def __init__(
        self, sizes: Mapping[str, int], device: torch.device, captured: Mapping[str, torch.Tensor]
    ) -> None:
        self.sizes, self.device, self.captured = sizes, device, captured

    def number(self, n: int) -> torch.Tensor:
        """Return a scalar."""
        return torch.tensor(n, device=self.device)

    def symbol(self, name: str) -> torch.Tensor:
        """Return positions along their axis, or a length."""
        if name not in AXES:
            return self.number(self.sizes[name[1:]])
        shape = [-1 if a == name else 1 for a in AXES]
        return torch.arange(self.sizes[name], device=self.device).view(shape)

    def read(self, operand: str, axes: str) -> torch.Tensor:
        """Return the operand with its axes in their places; an axis of size 1 broadcasts."""
        x = self.captured[operand].to(torch.int64)
        order = sorted(range(len(axes)), key=lambda i: AXES.index(axes[i]))
        x, present = x.permute(order), "".join(axes[i] for i in order)
        for at, a in enumerate(AXES):
            x = x if a in present else x.unsqueeze(at)
        return x

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return a + b

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the difference."""
        return a - b

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        return a * b

    def floordiv(self, a: torch.Tensor, n: int) -> torch.Tensor:
        """Return the quotient, rounded down."""
        return torch.div(a, n, rounding_mode="floor")

    def mod(self, a: torch.Tensor, n: int) -> torch.Tensor:
        """Return the non-negative remainder."""
        return torch.remainder(a, n)

    def where(self, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Choose."""
        return torch.where(c, a, b)

    def le(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare."""
        return a <= b

    def eq(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare."""
        return a == b

    def both(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the conjunction."""
        return a & b

    def either(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the disjunction."""
        return a | b

    def negate(self, a: torch.Tensor) -> torch.Tensor:
        """Return the negation."""
        return ~a
