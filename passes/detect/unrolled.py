"""Loops over heads, batch entries or chunks of queries that capture unrolled: one site in place of many.

``cat([f(q_i, k_i, v_i) for i in range(n)])`` is ``f`` over tensors with one more axis where all turns do the
same to consecutive parts of the same tensors.  The turns are told apart by where they read; that index, as a
function of the turn, is all that has to be found (see ``lifting``), and the roles follow from it as ever: an
index that keys have is a batch or a head, one that only queries have is a group or part of the query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.ir import Scale
from attnc.passes.detect.env import Env
from attnc.passes.detect.graph import argument, base_name, shape, tensor_of, users
from attnc.passes.detect.lifting import lift_mask, lift_mod, lift_place
from attnc.passes.detect.roles import ordered, refine_all
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.views import At, Index, forward, moves

LOOP = "unrolled-loop"
"""What the trail of a site says that was written as a loop."""


def copy_of(s: Skeleton) -> Skeleton:
    """Return a skeleton that can be described without changing ``s``."""
    return replace(s, mods=list(s.mods), interior=list(s.interior), trail=list(s.trail))


def loops(graph: fx.Graph, sites: Sequence[Skeleton], env: Env) -> list[tuple[Skeleton, list[Skeleton]]]:
    """Return what unrolled loops are as one site, and the sites of ``sites`` that it stands for.

    An outer loop comes before the loops inside it.
    """
    known = {s.output: (s, [s]) for s in sites}
    out: list[tuple[Skeleton, list[Skeleton]]] = []
    for node in graph.nodes:
        parts = _turns(node, known)
        merged = None if parts is None else _merged(node, [(known[n][0], x, p) for n, x, p in parts], env)
        if parts is not None and merged is not None:
            known[node] = (merged, [s for n, _, _ in parts for s in known[n][1]])
            out.insert(0, known[node])
    return out


_Turn = tuple[fx.Node, Index, list[fx.Node]]


def _turns(node: fx.Node, known: Mapping[fx.Node, tuple[Skeleton, list[Skeleton]]]) -> list[_Turn] | None:
    """Return what a cat or stack puts together: the output of a site, its index in the part, views passed."""
    parts: list[fx.Node] = list(node.args[0]) if base_name(node) in ("cat", "stack") else []  # type: ignore[arg-type]
    turns: list[_Turn] = []
    for part in parts:
        chain, at, reader = list[fx.Node](), part, node
        while users(at) == (reader,) and at not in known and moves(at):
            chain.insert(0, at)
            at, reader = at.all_input_nodes[0], at
        if at not in known or users(at) != (reader,):
            return None
        index: Index | None = known[at][0].out
        for view in chain:
            index = None if index is None else forward(view, index)
        if index is None:
            return None
        turns.append((at, index, chain))
    if len(turns) < 2 or len({at for at, _, _ in turns}) < len(turns):
        return None
    same = all(t[1] == turns[0][1] and shape(p) == shape(parts[0]) for t, p in zip(turns, parts, strict=True))
    return turns if same else None


def _merged(node: fx.Node, turns: list[tuple[Skeleton, Index, list[fx.Node]]], env: Env) -> Skeleton | None:
    """Return the one skeleton whose part ``n`` is the n-th turn's."""
    sites = [s for s, _, _ in turns]
    first = sites[0]
    if any(_frame(s) != _frame(first) or s.gates or s.base is not None for s in sites):
        return None
    n = E.index(f"u{first.trail.count(LOOP)}", E.integer(len(sites)))
    q, k = (lift_place([getattr(s, x) for s in sites], n, env, factors=True) for x in "qk")
    v = lift_place([s.v for s in sites], n, env)
    mods = [lift_mod(m, n, env) for m in zip(*(s.mods for s in sites), strict=True)]
    if q is None or k is None or v is None or None in mods:
        return None
    out = copy_of(first)
    out.q, out.k, out.v = q.at, k.at, v.at
    out.mods = [m for m in mods if m is not None]
    factor = q.factor * k.factor
    out.mods[:0] = [Scale(factor)] if factor != 1.0 else []
    if first.sink is not None:
        sink = lift_place([s.sink for s in sites if s.sink is not None], n, env)
        if sink is None:
            return None
        out.sink = sink.at
    if first.zeroed is not None:
        out.zeroed = lift_mask([s.zeroed for s in sites if s.zeroed is not None], n, env)
        if out.zeroed is None:
            return None
    out.interior = list(dict.fromkeys(x for s in sites for x in s.interior))
    out.interior += [*(x for _, _, chain in turns for x in chain), node]
    out.conditions = list(dict.fromkeys(c for s in sites for c in s.conditions))
    out.trail.append(LOOP)
    out.output = node
    out.out = _result(node, turns[0][1], n)
    return _placed(out, n)


