"""Peel any other elementwise chain as one expression: ``relu(s)``, ``s * sigmoid(s)``, ``cos(s) * t - u``.

The chain ends at the first element through which all carrying paths go, so that what lies below is peeled by
itself. Tensors that are no scores of this contraction are captured by their index, as a bias is.
Source: forms/dense_variants, section 1 (score programs).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.env import Env, Peeled, RawPointwise, step_into
from attnc.passes.detect.graph import inputs, op_name, tensor_of
from attnc.passes.detect.scores import views
from attnc.passes.detect.scores.elementwise import as_call
from attnc.passes.detect.scores.walk import choose, meeting
from attnc.passes.detect.views import At
from attnc.pointwise import SCORE, Call, rename


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Peel down to where the carrying paths meet; two scores that do not meet are a Miss."""
    if as_call(at.node) is None:
        return None
    rest = meeting(at, env)
    if rest is None:
        carrying = [x for x in inputs(at.node) if env.carries(x)]
        if len(carrying) < 2:
            return None
        why = (
            f"{op_name(at.node)} combines scores at different positions, or with what is no elementwise "
            "function of them"
        )
        return Miss("scores-combined", at.node.name, why)
    made = Expression(rest, env)
    term = made.of(at)
    if term is None:
        why = f"{op_name(at.node)} uses a number that depends on sizes"
        return Miss("symbolic-number", at.node.name, why)
    through = tuple(n for n in made.passed if n is not at.node)
    return Peeled((RawPointwise(term, tuple(made.sides)),), rest, "pointwise", through)


@dataclass
class Expression:
    """Build the expression of an element over the score at ``rest`` and side tensors ``t0``, ``t1``, .."""

    rest: At
    env: Env
    sides: list[At] = field(default_factory=list)
    passed: list[fx.Node] = field(default_factory=list)

    def of(self, at: At) -> Call | str | float | None:
        """Return the expression, None where a number is symbolic."""
        if at == self.rest:
            return SCORE
        self.passed.append(at.node)
        step = views.peel(at, self.env)
        if isinstance(step, Peeled):
            return self.of(step.rest)
        call = as_call(at.node)
        assert call is not None, "the meeting was found through elementwise ops"
        carrying = [x for x in call.inputs if tensor_of(x) is not None and self.env.carries(x)]
        main = choose(at, carrying, self.env)
        by: dict[str, Call | str | float] = {}
        for i, x in enumerate(call.inputs):
            carries = x in carrying and (main is None or x is main)
            term = self.of(step_into(at, x)) if carries else self._side(at, x)
            if term is None:
                return None
            by[f"x{i}"] = term
        return rename(call.term, by)

    def _side(self, at: At, x: fx.Node) -> str | float | None:
        """Return a number, or the name of a tensor beside the score."""
        number = self.env.scalar(x)
        if number is not None or tensor_of(x) is None:
            return number
        there = step_into(at, x)
        if there not in self.sides:
            self.sides.append(there)
        return f"t{self.sides.index(there)}"
