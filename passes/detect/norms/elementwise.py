"""Anchors without a softmax: the values are weighted by a function of each score alone.

The weights are followed back from the value contraction to the first function that is not linear; it and what
lies between it and the values (a division by the number of keys, a square) is the function, what lies below
it are score steps.  A division by the row's own sum is found by ``shares``.
Source: Sigmoid self-attention (arXiv:2409.04431), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from attnc import expr as E
from attnc.ir import Elementwise, Normalized
from attnc.passes.detect.contraction import Contraction
from attnc.passes.detect.env import Env, Peeled, step_into
from attnc.passes.detect.graph import base_name, inputs, is_float_cast, shape
from attnc.passes.detect.norms import shares
from attnc.passes.detect.norms.anchor import Anchor, anywhere
from attnc.passes.detect.scores import views
from attnc.passes.detect.scores.elementwise import as_call
from attnc.passes.detect.scores.pointwise import Expression
from attnc.passes.detect.scores.walk import meeting
from attnc.passes.detect.views import At, stepped
from attnc.pointwise import SCORE, Call, rename, text


@dataclass(frozen=True, slots=True)
class Weighing:
    """An anchor, and what zeroes its weights: where that is read, the condition, whether a true one keeps.

    ``guarded`` says that the function would not vanish at a score of -inf, and was given a choice that does.
    """

    anchor: Anchor
    zeroed: tuple[fx.Node, fx.Node, bool] | None = None
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights as a function of the score: the term, the score's node, what zeroes them, nodes between."""

    term: Call | str | float
    scores: fx.Node
    zeroed: tuple[fx.Node, fx.Node, bool] | None
    through: tuple[fx.Node, ...]

    def same_as(self, other: _Weights) -> bool:
        """Say whether both compute the same."""
        mine, others = ((w.term, w.scores, w.zeroed and w.zeroed[1:]) for w in (self, other))
        return mine == others

    def guarded(self) -> Call | str | float:
        """Return the function with 0 at a score of -inf."""
        return Call("where", (Call("eq", (SCORE, -math.inf)), 0.0, self.term))


def weighings(values: Contraction, operand: fx.Node, env: Env) -> list[Weighing]:
    """Return what ``operand`` of a contraction may be as a function of single scores, the best first.

    Where the weights are divided by their own sum, that is part of it.
    """
    place = _outermost(values, operand)
    if place is None:
        return []
    node, dim = place
    share = shares.early(node, dim)
    if share is not None:
        weights, summed = _weights(share.weights, env), _weights(share.summed, env)
        if weights is None or summed is None or not weights.same_as(summed):
            return []
        inner = (*share.passed, node, share.weights, *weights.through, *summed.through)
        return [_weighing(node, dim, weights, tuple(dict.fromkeys(inner)), share)]
    weights = _weights(node, env)
    if weights is None:
        return []
    late = [
        _weighing(node, dim, weights, (*weights.through, *share.passed), share)
        for share in shares.late(node, dim)
    ]
    return [*late, _weighing(node, dim, weights, weights.through, None)]


def _weighing(
    node: fx.Node, dim: int, weights: _Weights, inner: tuple[fx.Node, ...], share: shares.Share | None
) -> Weighing:
    """Return the anchor of weights at ``node``; with ``share`` they are divided by their sum at some time."""

    def norm(term: Call | str | float) -> Elementwise | Normalized:
        if share is None:
            return Elementwise(text(term))
        return Normalized(text(term), share.added, share.least)

    found = norm(weights.term)
    guarded = weights.zeroed is not None and not found.hides
    found = norm(weights.guarded()) if guarded else found
    anchor = Anchor(node, weights.scores, dim, found, inner, None if share is None else share.denominator)
    return Weighing(anchor, weights.zeroed, guarded)


def _weights(node: fx.Node, env: Env) -> _Weights | None:
    """Return the weights at ``node`` as a function of the score, None if they are none."""
    at, passed = At(node, anywhere(node)), list[fx.Node]()
    zeroed = zeroes(node, env)
    if zeroed is not None:
        passed.append(node)
        at = At(zeroed[0], at.index)
    made = _function(at, env)
    if made is None:
        return None
    term, scores, through = made
    where = None if zeroed is None else (node, zeroed[1], zeroed[2])
    return _Weights(term, scores, where, (*passed, *through))


def _outermost(values: Contraction, operand: fx.Node) -> tuple[fx.Node, int] | None:
    """Return the node of the weights behind views and casts, and the axis that the contraction sums."""
    out = tuple(E.ZERO if n == E.ONE else E.index(f"o{i}", n) for i, n in enumerate(shape(values.node)))
    lhs, rhs, fresh = values.operands(out, "t")
    at = lhs if values.lhs is operand else rhs
    while True:
        step = stepped(at)
        if step is not None:
            at = step[0]
        elif is_float_cast(at.node):
            at = step_into(at, at.node.args[0])
        else:
            break
    summed = {g for x in fresh.values() if (g := E.only_index(x)) is not None}
    axes = [i for i, x in enumerate(at.index) if summed & set(E.indices(x))]
    return (at.node, axes[0]) if len(axes) == 1 else None


def zeroes(node: fx.Node, env: Env) -> tuple[fx.Node, fx.Node, bool] | None:
    """Return (weights, condition, whether a true one keeps) of ``where(cond, weights, 0)`` and its like."""
    if base_name(node) == "where" and len(node.args) == 3:
        cond, a, b = node.args
        keeps = env.scalar(b) == 0.0
        weights = a if keeps else b
        if not keeps and env.scalar(a) != 0.0:
            return None
    elif base_name(node) == "masked_fill":
        weights, cond, value = node.args[:3]
        keeps = False
        if env.scalar(value) != 0.0:
            return None
    else:
        return None
    ok = isinstance(weights, fx.Node) and isinstance(cond, fx.Node) and shape(weights) == shape(node)
    return (weights, cond, keeps) if ok and not env.carries(cond) else None  # type: ignore[arg-type,return-value]


def _function(at: At, env: Env) -> tuple[Call | str | float, fx.Node, list[fx.Node]] | None:
    """Return the function of the score, the node of the score, and the nodes between."""
    term: Call | str | float = SCORE
    through: list[fx.Node] = []
    bent = False
    while env.scores_of(at.node) is None:
        call = as_call(at.node)
        if call is None:
            step = views.peel(at, env)
            if not isinstance(step, Peeled) or step.rest.index != at.index:
                break
            through.append(at.node)
            at = step.rest
            continue
        straight = call.linear and sum(env.carries(x) for x in inputs(at.node)) == 1
        down = meeting(at, env)
        if (bent and straight) or down is None or down.index != at.index:
            break
        made = Expression(down, env)
        inner = made.of(at)
        if inner is None or made.sides:
            if bent:
                break
            return None
        term = rename(term, {SCORE: inner})
        through += made.passed
        bent = bent or not straight
        at = down
    return (term, at.node, through) if bent and env.carries(at.node) else None
