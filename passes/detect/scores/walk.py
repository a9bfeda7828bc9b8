"""Walk down elementwise paths from a score towards its contraction, also where several paths meet.

A path goes through views, casts and elementwise ops, along the inputs that carry scores. Where both inputs
of an op carry scores of *different* contractions, one is the main one and the other an ordinary tensor that
is read where it stands: ``choose`` says which. Any other meeting is of one score with itself, ``s *
sigmoid(s)``.
"""

from __future__ import annotations

from torch import fx

from attnc import expr as E
from attnc.passes.detect.env import Env, Peeled, step_into
from attnc.passes.detect.graph import tensor_of
from attnc.passes.detect.layout import atoms_of
from attnc.passes.detect.scores import views
from attnc.passes.detect.scores.elementwise import as_call
from attnc.passes.detect.views import At


def below(at: At, env: Env) -> list[At] | None:
    """Return the carrying elements that ``at`` is made of, None where it is not made elementwise."""
    if env.scores_of(at.node) is not None:
        return None
    step = views.peel(at, env)
    if isinstance(step, Peeled):
        return [step.rest]
    if step is not None:
        return None
    call = as_call(at.node)
    if call is None:
        return None
    carrying = [x for x in call.inputs if tensor_of(x) is not None and env.carries(x)]
    main = choose(at, carrying, env)
    return [step_into(at, x) for x in dict.fromkeys(carrying if main is None else [main])]


def meeting(at: At, env: Env) -> At | None:
    """Return the first element below ``at`` through which every carrying path goes, None if there is none."""
    front = {at}
    while True:
        last = max(front, key=lambda x: env.position(x.node))
        more = below(last, env)
        if not more:
            return None
        front = (front - {last}) | set(more)
        if len(front) == 1:
            return front.pop()


def choose(at: At, carrying: list[fx.Node], env: Env) -> fx.Node | None:
    """Return which of two inputs leads to the scores proper, None unless they come from other contractions.

    It is the one whose contraction is read at plain axes of queries and keys, and covers all of them; the
    first if both are or neither is.
    """
    different = list(dict.fromkeys(carrying))
    if len(different) != 2 or env.sources(different[0]) & env.sources(different[1]):
        return None
    a, b = different
    return b if _is_plain(step_into(at, b), env) and not _is_plain(step_into(at, a), env) else a


def two_sides(at: At, env: Env) -> tuple[fx.Node, object] | None:
    """Return (what leads to the scores, the other argument) of a two-argument op.

    None where both lead to scores of one contraction.
    """
    pair = env.sides(at.node)
    if pair is not None:
        return (pair[0], pair[1]) if isinstance(pair[0], fx.Node) else None
    a, b = at.node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not (env.carries(a) and env.carries(b)):
        return None
    main = choose(at, [a, b], env)
    return None if main is None else (a, b) if main is a else (b, a)


def _is_plain(at: At, env: Env) -> bool:
    """Say whether the path leads to one contraction, and its operands are read at whole axes."""
    wanted = set(_indices(at))
    while (c := env.scores_of(at.node)) is None:
        down = meeting(at, env)
        if down is None:
            return False
        at = down
    lhs, rhs, _ = c.operands(at.index, "w")
    return wanted <= set(_indices(at)) and atoms_of(lhs) is not None and atoms_of(rhs) is not None


def _indices(at: At) -> tuple[E.Expr, ...]:
    return tuple(g for x in at.index for g in E.indices(x))
