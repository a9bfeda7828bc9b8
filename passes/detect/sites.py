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
from attnc.passes.detect.contraction import Contraction
from attnc.passes.detect.env import Env, RawMask, RawMod, step_into
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
from attnc.passes.detect.norms.anchor import Anchor, anywhere, divisor_of
from attnc.passes.detect.reasons import mixed_by_layers, why_no_scores
from attnc.passes.detect.scores import SCORE_PEELERS, views
from attnc.passes.detect.scores.additive import additive
from attnc.passes.detect.solve import Reached, Solved, solve, value_contraction, value_contractions
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
    gates: tuple[At, ...] = ()
    zeroed: RawMask | None = None
    conditions: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pieces:
    """A site whose values come in pieces: a skeleton for each, and the additions that put them together."""

    parts: tuple[Skeleton, ...]
    added: tuple[fx.Node, ...]

    @property
    def anchor(self) -> Anchor:
        """The one normalizer."""
        return self.parts[0].anchor

    @property
    def interior(self) -> list[fx.Node]:
        """The nodes of all pieces."""
        return [n for s in self.parts for n in s.interior]


def skeletons(graph: fx.Graph, env: Env) -> list[Skeleton | Pieces | Miss]:
    """Return a skeleton (or its pieces) or a Miss for every normalizer that touches a scores contraction.

    They come in node order, one family of normalizers after the other.  A normalizer that is no site but a
    part of another, as the softmax of signed weights is, gives none.
    """
    out: list[Skeleton | Pieces | Miss] = []
    for finder in NORM_FINDERS:
        for anchor in finder(graph):
            found = skeleton(anchor, env)
            if found is not None:
                out.append(found)
    inner = {n.name for s in out if isinstance(s, Skeleton) for n in s.anchor.inner}
    return [s for s in out if not (isinstance(s, Miss) and s.node in inner)]


def skeleton(anchor: Anchor, env: Env) -> Skeleton | Pieces | Miss | None:
    """Return the skeleton around one normalizer, or why there is none; None if it is no attention at all."""
    reached = value_contractions(anchor, env)
    if len(reached) > 1 and env.carries(anchor.scores):
        return _pieces(anchor, reached, env)
    forward = value_contraction(anchor, reached)
    if not env.carries(anchor.scores):
        if isinstance(forward, Miss) or env.pure(forward[0].lhs) or env.pure(forward[0].rhs):
            return mixed_by_layers(anchor, env)
        return why_no_scores(anchor, env)
    if isinstance(forward, Miss):
        return forward
    values, path = forward
    solved = solve(anchor, values, path, env)
    if isinstance(solved, Miss):
        return solved
    return score_side(anchor, env, solved)


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


def score_side(anchor: Anchor, env: Env, s: Solved) -> Skeleton | Miss:
    """Return the skeleton whose value contraction is solved, or why its scores are none."""
    out = _with_scores(anchor, env, s)
    if isinstance(out, Miss):
        return out
    missing = _sink(anchor, env, s)
    if isinstance(missing, Miss):
        return missing
    out.sink = missing
    return _late_division(anchor, out)


def _with_scores(anchor: Anchor, env: Env, s: Solved) -> Skeleton | Miss:
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
    # Of a single key, the side that varies less: queries and groups of heads are the other's.
    k = sides[0] if on_key else min((rhs, lhs), key=lambda x: len({g for i in x.index for g in E.indices(i)}))
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
    return out


def _sink(anchor: Anchor, env: Env, s: Solved) -> At | Miss | None:
    """Return the element beyond the keys that the values sum, if the softmax ran over exactly one more."""
    n, m = shape(anchor.scores)[anchor.dim], E.product(g.args[1] for g in E.indices(s.key))
    if n == m:
        return None if anchor.sink is None else anchor.sink.at(s.weights)
    if E.sub(n, m) != ONE or anchor.sink is not None:
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
    div, index, between = _next_step(s.values.node, s.out)
    divisor = None if div is None else divisor_of(div, between[-1], index)
    if div is None or divisor is None:
        why = "the unnormalized weights are contracted, and the result is not divided once by a tensor"
        return Miss("late-division", s.values.node.name, why)
    row, through = divisor
    if row.node is not anchor.denominator:
        return Miss("late-division", div.name, "the divisor is not the sum of these weights")
    weights_index = [x for i, x in enumerate(s.weights) if i != anchor.dim]
    kept = len(row.index) == len(shape(anchor.weights))
    row_index = [x for i, x in enumerate(row.index) if not (kept and i == anchor.dim)]
    if row_index != weights_index or shape(div) != shape(between[-1]):
        return Miss("late-division", div.name, "the divisor's rows are not the weights' rows")
    whole = anchor.denominator
    total = whole if base_name(whole) == "sum" else whole.all_input_nodes[0]
    s.interior += [*between[1:], div, *through, whole, total]
    s.output, s.out = div, index
    s.trail.append("late-division")
    return s


