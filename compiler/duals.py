"""Dual numbers over tensors: a value, and its tangent along some direction.

The tangent of a result comes from the tangents of its arguments by the rules of differentiation, so plain
torch text over duals gives a derivative in forward mode beside the value, with no graph recorded.
Source: Griewank and Walther, Evaluating Derivatives (2008), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return ``a + b``, where None stands for zero."""
    return b if a is None else a if b is None else a + b


def times(a: Tensor, slope: Tensor) -> Tensor:
    """Return ``a * slope``, and an exact zero where either is zero, even if the other is not finite."""
    return torch.where((a == 0) | (slope == 0), 0.0, a * slope)


@dataclass(frozen=True, slots=True)
class Dual:
    """A tensor and its tangent, of the same shape; a tangent of None is zero."""

    value: Tensor
    tangent: Tensor | None = None

    def linear(self, f: Callable[[Tensor], Tensor]) -> Dual:
        """Return ``f`` of this, for a linear ``f``: a view, a sum, a product with a constant."""
        return Dual(f(self.value), None if self.tangent is None else f(self.tangent))

    def __add__(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, plus(self.tangent, other.tangent))

    def __sub__(self, other: Dual) -> Dual:
        return self + other.linear(torch.neg)

    def __mul__(self, other: Dual) -> Dual:
        return self._bilinear(other, torch.mul)

    def __matmul__(self, other: Dual) -> Dual:
        return self._bilinear(other, torch.matmul)

    def pulled(self, slope: Dual) -> Dual:
        """Return ``times(self, slope)``."""
        return self._bilinear(slope, times)

    def _bilinear(self, other: Dual, f: Callable[[Tensor, Tensor], Tensor]) -> Dual:
        a = None if self.tangent is None else f(self.tangent, other.value)
        b = None if other.tangent is None else f(self.value, other.tangent)
        return Dual(f(self.value, other.value), plus(a, b))
