"""One evaluator for everything beside the scores: what is this node's value at this index?

``Puller.value(node, index)`` rewrites the index backwards through views, gathers, cat, pad and arithmetic and
returns a symbolic expression.  Masks made of arange and comparisons come out closed; what cannot be followed
ends in a ``load``.  Upper bounds of sizes are never used to decide a comparison, so a closed form holds at
every length (see ``attnc.expr``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import FALSE, TRUE, Expr
from attnc.passes.detect.arithmetic import held, literal
from attnc.passes.detect.constants import Constants
from attnc.passes.detect.graph import shape, tensor_of
from attnc.passes.detect.pull_rules import rule_of
from attnc.passes.detect.views import At, Index, broadcast, stepped
from attnc.sizes import dim

DEEPEST = 100
"""Ops in a chain that are followed before an operand counts as opaque."""


SECONDS = 2.0
"""A derivation that takes longer is given up, which the count of elements prevents as a rule."""


class OverBudgetError(Exception):
    """The derivation of one operand needed more terms than allowed; the operand stays opaque."""


class Puller:
    """Evaluate nodes of one working graph symbolically.

    ``constants`` maps nodes with known values (lifted constants, small buffers) to tensors.  ``limit`` is the
    number of distinct (node, index) pairs that one call of ``value`` may visit.
    """

    def __init__(self, constants: Mapping[str, torch.Tensor | None] | None = None, limit: int = 4000) -> None:
        self.constants = Constants(constants or {})
        self.limit = limit
        self._memo: dict[tuple[str, Index], Expr] = {}
        self._left = limit
        self._depth = 0
        self._until = math.inf
        self._guards = 0

    def value(self, node: fx.Node, index: Index) -> Expr:
        """Return the value of ``node`` at ``index`` (one polynomial per axis).

        Raises:
            OverBudgetError: more than ``limit`` distinct elements had to be visited, or a chain of more than
                ``DEEPEST`` ops followed.
        """
        self._left, self._depth, self._guards = self.limit, 0, 0
        self._until = time.monotonic() + SECONDS
        return self.at(node, index)

    def at(self, node: fx.Node, index: Index) -> Expr:
        """Return the value of ``node`` at ``index``, within the budget of the call of ``value``."""
        key = (node.name, index)
        out = self._memo.get(key)
        if out is None:
            self._left -= 1
            self._depth += 1
            late = self._left % 64 == 0 and time.monotonic() > self._until
            if self._left < 0 or self._depth > DEEPEST or late:
                raise OverBudgetError(node.name)
            self._memo[key] = out = self._compute(At(node, index))
            self._depth -= 1
        return out

    def arm(self, node: fx.Node, index: Index) -> Expr:
        """Return the value of an arm of a piecewise value, which may be asked outside of the arm's own range.

        A leaf that would be read out of its bounds there has no closed form.
        """
        self._guards += 1
        out = self.at(node, index)
        self._guards -= 1
        return out

    def operand(self, x: Any, index: Index) -> Expr:
        """Return the value of an argument (node or number) that is broadcast to a result at ``index``."""
        if isinstance(x, fx.Node):
            return self.at(x, broadcast(index, x)) if tensor_of(x) is not None else self._scalar(x)
        return literal(x)

    def _compute(self, at: At) -> Expr:
        node = at.node
        t = tensor_of(node)
        if t is None:
            return self._scalar(node)
        constant = self._constant(at)
        if constant is not None:
            return constant
        step = stepped(at)
        if step is not None:
            return self.at(step[0].node, step[0].index)
        rule = rule_of(node)
        out = rule(self, node, at.index) if rule is not None else None
        exact = held(out, t.dtype) if out is not None and not t.dtype.is_complex else None
        if exact is not None:
            return exact
        fitted = self.constants.at(node, at.index) if out is None else None
        if fitted is not None:
            return fitted
        inside = all(i == E.ZERO or in_range(i, n) for i, n in zip(at.index, shape(node), strict=True))
        return leaf(at) if inside or not self._guards else E.call("guarded", leaf(at))

    def _scalar(self, node: fx.Node) -> Expr:
        val = node.meta.get("val")
        if isinstance(val, bool):
            return TRUE if val else FALSE
        if isinstance(val, int | torch.SymInt):
            return dim(val)
        return E.real(val) if isinstance(val, float) else Expr("call", "scalar", (node.name,))

    def _constant(self, at: At) -> Expr | None:
        """Read a known constant at fixed indices, or by the closed form that fits all of it."""
        t = self.constants.stored(at.node.name)
        if t is None or t.dtype.is_complex:
            return None
        place = [E.as_int(i) for i in at.index]
        if any(p is None for p in place):
            return self.constants.at(at.node, at.index)
        return literal(t[tuple(p for p in place if p is not None)].item())


def in_range(x: Expr, n: Expr) -> bool:
    """Prove ``0 <= x < n``."""
    return E.nonneg(x) and E.nonneg(E.sub(E.sub(n, E.ONE), x))


def leaf(at: At) -> Expr:
    """Return the element as a load, typed by the tensor's dtype."""
    t = tensor_of(at.node)
    assert t is not None, f"{at.node} is no tensor"
    real = t.dtype.is_floating_point or t.dtype.is_complex
    return E.load(at.node.name, at.index, "bool" if t.dtype == torch.bool else "float" if real else "int")
