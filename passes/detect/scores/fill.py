"""Peel a mask written over the scores: ``where(keep, s, -inf)`` and ``s.masked_fill(hide, -inf)``."""

from __future__ import annotations

import math

from torch import fx

from attnc import expr as E
from attnc.ir import Miss
from attnc.passes.detect.arithmetic import rounded, to_bool
from attnc.passes.detect.env import Env, Peeled, RawMask, step_into
from attnc.passes.detect.graph import base_name, tensor_of
from attnc.passes.detect.scores.additive import HIDES
from attnc.passes.detect.views import At


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Read both spellings; the value must be a constant that hides, the condition any bool tensor."""
    name = base_name(at.node)
    if name == "where" and len(at.node.args) == 3:
        cond, a, b = at.node.args
        ca, cb = (isinstance(x, fx.Node) and tensor_of(x) is not None and env.carries(x) for x in (a, b))
        if ca == cb:
            return None
        scores, value, keeps = (a, b, True) if ca else (b, a, False)
    elif name == "masked_fill":
        scores, cond, value = at.node.args[:3]
        keeps = False
    else:
        return None
    fill, t = env.scalar(value), tensor_of(at.node)
    if fill is None or t is None or not fill <= HIDES or not isinstance(cond, fx.Node) or env.carries(cond):
        return None
    mask = condition_mask(step_into(at, cond), keeps, env, rounded(fill, t.dtype))
    return Peeled(() if mask.keep == E.TRUE else (mask,), step_into(at, scores), "fill")


def condition_mask(at: At, keeps: bool, env: Env, value: float = -math.inf) -> RawMask:
    """Return the mask that a condition makes; ``keeps`` says whether a true one keeps the score."""
    derived = env.derive(at)
    condition = to_bool(derived) if derived is not None else E.load(at.node.name, at.index, "bool")
    keep = condition if keeps else E.not_(condition)
    return RawMask(keep, value, "replace", at, 1 if keeps else -1)
