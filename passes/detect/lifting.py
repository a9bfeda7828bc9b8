"""One expression for several: ``x_0, x_1, ..`` as ``x(n)`` with a new index ``n``, where that is exact.

What the turns of a loop read differs by where they read it: ``q[:, 0]``, ``q[:, 1]``, .. is ``q[:, n]``.
Every rule below returns an expression that equals ``x_i`` at ``n = i`` for each ``i``, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from attnc import expr as E
from attnc.expr import Expr
from attnc.ir import Scale, Softcap
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask, RawMod, RawPointwise, RawShift
from attnc.passes.detect.roles import Candidate, candidates
from attnc.passes.detect.views import At

_MAKERS: dict[str, Callable[..., Expr]] = {"le0": E.le0, "eq0": E.eq0, "not": E.not_, "where": E.where}


def lift(xs: Sequence[Expr], n: Expr) -> Expr | None:
    """Return the expression that is ``xs[i]`` at ``n = i``."""
    first = xs[0]
    if all(x == first for x in xs):
        return first
    if any(x.op != first.op for x in xs):
        return None
    if first.op == "poly":
        return _affine(xs, n)
    if first.op in _MAKERS:
        parts = [lift(column, n) for column in zip(*(x.args for x in xs), strict=True)]
        return None if None in parts else _MAKERS[first.op](*parts)
    if first.op in ("and", "or"):
        return _connected(xs, n)
    if first.op == "load" and all((x.args[0], x.args[2]) == (first.args[0], first.args[2]) for x in xs):
        index = lift_index([x.args[1] for x in xs], n)
        return None if index is None else Expr("load", first.args[0], index, first.args[2])
    return None


def _connected(xs: Sequence[Expr], n: Expr) -> Expr | None:
    """Return the con- or disjunction of the parts that all have, and of the others one by one."""
    shared = [p for p in xs[0].args[0] if all(p in x.args[0] for x in xs)]
    others = [[p for p in x.args[0] if p not in shared] for x in xs]
    if len({len(o) for o in others}) > 1:
        return None
    parts = [lift(column, n) for column in zip(*others, strict=True)]
    make = E.and_ if xs[0].op == "and" else E.or_
    return None if None in parts else make(*shared, *(p for p in parts if p is not None))


def _affine(xs: Sequence[Expr], n: Expr) -> Expr | None:
    """Return ``x_0 + n * step``, or a sum of such terms in the digits of ``n``.

    Digits are the turns of loops in one another that are written as one, and heads that share their keys: of
    ``for b .. for h`` the keys of head ``h // 2`` are at ``n // H`` and ``n % H // 2``.
    """
    first, turns = xs[0], len(xs)
    for block in (b for b in range(1, turns) if turns % b == 0):
        step = E.sub(xs[block], first)
        if E.loads(step):  # two values of a tensor are apart by their difference, which says nothing
            continue
        if any(E.sub(x, xs[i % block]) != E.mul(E.integer(i // block), step) for i, x in enumerate(xs)):
            continue
        size = E.integer(block)
        inner = lift(xs[:block], E.mod(n, size))
        return None if inner is None else E.add(inner, E.mul(E.floordiv(n, size), step))
    return None


def lift_index(xs: Sequence[tuple[Expr, ...]], n: Expr) -> tuple[Expr, ...] | None:
    """Return the index that is ``xs[i]`` at ``n = i``."""
    if len({len(x) for x in xs}) > 1:
        return None
    out = [lift(column, n) for column in zip(*xs, strict=True)]
    return None if None in out else tuple(x for x in out if x is not None)


def lift_place(places: Sequence[At], n: Expr, env: Env, factors: bool = False) -> Candidate | None:
    """Return an element that is ``places[i]`` at ``n = i``, in the nearest tensor that all are views of.

    With ``factors`` multiplications by a constant are passed as well.
    """
    chains = [candidates(at, env, factors)[0] for at in places]
    others = [{c.at.node: c for c in chain} for chain in chains[1:]]
    for c in chains[0]:
        same = [c, *(o[c.at.node] for o in others if c.at.node in o)]
        if len(same) < len(places) or any(x.factor != c.factor for x in same):
            continue
        index = lift_index([x.at.index for x in same], n)
        if index is not None:
            skipped = tuple(dict.fromkeys(s for x in same for s in x.skipped))
            return Candidate(At(c.at.node, index), c.factor, skipped)
    return None


def lift_mod(mods: Sequence[RawMod], n: Expr, env: Env) -> RawMod | None:
    """Return the step on the scores that is ``mods[i]`` at ``n = i``."""
    first: Any = mods[0]
    if any(type(m) is not type(first) for m in mods):
        return None
    if isinstance(first, Scale | Softcap | RawShift):
        return first if all(m == first for m in mods) else None
    rest: list[Any] = [replace(m, **_places(m, first)) for m in mods]
    if any(m != rest[0] for m in rest):
        return None
    if isinstance(first, RawPointwise):
        columns = zip(*(m.sides for m in mods if isinstance(m, RawPointwise)), strict=True)
        sides = [lift_place(c, n, env) for c in columns]
        return None if None in sides else replace(first, sides=tuple(s.at for s in sides if s is not None))
    if isinstance(first, RawBias | RawGain):
        at = lift_place([m.at for m in mods if isinstance(m, RawBias | RawGain)], n, env)
        return None if at is None else replace(first, at=at.at)
    return lift_mask([m for m in mods if isinstance(m, RawMask)], n, env)


def _places(m: Any, first: Any) -> dict[str, Any]:
    """Return the fields that may differ, as the first step has them."""
    return {f: getattr(first, f) for f in ("at", "sides", "keep") if hasattr(m, f)}


def lift_mask(masks: Sequence[RawMask], n: Expr, env: Env) -> RawMask | None:
    """Return the mask that is ``masks[i]`` at ``n = i``; it forgets a tensor that is not one for all.

    The tensor of the first stands for others that derive to the same, under the same conditions.
    """
    keep = lift([m.keep for m in masks], n)
    if keep is None:
        return None
    places = [m.at for m in masks if m.at is not None]
    at = lift_place(places, n, env) if len(places) == len(masks) else None
    if at is not None or not places:
        return replace(masks[0], keep=keep, at=None if at is None else at.at)
    conditions = {env.fitted_under(p.node) for p in places}
    if len(conditions) == 1 and len(places) == len(masks) and all(m.keep == keep for m in masks):
        return masks[0]
    return None if any(conditions) else replace(masks[0], keep=keep, at=None)
