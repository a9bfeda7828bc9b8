"""Name the atoms of a skeleton, and choose where operands are read.

Roles are batch, head, group, query, key, feature and value feature.

Roles come from sets: an atom that K or V varies along is a batch atom, one that only Q varies along is the
query or a group. Repeated keys (grouped heads) show as an atom that K reads through ``h // g``; the atom is
split and the low digit is the group, whatever made the copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.ir import Miss
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask, RawMod, RawPointwise, step_into
from attnc.passes.detect.graph import base_name, is_float_cast, tensor_of
from attnc.passes.detect.layout import digits
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.views import At, stepped

Atoms = tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Roles:
    """Groups of atoms, most significant first.  Query heads are ``head + group``."""

    batch: Atoms
    head: Atoms
    group: Atoms
    query: Atoms
    key: Atoms
    feature: Atoms
    value: Atoms

    @property
    def heads(self) -> Atoms:
        """Atoms of the query heads."""
        return self.head + self.group


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where an operand can be read: the operand's element is ``factor`` times this one."""

    at: At
    factor: float
    skipped: tuple[fx.Node, ...]


def candidates(
    at: At, env: Env, factors: bool = True, narrow: torch.dtype | None = None
) -> tuple[list[Candidate], int]:
    """Return the places along the chain of views above an operand, and which is the first past all copies.

    The number is the position behind the last op that repeats elements or, if ``factors`` says that they may
    be passed, multiplies by a constant; or that makes fp32 of ``narrow``.
    """
    out, past = [Candidate(at, 1.0, ())], 0
    while len(out) < 40:
        last = out[-1]
        step = stepped(last.at)
        if step is not None:
            out.append(Candidate(step[0], last.factor, (*last.skipped, last.at.node)))
            past = len(out) - 1 if step[1] else past
            continue
        if narrow is not None and _widens(last.at.node, narrow):
            there = step_into(last.at, last.at.node.args[0])
            out.append(Candidate(there, last.factor, (*last.skipped, last.at.node)))
            past = len(out) - 1
            continue
        scaled = _constant_factor(last.at, env) if factors else None
        if scaled is None:
            return out, past
        out.append(Candidate(scaled[0], last.factor * scaled[1], (*last.skipped, last.at.node)))
        past = len(out) - 1
    return out, past


def _widens(node: fx.Node, narrow: torch.dtype) -> bool:
    """Say whether the node makes fp32 of a tensor of dtype ``narrow``, on its device."""
    source = node.args[0] if is_float_cast(node) else None
    here, there = tensor_of(node), tensor_of(source) if isinstance(source, fx.Node) else None
    if here is None or there is None:
        return False
    return (here.dtype, there.dtype, here.device) == (torch.float32, narrow, there.device)


def _before_widening(s: Skeleton, env: Env) -> torch.dtype | None:
    """Return the half precision of the values if q and k had it too, before their product in fp32.

    A spec computes scores of half operands in fp32, so such operands are read where they are narrow.
    """
    values = tensor_of(s.v.node)
    narrow = None if values is None else values.dtype
    if narrow not in (torch.float16, torch.bfloat16):
        return None
    for at in (s.q, s.k):
        places = (c.at.node for c in candidates(at, env, narrow=narrow)[0])
        found = ((tensor_of(n), env.usable(n)) for n in places)
        if not any(usable and t is not None and t.dtype == narrow for t, usable in found):
            return None
    return narrow


def _constant_factor(at: At, env: Env) -> tuple[At, float] | None:
    name = base_name(at.node)
    if name not in ("mul", "div") or at.node.kwargs.get("rounding_mode"):
        return None
    a, b = at.node.args[:2]
    for number, other in ((b, a), (a, b)):
        if not isinstance(other, fx.Node):
            continue
        factor = env.scalar(number)
        if factor is not None and (name == "mul" or (number is b and factor != 0)):
            return step_into(at, other), factor if name == "mul" else 1.0 / factor
    return None


