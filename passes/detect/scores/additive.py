"""Peel what is added to the scores: a mask if its closed form is ``where(keep, 0, very negative)``, else a bias.

Nothing is assumed about an additive tensor: it is a mask when its value at (b, h, q, k) is *derived* to be one, it vanishes when
derived to be zero, and stays a dense bias otherwise.
"""

from __future__ import annotations

from torch import fx

from attnc import expr as E
from attnc.ir import Miss
from attnc.passes.detect.env import Env, Peeled, RawBias, RawMask, RawMod, RawShift, step_into
from attnc.passes.detect.graph import base_name
from attnc.passes.detect.views import At

HIDES = -1e4
"""Added values at or below this hide a key: exp underflows for any finite logit range of a trained model."""


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Read ``s + m``, ``m + s`` and ``s - m``."""
    name = base_name(at.node)
    if name not in ("add", "sub"):
        return None
    if at.node.kwargs.get("alpha", 1) != 1:
        return Miss("scaled-addition", at.node.name, "an addition with alpha is not read yet")
    pair = env.sides(at.node)
    if pair is None:
        return Miss("sum-of-scores", at.node.name, "two score tensors are added (relative position terms, say)")
    scores, side = pair
    if name == "sub" and side is at.node.args[0]:
        return Miss("negated-scores", at.node.name, "the scores are subtracted from a tensor")
    if not isinstance(scores, fx.Node):
        return None
    return Peeled(additive(at, side, env, -1 if name == "sub" else 1), step_into(at, scores), "additive")


def additive(at: At, side: object, env: Env, sign: int) -> tuple[RawMod, ...]:
    """Return the mods for ``sign * side`` added at ``at``: nothing, a shift by a constant, a mask or a bias."""
    number = env.scalar(side)
    if number is not None:
        return () if number == 0 else (RawShift(sign * number),)
    assert isinstance(side, fx.Node)
    there = step_into(at, side)
    value = env.derive(there)
    if value is not None:
        mask = as_mask(value, sign, there)
        if E.as_number(value) == 0 or mask is not None:
            return (mask,) if mask is not None else ()
    return (RawBias(there, sign),)


def as_mask(value: E.Expr, sign: int, at: At) -> RawMask | None:
    """Return ``where(keep, 0, hides)`` as a mask, None if the expression is anything else."""
    if value.op != "where":
        return None
    keep, a, b = value.args
    x, y = (E.as_number(v) for v in (a, b))
    if x is None or y is None:
        return None
    if x == 0 and sign * y <= HIDES:
        return RawMask(keep, sign * float(y), "add", at)
    if y == 0 and sign * x <= HIDES:
        return RawMask(E.not_(keep), sign * float(x), "add", at)
    return None
