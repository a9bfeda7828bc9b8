"""Formulas as kernel text over ``qi`` and ``ki``, whose division rounds towards zero on a GPU.

The same text means the same in torch, where division rounds down, so the reference in an emitted file reads
it too.
"""

from __future__ import annotations

from collections.abc import Callable

from attnc import expr as E
from attnc.expr import Expr
from attnc.formula_text import bracket

LARGEST = 1 << 10
"""The largest sum of factors in a term: positions below 2**21 then stay within 32 bits."""

Number = tuple[str, bool]
"""A text, and whether it is proved to be at least 0."""


def problem(e: Expr, places: str = "qkhb") -> str | None:
    """Return what of a formula the kernel does not have: other symbols, products, large factors.

    ``places`` are the positions that it knows.
    """
    reads = [x for x in E.walk(e) if x.op == "load"]
    for x in reads:
        if len(x.args[1]) > 2:
            return f"the mask reads {x.args[0]} per pair"
    for name in positions(e):
        if name not in places:
            return f"the mask depends on the index {name}"
    for x in E.walk(e):
        if x.op == "poly" and any(len(m) > 1 for m, _ in E.terms(x)):
            return "the mask multiplies positions"
        if x.op == "poly" and sum(abs(c) for m, c in E.terms(x) if m) > LARGEST:
            return f"the mask multiplies positions by more than {LARGEST}"
    return None


def positions(e: Expr) -> list[str]:
    """Return the positions that a formula computes with, apart from where it reads tensors."""
    reads = [x for x in E.walk(e) if x.op == "load"]
    walked = E.walk(E.substitute(e, dict.fromkeys(reads, E.ZERO)))
    return list(dict.fromkeys(str(x.args[0]) for x in walked if x.op == "index"))


class Kernel:
    """The algebra of kernel text; ``name`` gives the text of an operand along axes."""

    def __init__(self, name: Callable[[str, str], str], where: str) -> None:
        self.name, self.choose = name, where

    def number(self, n: int) -> Number:
        """Return digits."""
        return str(n), n >= 0

    def symbol(self, name: str) -> Number:
        """Return positions as a column or a row, the head or batch entry, or a length."""
        return {"q": "qi", "k": "ki", "h": "head", "b": "batch", "Sq": "sq", "Sk": "sk"}[name], True

    def read(self, operand: str, axes: str) -> Number:
        """Return the name of the loaded tile."""
        return self.name(operand, axes), False

    def add(self, a: Number, b: Number) -> Number:
        """Return the sum."""
        return f"{a[0]} + {b[0]}", a[1] and b[1]

    def sub(self, a: Number, b: Number) -> Number:
        """Return the difference."""
        return f"{a[0]} - {bracket(b[0])}", False

    def mul(self, a: Number, b: Number) -> Number:
        """Return the product."""
        return f"{bracket(a[0])} * {bracket(b[0])}", a[1] and b[1]

    def floordiv(self, a: Number, n: int) -> Number:
        """Return the quotient, rounded down: what division leaves goes first where it may be negative."""
        x = a if a[1] else self.sub(a, self.mod(a, n))
        return f"{bracket(x[0])} // {n}", a[1]

    def mod(self, a: Number, n: int) -> Number:
        """Return the non-negative remainder."""
        rest = f"{bracket(a[0])} % {n}"
        return (rest if a[1] else f"({rest} + {n}) % {n}"), True

    def where(self, c: str, a: Number, b: Number) -> Number:
        """Choose."""
        return f"{self.choose}({c}, {a[0]}, {b[0]})", a[1] and b[1]

    def le(self, a: Number, b: Number) -> str:
        """Compare."""
        return f"{a[0]} <= {b[0]}"

    def eq(self, a: Number, b: Number) -> str:
        """Compare."""
        return f"{a[0]} == {b[0]}"

    def both(self, a: str, b: str) -> str:
        """Return the conjunction."""
        return f"{bracket(a)} & {bracket(b)}"

    def either(self, a: str, b: str) -> str:
        """Return the disjunction."""
        return f"{bracket(a)} | {bracket(b)}"

    def negate(self, a: str) -> str:
        """Return the negation."""
        return f"~{bracket(a)}"