def splits(index: Iterable[Expr]) -> dict[Expr, Expr]:
    """Return how atoms must be cut so that ``x // m`` and ``x % m`` in ``index`` become atoms."""
    out: dict[Expr, Expr] = {}
    for e in E.walk(tuple(index)):
        if e.op not in ("floordiv", "mod"):
            continue
        x, m = e.args
        g = E.only_index(x)
        if g is None or g in out:
            continue
        high = E.exact_div(g.args[1], m)
        if high is not None:
            out[g] = E.add(E.mul(m, E.index(f"{g.args[0]}h", high)), E.index(f"{g.args[0]}l", m))
    return out


def refine(x: At, by: dict[Expr, Expr]) -> At:
    """Return the element with atoms replaced."""
    return At(x.node, tuple(E.substitute(i, by) for i in x.index)) if by else x


def _refined_mod(m: RawMod, by: dict[Expr, Expr]) -> RawMod:
    if isinstance(m, RawBias):
        return replace(m, at=refine(m.at, by))
    if isinstance(m, RawGain):
        return replace(m, at=refine(m.at, by))
    if isinstance(m, RawPointwise):
        return replace(m, sides=tuple(refine(x, by) for x in m.sides))
    if isinstance(m, RawMask):
        return replace(m, keep=E.substitute(m.keep, by), at=refine(m.at, by) if m.at else None)
    return m


def refine_all(s: Skeleton, by: dict[Expr, Expr]) -> None:
    """Replace atoms everywhere in a skeleton."""
    if not by:
        return
    s.scores, s.q, s.k, s.v = (refine(x, by) for x in (s.scores, s.q, s.k, s.v))
    s.key = E.substitute(s.key, by)
    s.features = tuple(a for f in s.features for a in ordered(E.substitute(E.generator(f), by)))
    s.out = tuple(E.substitute(x, by) for x in s.out)
    s.weights = tuple(E.substitute(x, by) for x in s.weights)
    s.mods = [_refined_mod(m, by) for m in s.mods]
    s.sink = refine(s.sink, by) if s.sink else None
    s.gates = tuple(refine(x, by) for x in s.gates)
    s.zeroed = replace(s.zeroed, keep=E.substitute(s.zeroed.keep, by)) if s.zeroed else None


def choose(s: Skeleton, env: Env) -> dict[str, list[Candidate]] | Miss:
    """Choose where q, k and v may be read: behind the last copy or factor if views lead from there.

    Atoms of the skeleton are cut where that needs it.  Further places on the same chain follow the first.
    """
    refine_all(s, _cuts_beside(s))
    narrow = _before_widening(s, env)
    chosen: dict[str, list[Candidate]] = {}
    for name in ("k", "v", "q"):
        at: At = getattr(s, name)
        every, past = candidates(at, env, factors=name != "v", narrow=narrow if name != "v" else None)
        beyond = [c for c in every[past:] if env.usable(c.at.node)]
        before = [c for c in reversed(every[:past]) if env.usable(c.at.node)]
        for i, c in enumerate((*beyond, *before)):
            by = cuts(c.at.index)
            if all(digits(E.substitute(x, by)) is not None for x in c.at.index):
                refine_all(s, by)
                chosen = {n: [replace(x, at=refine(x.at, by)) for x in cs] for n, cs in chosen.items()}
                rest = beyond[i:] or [c]
                chosen[name] = [replace(x, at=refine(x.at, by)) for x in rest]
                break
        else:
            return Miss(
                "operand-layout",
                at.node.name,
                f"{name} is read at {list(at.index)}, which no view of its sources gives",
            )
    return chosen


def _cuts_beside(s: Skeleton) -> dict[Expr, Expr]:
    """Return the cuts that tensors beside the scores need.

    Batch and heads, where they are one axis of the scores.

    Only atoms of the keys and values are cut, and never the keys' positions: a bias of blocks stays one.
    """
    shared = {*_atoms(s.k.index), *_atoms(s.v.index)} - set(ordered(s.key)) - set(s.features)
    places = [m.at for m in s.mods if isinstance(m, RawBias | RawGain | RawMask)] + [s.sink]
    places += [x for m in s.mods if isinstance(m, RawPointwise) for x in m.sides] + list(s.gates)
    index = tuple(x for at in places if at is not None for x in at.index)
    return {a: x for a, x in cuts(index).items() if a in shared}


