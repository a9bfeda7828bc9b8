"""Estimate how far rounding alone may move a result: run a graph in fp64 and round at random.

Each result is multiplied by ``1 + u`` or ``1 - u``, with u half the spacing of the dtype in question, in the
forward and in the backward.  A contraction of n terms is off by sqrt(n) roundings of its sums (Higham and
Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41, 2019).  Softmax is
taken as fused kernels run it: they keep the log-sum-exp and recompute ``exp(score - lse)`` in the backward,
where both are rounded once more.  Such sums, scores and log-sum-exps are in fp32 where the dtype is narrower.
Source: Parker, Monte Carlo Arithmetic, UCLA CSD-970002 (1997).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

FILL = 2.0**23
"""From here on one unit of fp32 is 1 or more: such a number absorbs what is added to it, and is no score."""

_CONTRACTIONS = frozenset(("matmul", "bmm", "mm", "linear", "addmm", "baddbmm", "einsum"))


@dataclass
class Rounding:
    """Random rounding in units of ``eps``, the spacing of a dtype at 1.

    What is computed from the inputs named in ``exact`` alone stays as it is, and so do fills: masks are made
    of small integers and fills, which no dtype rounds.
    """

    eps: float
    generator: torch.Generator
    exact: frozenset[str] = frozenset()
    _terms: int = 1
    _scores: float = 0.0

    @property
    def unit(self) -> float:
        """The largest relative error of one rounding."""
        return self.eps / 2

    @property
    def inner(self) -> float:
        """The same for what a kernel keeps inside: fp32, or the dtype itself if it is wider."""
        return min(self.eps, torch.finfo(torch.float32).eps) / 2

    def call(
        self, name: str, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the op of this name on fp64 tensors, and return its result, rounded."""
        unit = self.unit
        if name in ("softmax", "_softmax"):
            return self._softmax(args[0], args[1])
        if name in _CONTRACTIONS:
            return self._contraction(target, args, kwargs)
        out = target(*args, **kwargs)
        if name == "exp":
            # Spelled-out softmax: the scores it is made from carry an absolute error.
            unit += self.inner * self._scores * math.sqrt(self._terms)
        rounded: Any = pytree.tree_map_only(
            torch.Tensor, lambda t: self._rounded(t, unit, self.unit) if t.is_floating_point() else t, out
        )
        return rounded

    def _contraction(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        longest = max(n for t in operands for n in t.shape[-2:])
        given = pytree.tree_map_only(
            torch.Tensor, lambda t: self._rounded(t, 0.0, self.inner * math.sqrt(longest)), args
        )
        out = target(*given, **kwargs)
        self._terms = operands[-2].shape[-1] if len(operands) > 1 else 1
        small = out.detach().abs()
        self._scores = max(
            self._scores, float(small[small < FILL].max()) if bool((small < FILL).any()) else 0.0
        )
        return self._rounded(out, max(self.unit, self.inner * math.sqrt(self._terms)), self.unit)

    def _softmax(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Compute ``exp(score - lse)``, both off by a rounding; the largest score is subtracted first."""
        unit, inner = self.unit, self.inner
        top = x.detach().amax(axis, keepdim=True)
        low = self._rounded(x - top, inner, unit)
        lse = self._rounded(torch.logsumexp(low, axis, keepdim=True), inner, unit)
        error = self._error(x, inner * math.sqrt(self._terms)) - self._error(top + lse, inner)
        return self._rounded(torch.exp(low - lse + error), unit, unit)

    def _error(self, x: torch.Tensor, unit: float) -> torch.Tensor:
        """Return a random error of ``x``: ``unit`` times its size, none for fills."""
        x = x.detach()
        signs = torch.randint(0, 2, x.shape, generator=self.generator).to(x.device, x.dtype) * 2 - 1
        return torch.where(x.abs() < FILL, x, 0.0) * signs * unit

    def _rounded(self, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        out: torch.Tensor = _Rounded.apply(x, self, forward, backward)  # type: ignore[no-untyped-call]
        return out


class _Rounded(torch.autograd.Function):
    """Add an error to a value and to its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rounding: Rounding, forward: float, backward: float
    ) -> torch.Tensor:
        ctx.rounding, ctx.backward = rounding, backward
        return x + rounding._error(x, forward) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] + ctx.rounding._error(grads[0], ctx.backward), None, None, None
