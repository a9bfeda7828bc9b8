"""Peel what does not change a score: views, casts, dropout in eval, and one part of a concatenation."""

from __future__ import annotations

from attnc import expr as E
from attnc.ir import Miss
from attnc.passes.detect.env import Env, Peeled, step_into
from attnc.passes.detect.graph import argument, base_name, is_float_cast, shape
from attnc.passes.detect.views import At, stepped


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Follow a view or a float cast; of ``cat`` follow the part that provably holds the index."""
    step = stepped(at)
    if step is not None:
        return Peeled((), step[0], "view")
    if is_float_cast(at.node):
        return Peeled((), step_into(at, at.node.args[0]), "cast")
    return _part(at) if base_name(at.node) == "cat" else None


def _part(at: At) -> Peeled | Miss | None:
    d = argument(at.node, 1, "dim", 0) % len(at.index)
    start = E.ZERO
    for t in argument(at.node, 0, "tensors"):
        end = E.add(start, shape(t)[d])
        here = at.index[d]
        if E.nonneg(E.sub(here, start)) and E.nonneg(E.sub(E.sub(end, E.ONE), here)):
            local = E.sub(here, start) if shape(t)[d] != E.ONE else E.ZERO
            return Peeled((), At(t, (*at.index[:d], local, *at.index[d + 1 :])), "part-of-cat")
        start = end
    return Miss("cat-of-scores", at.node.name, "the scores are concatenated with other scores along the keys")
