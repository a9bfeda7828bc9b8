"""Formulas as text: ``{q // 16 == k // 16}``, read back by ``parse``, and short names for the usual ones.

A name stands for the formula that its function returns, so a named form needs no code of its own: whoever
knows formulas knows it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from attnc import expr as E
from attnc.expr import Expr
from attnc.formula import SYMBOLS, B, K, Q, fold, operands

# ---------------------------------------------------------------- named forms


def chunk(size: int) -> Expr:
    """Return "query and key lie in one chunk of ``size`` tokens" (llama 4, blockwise attention)."""
    n = E.integer(size)
    return E.eq0(E.sub(E.floordiv(Q, n), E.floordiv(K, n)))


def blocks(size: int) -> Expr:
    """Return "the key's block of ``size`` tokens does not come after the query's" (block-causal)."""
    n = E.integer(size)
    return E.le0(E.sub(E.floordiv(K, n), E.floordiv(Q, n)))


def stride(step: int, rest: int = 0) -> Expr:
    """Return "the distance q - k is ``rest`` modulo ``step``" (dilated attention)."""
    return E.eq0(E.sub(E.mod(E.sub(Q, K), E.integer(step)), E.integer(rest)))


def document(queries: str, keys: str = "") -> Expr:
    """Return "query and key have one id": rows ``[B, Sq]`` and ``[B, Sk]`` of run-time integers."""
    row = E.load(queries, (B, Q), "int")
    return E.eq0(E.sub(row, E.load(keys or queries, (B, K), "int")))


def prefix(lengths: str) -> Expr:
    """Return "the key lies in the first ``lengths[b]`` tokens": run-time integers ``[B]`` (prefix-LM)."""
    return E.le0(E.add(K, E.ONE, E.neg(E.load(lengths, (B,), "int"))))


_NUMBERS: dict[str, Callable[..., Expr]] = {"chunk": chunk, "blocks": blocks, "stride": stride}
_ROWS: dict[str, Callable[..., Expr]] = {"document": document, "prefix": prefix}
NAMES = frozenset((*_NUMBERS, *_ROWS))


def named(name: str, args: list[str]) -> Expr | None:
    """Return the formula of a short form, None if there is no such form."""
    if name in _NUMBERS:
        return _NUMBERS[name](*map(int, args))
    return _ROWS[name](*args) if name in _ROWS else None


def short(e: Expr) -> tuple[str, tuple[str, ...]] | None:
    """Return the name and the arguments of a formula that has one."""
    divisors = [n for x in E.walk(e) if x.op in ("floordiv", "mod") and (n := E.as_int(x.args[1]))]
    for n in dict.fromkeys(divisors):
        for name, form in _NUMBERS.items():
            if form(n) == e:
                return name, (str(n),)
        if e.op == "eq0":
            rest = -sum(c for m, c in E.terms(e.args[0]) if not m)
            if rest and stride(n, abs(rest)) == e:
                return "stride", (str(n), str(abs(rest)))
    reads = operands(e)
    for name, form in _ROWS.items():
        if len(reads) == 1 and form(*reads) == e:
            return name, reads
        if name == "document" and len(reads) == 2:
            for pair in (reads, reads[::-1]):
                if form(*pair) == e:
                    return name, pair
    return None


# ---------------------------------------------------------------- writing


class Text:
    """Formulas as Python expressions; a part that needs brackets in a product gets them."""

    def number(self, n: int) -> str:
        """Return digits."""
        return str(n)

    def symbol(self, name: str) -> str:
        """Return the name."""
        return name

    def read(self, operand: str, axes: str) -> str:
        """Return ``operand[b,k]``."""
        return f"{operand}[{','.join(axes)}]"

    def add(self, a: str, b: str) -> str:
        """Return the sum."""
        return f"{a} + {b}"

    def sub(self, a: str, b: str) -> str:
        """Return the difference."""
        return f"{a} - {bracket(b)}"

    def mul(self, a: str, b: str) -> str:
        """Return the product."""
        return f"{bracket(a)} * {bracket(b)}"

    def floordiv(self, a: str, n: int) -> str:
        """Return the quotient."""
        return f"{bracket(a)} // {n}"

    def mod(self, a: str, n: int) -> str:
        """Return the remainder."""
        return f"{bracket(a)} % {n}"

    def where(self, c: str, a: str, b: str) -> str:
        """Return the choice."""
        return f"where({c}, {a}, {b})"

    def le(self, a: str, b: str) -> str:
        """Return the comparison."""
        return f"{a} <= {b}"

    def eq(self, a: str, b: str) -> str:
        """Return the comparison."""
        return f"{a} == {b}"

    def both(self, a: str, b: str) -> str:
        """Return the conjunction."""
        return f"{bracket(a)} & {bracket(b)}"

    def either(self, a: str, b: str) -> str:
        """Return the disjunction."""
        return f"{bracket(a)} | {bracket(b)}"

    def negate(self, a: str) -> str:
        """Return the negation."""
        return f"~{bracket(a)}"


_SIMPLE = re.compile(r"[\w.]+(\[[\w, ]*\])?")


def bracket(text: str) -> str:
    """Put brackets around anything but a name, a number, an element or one call."""
    return text if _SIMPLE.fullmatch(text) or _is_call(text) else f"({text})"


def _is_call(text: str) -> bool:
    """Say whether the text is one call or one bracket, closed at its end only."""
    if not re.match(r"[\w.]*\(", text) or not text.endswith(")"):
        return False
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and c == ")":
            return at == len(text) - 1
    return False


def show(e: Expr) -> str:
    """Return the short form, or the formula in braces, without blanks."""
    found = short(e)
    if found is not None:
        return f"{found[0]}({','.join(found[1])})"
    return "{" + fold(e, Text()).replace(" ", "") + "}"


# ---------------------------------------------------------------- reading


def parse(text: str) -> Expr:
    """Return the formula that ``show`` wrote in braces.

    Raises:
        ValueError: the text is no formula; the message names the part that was not understood.
    """
    try:
        tree = ast.parse(text.strip("{}"), mode="eval").body
    except SyntaxError as e:
        raise ValueError(f"expected a formula, found {text!r}") from e
    return _condition(tree)


def _condition(t: ast.expr) -> Expr:
    match t:
        case ast.Compare(left=a, ops=[ast.LtE() | ast.Eq() as op], comparators=[b]):
            d = E.sub(_number(a), _number(b))
            return E.le0(d) if isinstance(op, ast.LtE) else E.eq0(d)
        case ast.BinOp(left=a, op=ast.BitAnd(), right=b):
            return E.and_(_condition(a), _condition(b))
        case ast.BinOp(left=a, op=ast.BitOr(), right=b):
            return E.or_(_condition(a), _condition(b))
        case ast.UnaryOp(op=ast.Invert(), operand=a):
            return E.not_(_condition(a))
    raise ValueError(f"expected a comparison, &, | or ~ in a formula, found {ast.unparse(t)!r}")


def _number(t: ast.expr) -> Expr:
    match t:
        case ast.Constant(value=int(n)):
            return E.integer(n)
        case ast.UnaryOp(op=ast.USub(), operand=a):
            return E.neg(_number(a))
        case ast.Name(id=name) if name in SYMBOLS:
            return SYMBOLS[name]
        case ast.Subscript(value=ast.Name(id=name), slice=at):
            places = at.elts if isinstance(at, ast.Tuple) else [at]
            return E.load(name, tuple(_number(x) for x in places), "int")
        case ast.BinOp(left=a, op=ast.FloorDiv(), right=ast.Constant(value=int(n))) if n > 0:
            return E.floordiv(_number(a), E.integer(n))
        case ast.BinOp(left=a, op=ast.Mod(), right=ast.Constant(value=int(n))) if n > 0:
            return E.mod(_number(a), E.integer(n))
        case ast.BinOp(left=a, op=ast.Add() | ast.Sub() | ast.Mult() as op, right=b):
            x, y = _number(a), _number(b)
            if isinstance(op, ast.Mult):
                return E.mul(x, y)
            return E.add(x, y if isinstance(op, ast.Add) else E.neg(y))
        case ast.Call(func=ast.Name(id="where"), args=[c, a, b]):
            return E.where(_condition(c), _number(a), _number(b))
    raise ValueError(f"expected an integer term in a formula, found {ast.unparse(t)!r}")
