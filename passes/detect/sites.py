"""Find attention sites: from a normalizer back to the scores, forward to the values, roles by sets.

One anchor at a time: (1) follow the weights to the contraction that sums the keys, and pull its operand back,
which says what every axis of the weights is in the result; (2) peel the scores down to their contraction; (3)
read the roles of the index atoms off the operands' index sets (summed = feature, on the key side = key, on
both = batch, on the query side only = query or group); (4) choose where each operand is best read from. No
step looks at the names of modules or at positions of axes. Source: the project's detection notes, sections 3
to 6.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.ir import Miss, Scale
from attnc.passes.detect.contraction import Contraction, contractions_of
from attnc.passes.detect.env import Env, RawMod, step_into
from attnc.passes.detect.graph import (
    argument,
    base_name,
    is_float_cast,
    op_name,
    shape,
    tensor_of,
    users,
)
from attnc.passes.detect.layout import digits
from attnc.passes.detect.norms import NORM_FINDERS
from attnc.passes.detect.norms.anchor import Anchor, source_of
from attnc.passes.detect.scores import SCORE_PEELERS, views
from attnc.passes.detect.scores.additive import additive
from attnc.passes.detect.views import At, Index, stepped

log = logging.getLogger("attnc.detect")


@dataclass
class Skeleton:
    """A site in raw form: indices are in atoms, operands are not chosen yet."""

    anchor: Anchor
    values: Contraction
    scores: At
    q: At
    k: At
    v: At
    key: Expr
    out: Index
    output: fx.Node
    mods: list[RawMod]
    interior: list[fx.Node]
    trail: list[str]
    features: tuple[Expr, ...]
    weights: Index
    sink: At | None = None
    dropout: float = 0.0
    dropout_node: fx.Node | None = None
    base: At | None = None
    conditions: list[str] = field(default_factory=list)


def skeletons(graph: fx.Graph, env: Env) -> list[Skeleton | Miss]:
    """Return a skeleton or a Miss for every normalizer of ``graph`` that touches a scores contraction.

    They come in node order, one family of normalizers after the other.
    """
    out: list[Skeleton | Miss] = []
    for finder in NORM_FINDERS:
        for anchor in finder(graph):
            found = _skeleton(anchor, env)
            if found is not None:
                out.append(found)
    return out


def _skeleton(anchor: Anchor, env: Env) -> Skeleton | Miss | None:
    forward = _value_contraction(anchor, env)
    if not env.carries(anchor.scores):
        if isinstance(forward, Miss) or env.pure(forward[0].lhs) or env.pure(forward[0].rhs):
            return None
        why = (
            "the weights are contracted with values, but what is normalized is no elementwise function of "
            "one contraction of two computed tensors"
        )
        return Miss("no-scores", anchor.weights.name, why)
    if isinstance(forward, Miss):
        return forward
    values, path = forward
    solved = _solve(anchor, values, path)
    if isinstance(solved, Miss):
        return solved
    return _score_side(anchor, env, solved)


# ---------------------------------------------------------------- forward: to the value contraction

_CARRIER_NAMES = """
view _unsafe_view reshape permute transpose t unsqueeze squeeze expand clone contiguous alias detach
_to_copy to dropout slice type_as
"""
_CARRIERS = frozenset(_CARRIER_NAMES.split())


def _value_contraction(anchor: Anchor, env: Env) -> tuple[Contraction, list[fx.Node]] | Miss:
    """Return the one contraction that the weights reach, and the nodes on the way.

    The way leads through views, casts and dropout only.
    """
    reached: list[tuple[Contraction, list[fx.Node]]] = []
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(anchor.weights, [])]
    while stack:
        node, path = stack.pop()
        for u in users(node):
            found = [c for c in contractions_of(u) if c.lhs is node or c.rhs is node]
            if found:
                reached += [(c, path) for c in found if not _is_layer(c, node, env)]
            elif base_name(u) in _CARRIERS and u.args[0] is node:
                stack.append((u, [*path, u]))
            elif base_name(u) == "native_dropout" and u.args[0] is node:
                stack += [(kept, [*path, u, kept]) for kept in u.users if kept.args[1] == 0]
    if not reached:
        return Miss(
            "no-value-contraction", anchor.weights.name, "the weights reach no contraction with values"
        )
    if len(reached) > 1:
        why = f"the weights are contracted {len(reached)} times"
        return Miss("several-value-contractions", anchor.weights.name, why)
    values, path = reached[0]
    if values.lhs is values.rhs:
        return Miss("weights-squared", values.node.name, "the weights are contracted with themselves")
    if values.base is not None or values.alpha != 1.0:
        return Miss("values-added", values.node.name, "baddbmm scales the result or adds a tensor to it")
    return values, path


def _is_layer(c: Contraction, weights: fx.Node, env: Env) -> bool:
    """Say whether a linear layer with parameters reads the weights, which makes them no weights of values."""
    return base_name(c.node) == "linear" and env.pure(c.rhs if c.lhs is weights else c.lhs)


@dataclass
class _Solved:
    values: Contraction
    weights: Index
    key: Expr
    out: Index
    v: At
    path: list[fx.Node]
    dropout: float = 0.0
    dropout_node: fx.Node | None = None


def _solve(anchor: Anchor, values: Contraction, path: list[fx.Node]) -> _Solved | Miss:
    """Name the axes: express the weights' index and the result's index in common atoms."""
    name = anchor.weights.name
    out = tuple(ZERO if n == ONE else E.index(f"o{i}", n) for i, n in enumerate(shape(values.node)))
    lhs, rhs, fresh = values.operands(out, "t")
    last = path[-1] if path else anchor.weights
    p, v = (lhs, rhs) if values.lhs is last else (rhs, lhs)
    solved = _Solved(values, (), ZERO, (), v, path)
    at = p
    while at.node is not anchor.weights:
        drop = _active_dropout(at.node)
        if drop is not None:
            solved.dropout, solved.dropout_node = float(argument(drop, 1, "p")), drop
            at = At(drop.args[0], at.index)  # type: ignore[arg-type]
            continue
        step = stepped(at)
        if step is not None:
            at = step[0]
        elif is_float_cast(at.node):
            at = At(at.node.args[0], at.index)  # type: ignore[arg-type]
        else:
            return Miss(
                "weights-edited", at.node.name, f"{op_name(at.node)} edits the weights before the values"
            )
    key = at.index[anchor.dim]
    read = digits(key)
    if (
        read is None
        or read[1] != ZERO
        or set(read[0]) != {g for x in fresh.values() for g in [E.only_index(x)] if g is not None}
    ):
        return Miss("keys-not-summed", name, "the value contraction does not sum exactly the normalized axis")
    return _name_axes(anchor, solved, at.index, key, out)


def _active_dropout(node: fx.Node) -> fx.Node | None:
    """Return the dropout in training mode that made ``node``, in either of its two forms."""
    if op_name(node) == "py.getitem" and node.args[1] == 0 and base_name(node.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return node if base_name(node) == "dropout" and argument(node, 2, "train") is not False else None


def _name_axes(anchor: Anchor, solved: _Solved, weights: Index, key: Expr, out: Index) -> _Solved | Miss:
    by_out: dict[Expr, Expr] = {}
    named: list[Expr] = []
    parts: dict[Expr, list[tuple[Expr, Expr]]] = {}
    for i, (x, n) in enumerate(zip(weights, shape(anchor.weights), strict=True)):
        if i == anchor.dim or n == ONE:
            named.append(key if i == anchor.dim else ZERO)
            continue
        atom = E.index(f"a{i}", n)
        single, whole = E.only_index(x), digits(x)
        if single is not None and single.args[1] == n:
            by_out[single] = atom
            named.append(atom)
        elif whole is not None and whole[1] == ZERO:
            named.append(x)
        else:
            placed = _digit_of(x)
            if placed is None:
                return Miss(
                    "weights-rearranged", anchor.weights.name, f"axis {i} of the weights is {x} of the result"
                )
            parts.setdefault(placed[0], []).append((atom, placed[1]))
            named.append(atom)
    for o, pieces in parts.items():
        by_out[o] = E.add(*(E.mul(atom, stride) for atom, stride in pieces))
        known = digits(by_out[o])
        if known is None or E.product(a.args[1] for a in known[0]) != o.args[1]:
            return Miss("weights-rearranged", anchor.weights.name, f"{o} is not made of axes of the weights")
    for i, x in enumerate(weights):
        if i != anchor.dim and E.substitute(x, by_out) != named[i] and shape(anchor.weights)[i] != ONE:
            return Miss(
                "weights-rearranged",
                anchor.weights.name,
                f"axis {i} of the weights is not recovered from the result",
            )
    solved.weights, solved.key = tuple(named), key
    solved.out = tuple(E.substitute(x, by_out) for x in out)
    solved.v = At(solved.v.node, tuple(E.substitute(x, by_out) for x in solved.v.index))
    return solved


def _digit_of(x: Expr) -> tuple[Expr, Expr] | None:
    """Return (index variable, stride) for ``o // s``, ``o % n`` and ``(o // s) % n``."""
    g = E.only_generator(x)
    stride = ONE
    if g is not None and g.op == "mod":
        inner = g.args[0]
        g = E.only_generator(inner)
    if g is not None and g.op == "floordiv":
        stride = g.args[1]
        g = E.only_generator(g.args[0])
    return (g, stride) if g is not None and g.op == "index" else None


