"""Follow weights to the contraction with values, and name the axes of both in common atoms."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.ir import Miss
from attnc.passes.detect.contraction import Contraction, contractions_of
from attnc.passes.detect.env import Env
from attnc.passes.detect.graph import CARRIERS, argument, base_name, is_float_cast, op_name, shape, users
from attnc.passes.detect.layout import digits
from attnc.passes.detect.norms.anchor import Anchor
from attnc.passes.detect.reasons import why_not_summed
from attnc.passes.detect.views import At, Index, stepped

_CUTS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
Reached = list[tuple[Contraction, list[fx.Node]]]


def value_contractions(anchor: Anchor, env: Env) -> Reached:
    """Return the contractions that the weights reach, and the nodes on the way to each.

    The way leads through views, casts and dropout only.
    """
    reached: Reached = []
    stack: list[tuple[fx.Node, list[fx.Node]]] = [(anchor.weights, [])]
    while stack:
        node, path = stack.pop()
        for u in users(node):
            found = [c for c in contractions_of(u) if c.lhs is node or c.rhs is node]
            if found:
                reached += [(c, path) for c in found if not _is_layer(c, node, env)]
            elif base_name(u) in CARRIERS and u.args[0] is node:
                stack.append((u, [*path, u]))
            elif base_name(u) in _CUTS and u.args[0] is node:
                stack += [(part, [*path, u, part]) for part in u.users]
            elif base_name(u) == "native_dropout" and u.args[0] is node:
                stack += [(kept, [*path, u, kept]) for kept in u.users if kept.args[1] == 0]
    return reached


def value_contraction(anchor: Anchor, reached: Reached) -> tuple[Contraction, list[fx.Node]] | Miss:
    """Return the only contraction that the weights reach, if it can be one with values."""
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
class Solved:
    """The axes of a value contraction, by name: weights, key, result and values as indices in atoms."""

    values: Contraction
    weights: Index
    key: Expr
    out: Index
    v: At
    path: list[fx.Node]
    dropout: float = 0.0
    dropout_node: fx.Node | None = None
    by_out: dict[Expr, Expr] = field(default_factory=dict)


def solve(
    anchor: Anchor, values: Contraction, path: list[fx.Node], env: Env, whole: bool = True
) -> Solved | Miss:
    """Name the axes: express the weights' index and the result's index in common atoms.

    Without ``whole`` the contraction may read a part of the weights that starts behind the first key.
    """
    name = anchor.weights.name
    out = tuple(ZERO if n == ONE else E.index(f"o{i}", n) for i, n in enumerate(shape(values.node)))
    lhs, rhs, fresh = values.operands(out, "t")
    last = path[-1] if path else anchor.weights
    p, v = (lhs, rhs) if values.lhs is last else (rhs, lhs)
    solved = Solved(values, (), ZERO, (), v, path)
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
    summed = frozenset(g for x in fresh.values() if (g := E.only_index(x)) is not None)
    if read is None or (read[1] != ZERO and whole) or set(read[0]) != summed:
        why = "the value contraction does not sum exactly the normalized axis"
        return why_not_summed(anchor, at.index, summed, env, Miss("keys-not-summed", name, why))
    return name_axes(anchor, solved, at.index, key, out)


def _active_dropout(node: fx.Node) -> fx.Node | None:
    """Return the dropout in training mode that made ``node``, in either of its two forms."""
    if op_name(node) == "py.getitem" and node.args[1] == 0 and base_name(node.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return node if base_name(node) == "dropout" and argument(node, 2, "train") is not False else None


def name_axes(anchor: Anchor, solved: Solved, weights: Index, key: Expr, out: Index) -> Solved | Miss:
    """Complete ``solved`` by atoms: one per axis of the weights, in which the result is written too."""
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
        elif (whole is not None and (whole[1] == ZERO or not whole[0])) or _is_strided(x):
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
    solved.weights, solved.key, solved.by_out = tuple(named), key, by_out
    solved.out = tuple(E.substitute(x, by_out) for x in out)
    solved.v = At(solved.v.node, tuple(E.substitute(x, by_out) for x in solved.v.index))
    return solved


def _is_strided(x: Expr) -> bool:
    """Say whether the axis is read at every n-th position, from some position on."""
    monomials = [mono for mono, _ in E.terms(x) if mono]
    return len(monomials) == 1 and len(monomials[0]) == 1 and monomials[0][0].op == "index"


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
