"""An element as a sum of products: numbers apart, factors as they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attnc import expr as E
from attnc.expr import Expr

MOST = 16
"""Products in one element beyond which it is no rotation of anything."""


@dataclass(frozen=True, slots=True)
class Product:
    """``number`` times every factor, each as often as it is counted."""

    number: float
    factors: tuple[Expr, ...]

    def without(self, factor: Expr) -> Product:
        """Return the product with one occurrence of a factor taken out."""
        rest = list(self.factors)
        rest.remove(factor)
        return Product(self.number, tuple(rest))

    def calls(self, name: str) -> list[Expr]:
        """Return the factors that are calls of one function."""
        return [f for f in self.factors if f.op == "call" and f.args[0] == name]


def apart(a: Product, b: Product) -> tuple[Counter[Expr], Counter[Expr]]:
    """Return the factors of two products that they do not share."""
    x, y = Counter(a.factors), Counter(b.factors)
    return x - y, y - x


def products(e: Expr, is_table: Callable[[Expr], bool]) -> tuple[Product, ...] | None:
    """Multiply out an element; a sum that ``is_table`` holds for stays one factor.

    None if the element is a choice that is still open, or more than ``MOST`` products.
    """
    number = E.as_number(e)
    if number is not None:
        return () if number == 0 else (Product(float(number), ()),)
    if e.op == "where":
        return None
    if e.op != "call":
        return (Product(1.0, (e,)),)
    name, args = e.args
    if name not in ("add", "sub", "mul", "div") or (name != "mul" and is_table(e)):
        return (Product(1.0, (e,)),)
    a, b = (products(x, is_table) for x in args)
    if a is None or b is None:
        return None
    if name == "div":
        return _over(a, args[1])
    if name == "mul":
        out = tuple(Product(x.number * y.number, _sorted(x.factors + y.factors)) for x in a for y in b)
    else:
        sign = 1.0 if name == "add" else -1.0
        out = (*a, *(Product(sign * y.number, y.factors) for y in b))
    return out if len(out) <= MOST else None


def _over(a: tuple[Product, ...], divisor: Expr) -> tuple[Product, ...]:
    number = E.as_number(divisor)
    if number is not None:
        return tuple(Product(x.number / number, x.factors) for x in a) if number else a
    inverse = E.call("inverse", divisor)
    return tuple(Product(x.number, _sorted((*x.factors, inverse))) for x in a)


def _sorted(factors: tuple[Expr, ...]) -> tuple[Expr, ...]:
    return tuple(sorted(factors, key=lambda f: f.key))