# ---------------------------------------------------------------- backward: the scores to their contraction


def peel_scores(at: At, env: Env) -> tuple[At, list[RawMod], list[str], list[fx.Node]] | Miss:
    """Peel ``at`` down to a scores contraction; mods come innermost first."""
    mods: list[RawMod] = []
    trail: list[str] = []
    through: list[fx.Node] = []
    while env.scores_of(at.node) is None:
        through.append(at.node)
        if not env.carries(at.node):
            return Miss(
                "no-scores",
                at.node.name,
                f"{op_name(at.node) or at.node.op} does not come from a contraction of two computed tensors",
            )
        for peeler in SCORE_PEELERS:
            step = peeler(at, env)
            if isinstance(step, Miss):
                return step
            if step is not None:
                mods[:0] = step.mods
                through += step.through
                trail.append(step.name)
                at = step.rest
                break
        else:
            return Miss(
                "score-step-unknown",
                at.node.name,
                f"{op_name(at.node)} between the scores and the softmax is not understood",
            )
    return at, mods, trail, through


def _score_side(anchor: Anchor, env: Env, s: _Solved) -> Skeleton | Miss:
    peeled = peel_scores(At(anchor.scores, s.weights), env)
    if isinstance(peeled, Miss):
        return peeled
    at, mods, trail, through = peeled
    scores = env.scores_of(at.node)
    assert scores is not None
    lhs, rhs, fresh = scores.operands(at.index, "e")
    on_key = set(E.indices(s.key))
    sides = [x for x in (lhs, rhs) if on_key & {g for i in x.index for g in E.indices(i)}]
    if len(sides) != 1 and on_key:
        return Miss(
            "no-key-side",
            at.node.name,
            "both or neither operand of the scores contraction vary along the keys",
        )
    k = sides[0] if on_key else rhs
    q = lhs if k is rhs else rhs
    products = [p for c in (scores, s.values) for p in c.between]
    interior = [*anchor.inner, *s.path, *through, at.node, s.values.node, *products]
    features = tuple(g for x in fresh.values() if (g := E.only_index(x)) is not None)
    out = Skeleton(
        anchor,
        s.values,
        at,
        q,
        k,
        s.v,
        s.key,
        s.out,
        s.values.node,
        mods,
        interior,
        trail,
        features,
        s.weights,
    )
    out.dropout, out.dropout_node = s.dropout, s.dropout_node
    if scores.alpha != 1.0:
        out.mods.insert(0, Scale(scores.alpha))
    if scores.base is not None:
        if scores.beta != 1.0:
            return Miss("scaled-addition", at.node.name, f"baddbmm adds {scores.beta:g} times a tensor")
        base = additive(step_into(at, scores.base), scores.base, env, 1)
        if isinstance(base, Miss):
            return base
        place = 1 if scores.alpha != 1.0 else 0
        out.mods[place:place] = base
    missing = _sink(anchor, env, s)
    if isinstance(missing, Miss):
        return missing
    out.sink = missing
    return _late_division(anchor, out)


