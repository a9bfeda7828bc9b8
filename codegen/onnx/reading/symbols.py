"""Symbolic sizes of an ONNX graph: one symbol per named dimension, with a hint that no fixed size has."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy.functions import FloorDiv

if TYPE_CHECKING:
    import onnx_ir as ir

Size = int | torch.SymInt


@dataclass(frozen=True, slots=True)
class Multiple:
    """A size that a number divides: ``times`` that many of the size called ``part``."""

    times: int
    part: str

    def __str__(self) -> str:
        return f"{self.times} * ({self.part})"


Equal = str | int | Multiple
"""What a size must be: as long as another one, a number, or a multiple of a number."""


class EqualSizesError(Exception):
    """A size must be another one for the graph to run: it is read again with that one in its place."""

    def __init__(self, name: str, other: Equal) -> None:
        super().__init__(f"{name} = {other}")
        self.name, self.other = name, other


class Symbols:
    """Make sizes.  ``equal`` says which names stand for another name, a number, or a multiple of one.

    Symbols are taken to be 2 or more, as in ``torch.export``.  Their hints are primes that are no fixed size
    of the graph (``fixed``), so that no two sizes are taken to be equal by accident.
    """

    def __init__(self, fixed: Collection[int], equal: Mapping[str, Equal]) -> None:
        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.equal = dict(equal)
        self.names: dict[str, str] = {}
        self.assumed: dict[str, None] = {}
        self._made: dict[str, Size] = {}
        self._hints = _primes(set(fixed))

    def named(self, name: str) -> Size:
        """Return the size with this name."""
        known = self.equal.get(name)
        if isinstance(known, int):
            return known
        if isinstance(known, Multiple):
            return known.times * self.named(known.part)
        if known is not None:
            return self.named(known)
        if name not in self._made:
            self._made[name] = self._new(name)
        return self._made[name]

    def fresh(self) -> Size:
        """Return a size that nothing is known of."""
        return self.named(f"unnamed_{len(self._made)}")

    def of(self, size: int | ir.SymbolicDim) -> Size:
        """Return a size as the file has it: a number, a name, or a sum or product of such."""
        if isinstance(size, int):
            return size
        if not size.value:
            return self.fresh()
        found = evaluated(str(size.value), self.named, {"Max": self.greatest, "Min": self.least})
        return self.named(str(size.value)) if found is None else found

    def _new(self, name: str) -> torch.SymInt:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        hint, source = next(self._hints), ConstantSource(name)
        symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        size = self.env.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt), "a dynamic size is a symbol"
        self.names[str(symbol)] = name
        return size

    def require_equal(self, a: Size, b: Size) -> None:
        """See that two sizes which must be equal are known to be.

        Raises:
            EqualSizesError: one is a symbol of its own, and the other is one or a number, or there is one
                symbol in both, and one number for which they are equal; the graph must be read with that.
        """
        for one, other in ((a, b), (b, a)):
            name, known = self.name_of(one), other if isinstance(other, int) else self.name_of(other)
            nothing = isinstance(known, int) and known < 1
            if name is not None and known is not None and name != known and not nothing:
                raise EqualSizesError(name, known)
        rest = sympy.expand(_expr(a) - _expr(b))
        (*symbols,) = rest.free_symbols
        if len(symbols) == 1 and rest.is_polynomial(*symbols) and sympy.degree(rest, symbols[0]) == 1:
            number = -rest.coeff(symbols[0], 0) / rest.coeff(symbols[0], 1)
            name = self.names.get(str(symbols[0]))
            if name is not None and number.is_Integer and number > 0:
                raise EqualSizesError(name, int(number))

    def require_same_product(self, before: Sequence[Size], after: Sequence[Size]) -> None:
        """See that a size is a multiple where its quotient, times the divisor, must be the size again.

        Raises:
            EqualSizesError: it must be one, and is not known to be; the graph must be read with that.
        """
        left, right = (sympy.prod(map(_expr, sizes)) for sizes in (before, after))
        for quotient in (left + right).atoms(FloorDiv):
            size, divisor = quotient.args
            name = self.names.get(str(size))
            exact = {quotient: size / divisor}
            if name is None or not divisor.is_Integer or sympy.expand(left - right) == 0:
                continue
            if sympy.expand(left.xreplace(exact) - right.xreplace(exact)) == 0:
                raise EqualSizesError(name, Multiple(int(divisor), f"{name}/{divisor}"))

    def assume_order(self, a: Size, b: Size) -> tuple[Size, Size]:
        """Return two sizes, the smaller one first, and note it where that is not so for all sizes.

        Their hints decide, as they do in torch when a slice ends at one of them.
        """
        less, more = (a, b) if _hint(a) <= _hint(b) else (b, a)
        if not statically_known_true(less <= more):
            self.assumed[f"{self.text(less)} <= {self.text(more)}"] = None
        return less, more

    def least(self, a: Size, b: Size) -> Size:
        """Return the smaller of two sizes, as ``assume_order`` decides."""
        return self.assume_order(a, b)[0]

    def greatest(self, a: Size, b: Size) -> Size:
        """Return the greater of two sizes, as ``assume_order`` decides."""
        return self.assume_order(a, b)[1]

    def text(self, size: Size) -> str:
        """Return a size in the file's names."""
        if isinstance(size, int):
            return str(size)
        names = {s: sympy.Symbol(self.names.get(str(s), str(s))) for s in size.node.expr.free_symbols}
        return str(size.node.expr.xreplace(names))

    def fixed(self) -> int:
        """Return how many symbols torch has replaced by a number, which is the hint."""
        return sum(bool(e.is_number) for e in self.env.replacements.values())

    def name_of(self, size: Size) -> str | None:
        """Return the name of a size that is one symbol and no more."""
        return None if isinstance(size, int) else self.names.get(str(size.node.expr))


def _expr(size: Size) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _hint(size: Size) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _primes(fixed: set[int]) -> Iterator[int]:
    """Yield primes from 11 on that are not in ``fixed``."""
    n = 11
    while True:
        if n not in fixed and all(n % d for d in range(2, int(n**0.5) + 1)):
            yield n
        n += 2


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {"Mod": operator.mod, "FloorDiv": operator.floordiv}
"""How torch's exporter writes remainders and quotients of sizes."""


def evaluated(
    text: str, named: Callable[[str], Size], functions: Mapping[str, Callable[[Any, Any], Any]]
) -> Size | None:
    """Return the value of sums, products, quotients and remainders of names, None for any other text.

    ``functions`` are further ones of two sizes.
    """
    functions = {**_FUNCTIONS, **functions}
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):  # no expression, or a NUL in it
        return None

    def value(e: ast.expr) -> Any:
        if isinstance(e, ast.Constant) and isinstance(e.value, int):
            return e.value
        if isinstance(e, ast.Name):
            return named(e.id)
        if isinstance(e, ast.BinOp) and type(e.op) in _OPERATORS:
            a, b = value(e.left), value(e.right)
            return None if a is None or b is None else _OPERATORS[type(e.op)](a, b)
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id in functions:
            xs = [value(x) for x in e.args]
            return None if len(xs) != 2 or None in xs else functions[e.func.id](*xs)
        return None

    found = value(tree)
    return found if isinstance(found, int | torch.SymInt) else None
