"""Weights that are combined after the softmax: ``(a - t * b) @ v`` is ``a @ v - t * (b @ v)``.

The value contraction is linear in the weights, so a sum of weights with factors that do not change along the
keys is as many attentions, scaled and added: differential attention (arXiv:2410.05258, section 2.1), and
weights gated per head or per query.  ``(a + c) @ v`` is ``a @ v + c * sum(v)`` where ``c`` does not change
along the keys either (affine-scaled attention; forms/dense_variants, section 4.3).  A factor that does
belongs to the values and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO
from attnc.ir import Miss
from attnc.passes.detect.contraction import Contraction, contractions_of
from attnc.passes.detect.env import Env, step_into
from attnc.passes.detect.graph import argument, base_name, is_float_cast, shape, tensor_of, users
from attnc.passes.detect.norms.anchor import Anchor
from attnc.passes.detect.norms.elementwise import zeroes
from attnc.passes.detect.scores.fill import condition_mask
from attnc.passes.detect.sites import Skeleton, score_side
from attnc.passes.detect.solve import Solved, name_axes
from attnc.passes.detect.views import At, stepped

_LINEAR = frozenset({"add", "sub", "mul", "div", "neg", "where", "masked_fill"})
_FAR = 40
"""Nodes that are looked at between a normalizer and the values."""


@dataclass(frozen=True, slots=True)
class Factor:
    """What one attention is multiplied by: a number, and elements of tensors.

    ``zeroed`` says where weights are set to zero: the element of a condition, and whether a true one keeps.
    """

    number: float = 1.0
    places: tuple[At, ...] = ()
    zeroed: tuple[At, bool] | None = None


@dataclass
class Combination:
    """Attentions over one value contraction; their sum, each times its factor and gates, is the output.

    ``flats`` are what the sum of all values is multiplied by and added.
    """

    parts: tuple[Skeleton, ...]
    factors: tuple[float, ...]
    flats: tuple[Factor, ...] = ()

    @property
    def anchor(self) -> Anchor:
        """The first normalizer."""
        return self.parts[0].anchor

    @property
    def interior(self) -> list[fx.Node]:
        """The nodes of all parts."""
        return [n for s in self.parts for n in s.interior]


def combinations(anchors: Iterable[Anchor], env: Env) -> list[Combination | Miss]:
    """Return the combinations that the weights of ``anchors`` go into, and what is nearly one."""
    known = {a.weights: a for a in anchors if a.denominator is None and env.carries(a.scores)}
    contractions: dict[fx.Node, Contraction] = {}
    for weights in known:
        for c in _reached(weights):
            contractions.setdefault(c.node, c)
    found = (_read(c, known, env) for c in contractions.values())
    return [x for x in found if x is not None]


def _reached(weights: fx.Node) -> list[Contraction]:
    """Return the contractions behind linear ops, views and casts of the weights."""
    out: list[Contraction] = []
    stack, seen = [weights], {weights}
    while stack and len(seen) < _FAR:
        node = stack.pop()
        for u in users(node):
            found = [c for c in contractions_of(u) if c.lhs is node or c.rhs is node]
            out += found
            if not found and u not in seen and (base_name(u) in _LINEAR or _passes(u)):
                seen.add(u)
                stack.append(u)
    return out


def _passes(node: fx.Node) -> bool:
    at = At(node, tuple(ZERO for _ in shape(node))) if tensor_of(node) is not None else None
    return at is not None and (stepped(at) is not None or is_float_cast(node))


@dataclass(frozen=True, slots=True)
class _Addend:
    """One attention's weights, where they are read, their factor, and the nodes passed."""

    at: At
    factor: Factor
    passed: tuple[fx.Node, ...]


def _read(c: Contraction, known: Mapping[fx.Node, Anchor], env: Env) -> Combination | Miss | None:
    if c.base is not None or c.alpha != 1.0 or c.lhs is c.rhs:
        return None
    out = tuple(ZERO if n == ONE else E.index(f"o{i}", n) for i, n in enumerate(shape(c.node)))
    lhs, rhs, fresh = c.operands(out, "t")
    read, v = _addends(lhs, known, env), rhs
    if not read or not read[0]:
        read, v = _addends(rhs, known, env), lhs
    if not read or not read[0]:
        return None
    addends, flats = read
    name = addends[0].at.node.name
    if len({x.at for x in addends}) < len(addends):
        return Miss("weights-edited", name, "one softmax is added to itself before the values")
    summed = frozenset(g for x in fresh.values() if (g := E.only_index(x)) is not None)
    parts: list[Skeleton] = []
    for f in (*(x.factor for x in addends), *flats):
        if any(summed & set(E.indices(i)) for at in f.places for i in at.index):
            why = "the weights are multiplied by a tensor that changes along the keys"
            return Miss("weights-gated-by-key", name, why)
    for x in addends:
        solved = _solved(c, x, known[x.at.node], v, out, summed)
        made = solved if isinstance(solved, Miss) else _part(x, known[x.at.node], solved, env)
        if isinstance(made, Miss):
            return made
        if not parts and isinstance(solved, Solved):
            flats = [replace(f, places=_named(f.places, solved)) for f in flats]
        parts.append(made)
    return Combination(tuple(parts), tuple(x.factor.number for x in addends), tuple(flats))


def _solved(
    c: Contraction, x: _Addend, anchor: Anchor, v: At, out: tuple[E.Expr, ...], summed: frozenset[E.Expr]
) -> Solved | Miss:
    key = x.at.index[anchor.dim]
    if set(E.indices(key)) != summed or E.only_index(key) is None:
        why = "the value contraction does not sum exactly the normalized axis"
        return Miss("keys-not-summed", anchor.weights.name, why)
    return name_axes(anchor, Solved(c, (), ZERO, (), v, list(x.passed)), x.at.index, key, out)


