"""Sizes of tensors as polynomials: ints and SymInts become ``attnc.expr`` terms."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from attnc.expr import Expr, add, as_int, generator, integer, nonneg, product, show, size, sub


def dim(n: Any) -> Expr:
    """Return a size (int or SymInt) as a polynomial; floor and mod terms stay opaque generators.

    So does a symbol that is not known to be at least 1: a number the user passes, or one read from a tensor.
    """
    if isinstance(n, int):
        return integer(n)
    return _from_sympy(n.node.expr)


@lru_cache(maxsize=4096)
def _from_sympy(e: Any) -> Expr:
    if e.is_Integer:
        return integer(int(e))
    if e.is_Symbol and e.is_positive:
        return size(str(e))
    if e.is_Add:
        return add(*(_from_sympy(a) for a in e.args))
    if e.is_Mul:
        return product(_from_sympy(a) for a in e.args)
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return product(_from_sympy(e.base) for _ in range(int(e.exp)))
    kind = type(e).__name__  # torch has classes of its own for these two
    if kind in ("Max", "Min"):
        chosen = _extreme([_from_sympy(a) for a in e.args], kind == "Max")
        if chosen is not None:
            return chosen
    return generator(Expr("opaque", str(e)))


def _extreme(sizes: list[Expr], greatest: bool) -> Expr | None:
    """Return the greatest (or the least) of some sizes, None unless it is the same for all lengths."""
    for a in sizes:
        if all(nonneg(sub(a, b) if greatest else sub(b, a)) for b in sizes):
            return a
    return None


def show_dim(e: Expr) -> int | str:
    """Return a size as a number or as text such as ``s77`` or ``s77+8``, without blanks."""
    n = as_int(e)
    return n if n is not None else re.sub(r"\s", "", show(e))