def _sink(anchor: Anchor, env: Env, s: _Solved) -> At | Miss | None:
    """Return the element beyond the keys that the values sum, if the softmax ran over exactly one more."""
    n, m = shape(anchor.scores)[anchor.dim], E.product(g.args[1] for g in E.indices(s.key))
    if n == m:
        return None
    if E.sub(n, m) != ONE:
        return Miss(
            "columns-dropped", anchor.weights.name, f"the softmax runs over {n} columns, the values over {m}"
        )
    at = At(anchor.scores, tuple(m if i == anchor.dim else x for i, x in enumerate(s.weights)))
    while env.carries(at.node):
        if base_name(at.node) == "sub":
            return Miss("sink-edited", at.node.name, "the sink column is edited after it was appended")
        step = views.peel(at, env)
        if isinstance(step, Miss) or step is None:
            return Miss(
                "sink-not-found", at.node.name, "the extra softmax column does not come from a concatenation"
            )
        at = step.rest
    while (further := stepped(at)) is not None:
        at = further[0]
    return at


def _late_division(anchor: Anchor, s: Skeleton) -> Skeleton | Miss:
    """Fold ``(weights @ v) / sum`` into the site when the divisor is the weights' own sum at the same row."""
    if anchor.denominator is None:
        return s
    readers = users(s.values.node)
    div = readers[0] if len(readers) == 1 else s.values.node
    if base_name(div) != "div" or div.kwargs.get("rounding_mode") or div.args[0] is not s.values.node:
        why = "the unnormalized weights are contracted, and the result is not divided once"
        return Miss("late-division", s.values.node.name, why)
    if not isinstance(div.args[1], fx.Node) or tensor_of(div.args[1]) is None:
        return Miss(
            "late-division", div.name, "the result is divided by a number, not by the sum of the weights"
        )
    row, through = source_of(step_into(At(div, s.out), div.args[1]))
    if row.node is not anchor.denominator:
        return Miss("late-division", div.name, "the divisor is not the sum of these weights")
    weights_index = [x for i, x in enumerate(s.weights) if i != anchor.dim]
    kept = len(row.index) == len(shape(anchor.weights))
    row_index = [x for i, x in enumerate(row.index) if not (kept and i == anchor.dim)]
    if row_index != weights_index or shape(div) != shape(s.values.node):
        return Miss("late-division", div.name, "the divisor's rows are not the weights' rows")
    whole = anchor.denominator
    total = whole if base_name(whole) == "sum" else whole.all_input_nodes[0]
    s.interior += [div, *through, whole, total]
    s.output = div
    s.trail.append("late-division")
    return s
