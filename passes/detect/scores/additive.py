"""Peel what is added to the scores: a mask if it is ``where(keep, 0, very negative)``, else a bias.

Nothing is assumed about an additive tensor: it is a mask when its value at (b, h, q, k) is *derived* to be
one, it vanishes when derived to be zero, and stays a dense bias otherwise.
"""

from __future__ import annotations

from typing import Literal

from torch import fx

from attnc import expr as E
from attnc.ir import Miss
from attnc.passes.detect.env import Env, Peeled, RawBias, RawMask, RawMod, RawShift, step_into
from attnc.passes.detect.graph import argument, base_name, tensor_of
from attnc.passes.detect.scores.walk import two_sides
from attnc.passes.detect.views import At

HIDES = -1e4
"""Added values at or below this hide a key: exp underflows for any finite logit range of a trained model."""


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Read ``s + m``, ``m + s`` and ``s - m``."""
    name = base_name(at.node)
    if name not in ("add", "sub") or argument(at.node, 2, "alpha", 1) != 1:
        return None
    pair = two_sides(at, env)
    if pair is None:
        return None
    scores, side = pair
    if name == "sub" and side is at.node.args[0]:
        return None
    if isinstance(side, fx.Node) and tensor_of(side) is not None and env.carries(side):
        bias = RawBias(step_into(at, side), -1 if name == "sub" else 1)
        return Peeled((bias,), step_into(at, scores), "second-contraction")
    mods = additive(at, side, env, -1 if name == "sub" else 1)
    return mods if isinstance(mods, Miss) else Peeled(mods, step_into(at, scores), "additive")


def additive(at: At, side: object, env: Env, sign: Literal[1, -1]) -> tuple[RawMod, ...] | Miss:
    """Return the mods for ``sign * side`` added at ``at``.

    That is nothing, a shift by a constant, a mask or a bias.
    """
    number = env.scalar(side)
    if number is not None:
        return () if number == 0 else (RawShift(sign * number),)
    if not isinstance(side, fx.Node) or tensor_of(side) is None:
        return Miss("symbolic-number", at.node.name, "a number that depends on sizes is added to the scores")
    there = step_into(at, side)
    value = env.derive(there)
    if value is not None:
        mask = as_mask(value, sign, there)
        if E.as_number(value) == 0 or mask is not None:
            return (mask,) if mask is not None else ()
    return (RawBias(there, sign),)


def as_mask(value: E.Expr, sign: Literal[1, -1], at: At) -> RawMask | None:
    """Return ``where(keep, 0, hides)`` as a mask, None if the expression is anything else."""
    if value.op != "where":
        return None
    keep, a, b = value.args
    x, y = (E.as_number(v) for v in (a, b))
    if x is None or y is None:
        return None
    if x == 0 and sign * y <= HIDES:
        return RawMask(keep, sign * float(y), "add", at, sign)
    if y == 0 and sign * x <= HIDES:
        return RawMask(E.not_(keep), sign * float(x), "add", at, sign)
    return None