def _frame(s: Skeleton) -> tuple[object, ...]:
    """Return what all turns must have in common as it is."""
    a = s.anchor
    same = (a.dim, a.norm, a.rounds, a.bare, a.denominator is None, s.dropout, tuple(s.trail))
    has = (len(s.mods), s.sink is None, s.zeroed is None)
    dtypes = tuple(getattr(tensor_of(x), "dtype", None) for x in (a.scores, a.weights, s.output))
    return (*same, *has, *dtypes, s.key, s.out, s.weights, s.features)


def _result(node: fx.Node, index: Index, n: Expr) -> Index:
    d = argument(node, 1, "dim", 0) % len(shape(node))
    if base_name(node) == "stack":
        return (*index[:d], n, *index[d:])
    part = node.args[0][0]  # type: ignore[index]
    return (*index[:d], E.add(E.mul(n, shape(part)[d]), index[d]), *index[d + 1 :])  # type: ignore[arg-type]


def _placed(s: Skeleton, n: Expr) -> Skeleton | None:
    """Return the skeleton with ``n`` among the axes of its weights: as rows of one that is there, or its own.

    Rows ``n * 8 + a`` of the queries, where the two occur in no other way, are the rows of all turns, one
    behind the other.  None where the queries are so and something else is not, such as a mask that starts
    anew in every chunk.
    """
    summed = {*ordered(s.key), *s.features}
    turn = E.indices(n)[0]
    rows = [a for i, x in enumerate(s.weights) if i != s.anchor.dim for a in ordered(x) if a not in summed]
    for a in rows:
        whole = E.index(f"{a.args[0]}{turn.args[0]}", E.mul(turn.args[1], a.args[1]))
        joined = copy_of(s)
        refine_all(joined, {a: E.sub(whole, E.mul(n, a.args[1]))})
        if not _occurs(joined, turn):
            joined.weights = tuple(E.substitute(x, {a: whole}) for x in s.weights)
            return joined
        if _reads(s.q, turn) and not _reads(joined.q, turn):
            return None
    place = _place(s, turn)
    s.weights = (*s.weights[:place], n, *s.weights[place:])
    s.anchor = replace(s.anchor, dim=s.anchor.dim + (place <= s.anchor.dim))
    return s


def _occurs(s: Skeleton, turn: Expr) -> bool:
    """Say whether what is read or written depends on the turn."""
    places: list[At | None] = [s.q, s.k, s.v, s.sink]
    exprs = [*s.out, *(x for at in places if at is not None for x in at.index)]
    for m in s.mods:
        at, sides = getattr(m, "at", None), getattr(m, "sides", ())
        exprs += [x for p in (at, *sides) if p is not None for x in p.index]
        exprs += [m.keep] if hasattr(m, "keep") else []
    exprs += [s.zeroed.keep] if s.zeroed is not None else []
    return any(turn in E.indices(x) for x in exprs)


def _reads(at: At, turn: Expr) -> bool:
    return any(turn in E.indices(x) for x in at.index)


def _place(s: Skeleton, turn: Expr) -> int:
    """Return where the turn goes among the axes of the weights.

    That is behind the batch axes that stand before it in the tensor of the keys (or the queries): the last of
    these axes is the heads.
    """
    source = next((at for at in (s.k, s.q, s.v) if any(turn in E.indices(x) for x in at.index)), s.q)
    axis = next((i for i, x in enumerate(source.index) if turn in E.indices(x)), 0)
    before = {a for x in source.index[:axis] for a in E.indices(x)}
    shared = {a for at in (s.k, s.v) for x in at.index for a in E.indices(x)} & before
    axes = [i for i, x in enumerate(s.weights) if i != s.anchor.dim and shared & set(ordered(x))]
    return axes[-1] + 1 if axes else 0