def _named(places: Iterable[At], solved: Solved) -> tuple[At, ...]:
    """Return places with the result's axes in the atoms of the weights."""
    return tuple(At(at.node, tuple(E.substitute(i, solved.by_out) for i in at.index)) for at in places)


def _part(x: _Addend, anchor: Anchor, solved: Solved, env: Env) -> Skeleton | Miss:
    side = score_side(anchor, env, solved)
    if isinstance(side, Miss):
        return side
    side.gates = _named(x.factor.places, solved)
    if x.factor.zeroed is not None:
        at, keeps = x.factor.zeroed
        side.zeroed = condition_mask(_named((at,), solved)[0], keeps, env)
    side.trail.append("combined" if x.factor != Factor(1.0, (), x.factor.zeroed) else "zeroed-weights")
    return side


def _addends(p: At, known: Mapping[fx.Node, Anchor], env: Env) -> tuple[list[_Addend], list[Factor]] | None:
    """Write an element as a sum of weights with factors, and of tensors that are no weights."""
    out: list[_Addend] = []
    flats: list[Factor] = []
    stack = [_Addend(p, Factor(), ())]
    while stack:
        x = stack.pop()
        if x.at.node in known:
            out.append(x)
            continue
        if not _leads(x.at.node, known):
            if env.carries(x.at.node) or x.factor.zeroed is not None:
                return None
            flats.append(replace(x.factor, places=(*x.factor.places, x.at)))
            continue
        plus = _plus_number(x, env)
        if plus is not None:
            stack.append(plus[0])
            flats.append(plus[1])
            continue
        below = _below(x, known, env)
        if below is None or len(stack) + len(out) > _FAR:
            return None
        stack += reversed(below)
    return out, flats


def _below(x: _Addend, known: Mapping[fx.Node, Anchor], env: Env) -> list[_Addend] | None:
    """Return what an element is the sum of, one op down."""
    at, node = x.at, x.at.node
    passed = (*x.passed, node)
    step = stepped(at)
    if step is not None:
        return [_Addend(step[0], x.factor, passed)]
    if is_float_cast(node):
        return [_Addend(step_into(at, node.args[0]), x.factor, passed)]
    name = base_name(node)
    if name == "neg":
        return [_Addend(step_into(at, node.args[0]), _times(x.factor, -1.0), passed)]
    if name in ("add", "sub") and argument(node, 2, "alpha", 1) == 1:
        a, b = node.args[:2]
        if not (_is_tensor(a) and _is_tensor(b)):
            return None
        second = _times(x.factor, -1.0) if name == "sub" else x.factor
        return [_Addend(step_into(at, a), x.factor, passed), _Addend(step_into(at, b), second, passed)]
    zeroed = zeroes(node, env)
    if zeroed is not None and x.factor.zeroed is None:
        factor = replace(x.factor, zeroed=(step_into(at, zeroed[1]), zeroed[2]))
        return [_Addend(step_into(at, zeroed[0]), factor, passed)]
    if name not in ("mul", "div") or node.kwargs.get("rounding_mode"):
        return None
    return _scaled(x, passed, known, env)


def _plus_number(x: _Addend, env: Env) -> tuple[_Addend, Factor] | None:
    """Return the tensor and the number that an element is the sum of, None if it is no such sum."""
    node = x.at.node
    if base_name(node) not in ("add", "sub") or argument(node, 2, "alpha", 1) != 1:
        return None
    tensor, other = node.args[:2]
    if not _is_tensor(tensor):
        tensor, other = other, tensor
    number = env.scalar(other)
    if number is None or not _is_tensor(tensor) or x.factor.zeroed is not None:
        return None
    subtracted = base_name(node) == "sub"
    if subtracted and tensor is not node.args[0]:
        return None
    below = _Addend(step_into(x.at, tensor), x.factor, (*x.passed, node))
    return below, _times(x.factor, -number if subtracted else number)


def _scaled(
    x: _Addend, passed: tuple[fx.Node, ...], known: Mapping[fx.Node, Anchor], env: Env
) -> list[_Addend] | None:
    node, name = x.at.node, base_name(x.at.node)
    a, b = node.args[:2]
    for weights, other in ((a, b), (b, a)):
        if not _is_tensor(weights) or not _leads(weights, known) or (name == "div" and weights is b):
            continue
        number = env.scalar(other)
        if number is not None and (name == "mul" or number != 0):
            factor = _times(x.factor, number if name == "mul" else 1.0 / number)
        elif name == "mul" and _is_tensor(other):
            factor = replace(x.factor, places=(*x.factor.places, step_into(x.at, other)))
        else:
            return None
        return [_Addend(step_into(x.at, weights), factor, passed)]
    return None


def _times(f: Factor, number: float) -> Factor:
    return replace(f, number=f.number * number)


def _is_tensor(x: object) -> bool:
    return isinstance(x, fx.Node) and tensor_of(x) is not None


def _leads(node: object, known: Mapping[fx.Node, Anchor]) -> bool:
    """Say whether weights are among what the node is made of by linear ops and views."""
    stack, seen = [node], {node}
    while stack and len(seen) < _FAR:
        n = stack.pop()
        if n in known:
            return True
        assert isinstance(n, fx.Node), "only nodes are looked at"
        if base_name(n) in _LINEAR or _passes(n):
            above = [x for x in n.all_input_nodes if _is_tensor(x) and x not in seen]
            seen.update(above)
            stack += above
    return False
