"""Peel a constant factor, and a tensor factor that is no score itself (a learned temperature)."""

from __future__ import annotations

import math

from torch import fx

from attnc.ir import Miss, Scale
from attnc.passes.detect.env import Env, Peeled, RawGain, step_into
from attnc.passes.detect.graph import base_name, tensor_of
from attnc.passes.detect.scores.walk import two_sides
from attnc.passes.detect.views import At


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Read ``c * s``, ``s / c`` and ``-s``; ``t * s`` with a tensor t becomes a gain."""
    name = base_name(at.node)
    if name == "neg":
        return Peeled((Scale(-1.0),), step_into(at, at.node.args[0]), "scale")
    if name not in ("mul", "div", "true_divide") or at.node.kwargs.get("rounding_mode"):
        return None
    pair = two_sides(at, env)
    if pair is None:
        return None
    scores, side = pair
    factor = env.scalar(side)
    if name != "mul" and (side is at.node.args[0] or factor is None):
        return None
    if factor is None and (not isinstance(side, fx.Node) or tensor_of(side) is None):
        return Miss(
            "symbolic-number", at.node.name, "the scores are multiplied by a number that depends on sizes"
        )
    if factor is None:
        kind = "gain" if not env.carries(side) else "second-contraction"  # type: ignore[arg-type]
        return Peeled((RawGain(step_into(at, side)),), step_into(at, scores), kind)
    if name != "mul" and factor == 0:
        return Miss("division-by-zero", at.node.name, "the scores are divided by zero")
    if not math.isfinite(factor):
        return Miss("scale-not-finite", at.node.name, f"the scores are multiplied or divided by {factor}")
    return Peeled((Scale(factor if name == "mul" else 1.0 / factor),), step_into(at, scores), "scale")