def _next_step(node: fx.Node, index: Index) -> tuple[fx.Node | None, Index, list[fx.Node]]:
    """Return the only reader that is no view, the index there of element ``index``, and the nodes before it.

    Views are followed that move, add and drop axes; the reader is None where there are several.
    """
    passed = [node]
    while len(readers := users(node)) == 1:
        following = _moved_to(readers[0], node, index)
        if following is None:
            return readers[0], index, passed
        node, index = readers[0], following
        passed.append(node)
    return None, index, passed


def _moved_to(view: fx.Node, src: fx.Node, index: Index) -> Index | None:
    """Return where ``view`` has the element ``index`` of ``src``, None unless each axis moves as a whole."""
    here = anywhere(view) if tensor_of(view) is not None else ()
    step = stepped(At(view, here))
    back = (
        step[0].index if step is not None and step[0].node is src else here if is_float_cast(view) else None
    )
    if back is None or E.product(shape(view)) != E.product(shape(src)):
        return None
    by = {x: i for x, i, n in zip(back, index, shape(src), strict=True) if n != ONE}
    if set(by) != {x for x in here if x != ZERO}:
        return None
    return tuple(ZERO if x == ZERO else by[x] for x in here)


# ---------------------------------------------------------------- values in pieces


def _pieces(anchor: Anchor, reached: Reached, env: Env) -> Pieces | Miss:
    """Read one softmax whose weights meet values in pieces: ``sum_i weights[.., part i] @ values_i``.

    With the parts side by side that is one contraction with the values one behind the other.
    """
    why = f"the weights are contracted {len(reached)} times, and not each key once with the results summed"
    several = Miss("several-value-contractions", anchor.weights.name, why)
    added = _sum_of([c.node for c, _ in reached])
    if added is None or anchor.denominator is not None:
        return several
    parts: list[tuple[Expr, Skeleton]] = []
    for values, path in reached:
        if values.base is not None or values.alpha != 1.0 or values.lhs is values.rhs:
            return several
        solved = solve(anchor, values, path, env, whole=False)
        if isinstance(solved, Miss):
            return solved
        read = digits(solved.key)
        s = _with_scores(anchor, env, solved)
        if isinstance(s, Miss) or read is None:
            return s if isinstance(s, Miss) else several
        s.key = E.sub(solved.key, read[1])
        parts.append((read[1], s))
    ordered = _side_by_side(parts, shape(anchor.scores)[anchor.dim])
    if ordered is None:
        return several
    return Pieces(tuple(ordered), tuple(added))


def _sum_of(nodes: list[fx.Node]) -> list[fx.Node] | None:
    """Return the additions that sum ``nodes`` and nothing else, the last one last; None if there are none."""
    left, added = set(nodes), list[fx.Node]()
    while len(left) > 1:
        step = next(
            (
                u
                for n in nodes + added
                if n in left
                for u in users(n)
                if base_name(u) == "add" and argument(u, 2, "alpha", 1) == 1 and set(u.args[:2]) <= left
            ),
            None,
        )
        if step is None or step.args[0] is step.args[1] or shape(step) != shape(nodes[0]):
            return None
        if any(users(x) != (step,) for x in step.all_input_nodes):
            return None
        left = (left - set(step.all_input_nodes)) | {step}
        added.append(step)
    return added


def _side_by_side(parts: list[tuple[Expr, Skeleton]], total: Expr) -> list[Skeleton] | None:
    """Return the skeletons in the order of their keys, None unless these follow each other without a gap."""
    out, position, left = [], ZERO, list(parts)
    while left:
        following = next((p for p in left if p[0] == position), None)
        if following is None:
            return None
        left.remove(following)
        out.append(following[1])
        position = E.add(position, E.product(g.args[1] for g in E.indices(following[1].key)))
    return out if position == total else None
