"""Formulas as graph nodes: plain ATen over arange, in tensors that broadcast to ``[B, H, Sq, Sk]``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from attnc.editing import Builder
from attnc.formula import AXES
from attnc.sizes import dim

aten = torch.ops.aten
Number = int | fx.Node
"""A number, a node that holds a size, or a node that holds an integer tensor with four axes."""

_PLAIN: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
_TENSORS = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "le": aten.le.Tensor,
    "eq": aten.eq.Tensor,
}
_RIGHT = {
    "add": aten.add.Scalar,
    "sub": aten.sub.Scalar,
    "mul": aten.mul.Scalar,
    "le": aten.le.Scalar,
    "eq": aten.eq.Scalar,
}
_LEFT = {**_RIGHT, "sub": aten.rsub.Scalar, "le": aten.ge.Scalar}
"""The same with the number first: the call takes the tensor first all the same."""


class Nodes:
    """The algebra of graph nodes for scores of q ``[B, H, Sq, D]`` and k ``[B, Hkv, Sk, D]``."""

    def __init__(self, build: Builder, q: fx.Node, k: fx.Node, captured: Mapping[str, fx.Node]) -> None:
        self.build, self.captured = build, captured
        self.near = {"b": (q, 0), "h": (q, 1), "q": (q, 2), "k": (k, 2)}
        self.device = q.meta["val"].device

    def number(self, n: int) -> Number:
        """Return the number."""
        return n

    def symbol(self, name: str) -> Number:
        """Return positions along their axis, or a length."""
        node, axis = self.near[name[-1]]
        size = self.build.size(dim(node.meta["val"].shape[axis]), node)
        if name not in AXES:
            return size
        x = self.build.call(aten.arange.default, size, device=self.device)
        return self._placed(x, name)

    def read(self, operand: str, axes: str) -> Number:
        """Return the operand as int64 with four axes."""
        x = self.captured[operand]
        if x.meta["val"].dtype != torch.int64:
            x = self.build.call(aten.to.dtype, x, torch.int64)
        return self._placed(x, axes)

    def _placed(self, x: fx.Node, axes: str) -> fx.Node:
        order = sorted(range(len(axes)), key=lambda i: AXES.index(axes[i]))
        x = self.build.permute(x, order)
        for at, a in enumerate(AXES):
            x = x if a in axes else self.build.call(aten.unsqueeze.default, x, at)
        return x

    def _binary(self, op: str, a: Number, b: Number) -> Any:
        plain = (not _is_tensor(a), not _is_tensor(b))
        if all(plain):
            if op in ("le", "eq"):
                return self._binary(op, self._tensor(a), b)
            return _PLAIN[op](a, b) if isinstance(a, int) and isinstance(b, int) else self._sizes(op, a, b)
        if plain[0]:
            return self.build.call(_LEFT[op], b, a)
        return self.build.call(_RIGHT[op] if plain[1] else _TENSORS[op], a, b)

    def _sizes(self, op: str, a: Number, b: Number) -> fx.Node:
        return self.build.call(_PLAIN[op], a, b)

    def _tensor(self, a: Number) -> fx.Node:
        if isinstance(a, fx.Node) and _is_tensor(a):
            return a
        x = self.build.call(aten.scalar_tensor.default, a, dtype=torch.int64, device=self.device)
        return self.build.call(aten.reshape.default, x, [1, 1, 1, 1])

    def add(self, a: Number, b: Number) -> Number:
        """Return the sum."""
        return self._binary("add", a, b)  # type: ignore[no-any-return]

    def sub(self, a: Number, b: Number) -> Number:
        """Return the difference."""
        return self._binary("sub", a, b)  # type: ignore[no-any-return]

    def mul(self, a: Number, b: Number) -> Number:
        """Return the product."""
        return self._binary("mul", a, b)  # type: ignore[no-any-return]

    def floordiv(self, a: Number, n: int) -> Number:
        """Return the quotient, rounded down."""
        if _is_tensor(a):
            return self.build.call(aten.div.Scalar_mode, a, n, rounding_mode="floor")
        return a // n if isinstance(a, int) else self._sizes("floordiv", a, n)

    def mod(self, a: Number, n: int) -> Number:
        """Return the non-negative remainder."""
        if _is_tensor(a):
            return self.build.call(aten.remainder.Scalar, a, n)
        return a % n if isinstance(a, int) else self._sizes("mod", a, n)

    def where(self, c: fx.Node, a: Number, b: Number) -> Number:
        """Choose."""
        return self.build.call(aten.where.self, c, self._tensor(a), self._tensor(b))

    def le(self, a: Number, b: Number) -> fx.Node:
        """Compare."""
        return self._binary("le", a, b)  # type: ignore[no-any-return]

    def eq(self, a: Number, b: Number) -> fx.Node:
        """Compare."""
        return self._binary("eq", a, b)  # type: ignore[no-any-return]

    def both(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """Return the conjunction."""
        return self.build.call(aten.bitwise_and.Tensor, a, b)

    def either(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """Return the disjunction."""
        return self.build.call(aten.bitwise_or.Tensor, a, b)

    def negate(self, a: fx.Node) -> fx.Node:
        """Return the negation."""
        return self.build.call(aten.bitwise_not.default, a)


def _is_tensor(x: Number) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor)