def cuts(index: Sequence[Expr]) -> dict[Expr, Expr]:
    """Return the cuts of atoms that turn every ``x // m`` and ``x % m`` of an index into atoms."""
    by: dict[Expr, Expr] = {}
    for _ in range(4):
        more = splits(index)
        if not more:
            break
        by = {**{a: E.substitute(x, more) for a, x in by.items()}, **more}
        index = tuple(E.substitute(i, more) for i in index)
    return by


def varying(s: Skeleton) -> frozenset[Expr]:
    """Return the atoms that keys or values vary along."""
    return frozenset((*_atoms(s.k.index), *_atoms(s.v.index)))


def assign(
    s: Skeleton, chosen: dict[str, list[Candidate]], beside: frozenset[Expr] = frozenset()
) -> Roles | Miss:
    """Give every atom its role from the index sets of the chosen operands.

    ``beside`` are atoms that keys or values of other pieces of the same site vary along.
    """
    q, k, v = (_atoms(chosen[n][0].at.index) for n in "qkv")
    key = ordered(s.key)
    feature = tuple(a for a in q if a in k and a in s.features)
    if len(feature) < len(s.features):
        return Miss("repeated-features", s.scores.node.name, "an operand is constant along a summed axis")
    axes = [ordered(x) for i, x in enumerate(s.weights) if i != s.anchor.dim]
    anchor = [a for axis in axes for a in axis]
    value = tuple(a for a in v if a not in anchor and a not in key)
    shared = [a for a in anchor if a in k or a in v or a in beside]
    alone = [a for a in anchor if a not in shared]
    if any(a in q for a in key):
        return Miss("query-reads-keys", s.scores.node.name, "the query side varies along the keys")
    stray = [a for a in (*q, *k) if a not in anchor and a not in key and a not in feature]
    if stray:
        return Miss(
            "operand-atoms", s.scores.node.name, f"an operand varies along {stray}, which the scores do not"
        )
    # What shares an axis of the scores with heads of the keys is a group of heads, even for a single query.
    grouped = {a for axis in axes if set(axis) & set(shared) for a in axis if a in alone}
    sunk = set(_atoms(s.sink.index)) if s.sink is not None else set()
    if sunk != set(anchor):  # one per head: what it varies along is no query
        grouped |= sunk & set(alone)
    query = _query(s, [a for a in alone if a not in grouped], key)
    group = tuple(a for a in alone if a not in query)
    one_batch = (len(axes) > 2 and not axes[0]) or s.sink is not None
    # A batch whose query heads all share the one head of keys (multi-query attention, arXiv:1911.02150).
    multi_query = bool(group) and len(axes) > 2 and axes[0] == tuple(shared) and s.sink is None
    lone = (one_batch or bool(group)) and not multi_query
    head = tuple(shared[-1:]) if len(shared) > 1 or lone else ()
    return Roles(tuple(a for a in shared if a not in head), head, group, query, key, feature, value)


def _query(s: Skeleton, alone: Sequence[Expr], key: Atoms) -> Atoms:
    """Pick the query among atoms that only Q has.

    It is what a mask compares with keys, else the one as long as the keys, else the last.
    """
    if not alone:
        return ()
    for m in s.mods:
        if isinstance(m, RawMask):
            for c in E.walk(m.keep):
                if c.op in ("le0", "eq0"):
                    used = E.indices(c)
                    hit = [a for a in alone if a in used]
                    if hit and any(a in used for a in key):
                        return (hit[-1],)
    length = E.product(a.args[1] for a in key)
    same = [a for a in alone if a.args[1] == length]
    return (same[-1],) if same else (alone[-1],)


def _atoms(index: Iterable[Expr]) -> list[Expr]:
    out: list[Expr] = []
    for x in index:
        for a in ordered(x):
            if a not in out:
                out.append(a)
    return out


def ordered(x: Expr) -> Atoms:
    """Return the atoms of an index, the most significant first where it is a mixed-radix number."""
    d = digits(x)
    return tuple(d[0]) if d is not None else E.indices(x)
