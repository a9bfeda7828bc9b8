"""Formulas as basic ONNX operators, in int64 values that broadcast to ``[B, H, Sq, Sk]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx.builder import Builder
from attnc.formula import AXES

if TYPE_CHECKING:
    import onnx_ir as ir


class Operators:
    """The algebra of ONNX values for scores of q ``[B, H, Sq, D]`` and k ``[B, Hkv, Sk, D]``."""

    def __init__(self, b: Builder, q: ir.Value, k: ir.Value, captured: Mapping[str, ir.Value]) -> None:
        self.b, self.captured = b, captured
        self.near = {"b": (q, 0), "h": (q, 1), "q": (q, 2), "k": (k, 2)}

    def number(self, n: int) -> ir.Value:
        """Return a scalar."""
        return self.b.const(n, torch.int64)

    def symbol(self, name: str) -> ir.Value:
        """Return positions along their axis, or a length."""
        size = self.b.scalar(self.b.size(*self.near[name[-1]]))
        if name not in AXES:
            return size
        x = self.b.op("Range", self.number(0), size, self.number(1), dtype=torch.int64)
        return self._placed(x, name)

    def read(self, operand: str, axes: str) -> ir.Value:
        """Return the operand as int64 with four axes."""
        return self._placed(self.b.cast(self.captured[operand], torch.int64), axes)

    def _placed(self, x: ir.Value, axes: str) -> ir.Value:
        order = sorted(range(len(axes)), key=lambda i: AXES.index(axes[i]))
        if order != list(range(len(axes))):
            x = self.b.op("Transpose", x, perm=order, dtype=torch.int64)
        missing = [at for at, a in enumerate(AXES) if a not in axes]
        return self.b.op("Unsqueeze", x, self.b.ints(*missing), dtype=torch.int64) if missing else x

    def _integer(self, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.op(op, a, b, dtype=torch.int64)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the sum."""
        return self._integer("Add", a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the difference."""
        return self._integer("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the product."""
        return self._integer("Mul", a, b)

    def floordiv(self, a: ir.Value, n: int) -> ir.Value:
        """Return the quotient, rounded down: ``Div`` rounds towards zero, so the remainder goes first."""
        return self._integer("Div", self.sub(a, self.mod(a, n)), self.number(n))

    def mod(self, a: ir.Value, n: int) -> ir.Value:
        """Return the non-negative remainder."""
        return self._integer("Mod", a, self.number(n))

    def where(self, c: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Choose."""
        return self.b.op("Where", c, a, b, dtype=torch.int64)

    def le(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Compare."""
        return self.b.op("LessOrEqual", a, b, dtype=torch.bool)

    def eq(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Compare."""
        return self.b.op("Equal", a, b, dtype=torch.bool)

    def both(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the conjunction."""
        return self.b.op("And", a, b, dtype=torch.bool)

    def either(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return the disjunction."""
        return self.b.op("Or", a, b, dtype=torch.bool)

    def negate(self, a: ir.Value) -> ir.Value:
        """Return the negation."""
        return self.b.op("Not", a, dtype=torch.bool)
