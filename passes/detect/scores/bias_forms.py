"""Name what a tensor added to the scores is: ``form_of``, by what its value at (b, h, q, k) is made of.

``alibi``: a slope per head times a distance or a key's position (arXiv:2108.12409, section 3).
``relative``: a table, or what a layer makes of one, read at a place that depends on ``k - q`` (T5,
arXiv:1910.10683, section 2.1).  ``table``: one read at places that a constant tensor lists (Swin,
arXiv:2103.14030, section 3.2; LeViT, arXiv:2104.01136, section 4.2).  The others contract queries or keys a
second time: ``relative-shift`` (Transformer-XL, arXiv:1901.02860, appendix B), ``disentangled``
(DeBERTa, arXiv:2006.03654, section 3.1), ``decomposed-relative`` (MViTv2, arXiv:2112.01526, section 4.1),
else ``second-contraction``.

Names come from derived values only.  A value that fits none has no name, which is a correct answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.detect.contraction import contraction
from attnc.passes.detect.env import Env, step_into
from attnc.passes.detect.graph import argument, base_name, shape, tensor_of
from attnc.passes.detect.roles import Atoms
from attnc.passes.detect.views import At, Index, broadcast

DEEPEST = 4
"""Tables read through tables, and functions of functions, that are followed."""
_FUNCTIONS = frozenset(
    ("to", "_to_copy", "log", "log2", "log1p", "exp", "sqrt", "tanh", "floor", "ceil", "round")
)


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor that the value is made from, the index it is read at, and the places looked up on the way."""

    node: fx.Node
    index: Index
    places: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Axes:
    """The atoms of the heads, of a query and of a key."""

    heads: Atoms
    query: Atoms
    key: Atoms

    def follows(self, e: Expr) -> bool:
        """Say whether ``e`` varies along queries or keys."""
        return bool(set(E.indices(e)) & {*self.query, *self.key})

    def is_relative(self, e: Expr) -> bool:
        """Say whether ``e`` depends on how far the key is from the query, and on nothing else of the two."""
        if len(self.query) != 1 or len(self.key) != 1 or not set(E.indices(e)) & set(self.key):
            return False
        by = {a: E.add(E.generator(a), ONE) for a in (*self.query, *self.key)}
        return E.substitute(e, by) == e


def form_of(at: At, grid: tuple[Atoms, Atoms, Atoms, Atoms], env: Env) -> str:
    """Return the name of the bias whose element (b, h, q, k) is ``at``, '' if it has none."""
    value, axes = env.derive(at), Axes(*grid[1:])
    if value is None:
        return ""
    if _is_slope_times_distance(value, axes, at.node.graph, env):
        return "alibi"
    reads = _reads(value, env, at.node.graph)
    products = [r for r in reads if contraction(r.node) is not None and not env.pure(r.node)]
    if products:
        names = {_of_product(r, axes, env) for r in products}
        return names.pop() if len(names) == 1 else "second-contraction"
    tables = [r for r in reads if any(map(axes.follows, (*r.places, *r.index)))]
    if not tables or not all(env.pure(r.node) for r in tables):
        return ""
    return _of_tables(tables, axes, env, at.node.graph)


# ---------------------------------------------------------------- slopes


def _is_slope_times_distance(e: Expr, axes: Axes, graph: fx.Graph, env: Env) -> bool:
    """Say whether ``e`` is a product of a slope and a distance, whichever head it is asked of."""
    if e.op == "where" and not axes.follows(e.args[0]):
        return all(_is_slope_times_distance(x, axes, graph, env) for x in e.args[1:])
    if e.op != "call" or e.args[0] not in ("mul", "neg", "div"):
        return False
    if e.args[0] == "neg":
        return _is_slope_times_distance(e.args[1][0], axes, graph, env)
    a, b = e.args[1][:2]
    pairs = ((a, b), (b, a)) if e.args[0] == "mul" else ((b, a),)
    return any(
        _is_slope(s, axes, graph, env)
        and (_is_distance(x, axes, graph, env) or _is_slope_times_distance(x, axes, graph, env))
        for s, x in pairs
    )


def _is_slope(e: object, axes: Axes, graph: fx.Graph, env: Env) -> bool:
    """Say whether ``e`` is one number for each head, made of constants or parameters."""
    if not isinstance(e, Expr):
        return isinstance(e, int | float)
    fixed = all(env.pure(env.node(x.args[0], graph)) for x in E.loads(e))
    return fixed and set(E.indices(e)) <= set(axes.heads)


def _is_distance(e: object, axes: Axes, graph: fx.Graph, env: Env) -> bool:
    """Say whether ``e`` is the distance of key and query, or the key's position, by index or by cumsum."""
    if not isinstance(e, Expr) or set(E.indices(e)) & set(axes.heads) or not axes.follows(e):
        return False
    read = E.loads(e)
    if read:
        counted = any(base_name(env.node(x.args[0], graph)) == "cumsum" for x in read)
        return counted and not set(E.indices(e)) & set(axes.query)
    if axes.is_relative(e):
        return True
    used = set(E.indices(e))
    return E.is_int(e) and used <= {*axes.query, *axes.key} and bool(used & set(axes.key))


# ---------------------------------------------------------------- tables and products


def _reads(value: Expr, env: Env, graph: fx.Graph, depth: int = 0) -> list[Read]:
    """Return the tensors that a value is made from, followed through reads at computed places."""
    out: list[Read] = []
    for load in E.loads(value):
        here = At(env.node(load.args[0], graph), load.args[1])
        found = _looked_up(here, env) if depth < DEEPEST else None
        if found is None:
            out.append(Read(here.node, here.index))
            continue
        source, places = found
        inner = env.derive(source)
        below = [Read(source.node, source.index)] if inner is None else _reads(inner, env, graph, depth + 1)
        out += [Read(r.node, r.index, (*places, *r.places)) for r in below]
    return out


def _looked_up(at: At, env: Env) -> tuple[At, tuple[Expr, ...]] | None:
    """Return the element of the tensor that is read at computed places, and these; None for any other op.

    The computed places are fresh atoms in the element's index.
    """
    node, name = at.node, base_name(at.node)
    if name == "embedding":
        return _rows(node.args[0], [node.args[1]], 0, at.index, env)
    if name == "index":
        places = list(argument(node, 1, "indices"))
        first = next((i for i, x in enumerate(places) if x is not None), 0)
        while places and places[-1] is None:
            places.pop()
        return None if None in places[first:] else _rows(node.args[0], places[first:], first, at.index, env)
    if name not in ("gather", "index_select"):
        return None
    src, d, place = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    if not isinstance(d, int) or not at.index:
        return None
    d %= len(at.index)
    key = env.derive(At(place, at.index if name == "gather" else (at.index[d],)))
    fresh = E.index(f"looked{node.name}", shape(src)[d])
    return None if key is None else (At(src, (*at.index[:d], fresh, *at.index[d + 1 :])), (key,))


def _rows(
    src: object, places: list[object], first: int, index: Index, env: Env
) -> tuple[At, tuple[Expr, ...]] | None:
    """Return what ``src[.., places, ..]`` reads, the places standing from axis ``first`` on."""
    tensors = [x for x in places if isinstance(x, fx.Node) and tensor_of(x) is not None]
    if not isinstance(src, fx.Node) or len(tensors) < len(places) or not tensors:
        return None
    if any(x.meta["val"].dtype == torch.bool for x in tensors):
        return None
    rank = max(len(shape(x)) for x in tensors)
    there = index[first : first + rank]
    keys = [env.derive(At(x, broadcast(there, x))) for x in tensors]
    fresh = tuple(E.index(f"looked{src.name}{i}", n) for i, n in enumerate(shape(src)[first:][: len(places)]))
    at = At(src, (*index[:first], *fresh, *index[first + rank :]))
    return None if None in keys else (at, tuple(k for k in keys if k is not None))


def _of_tables(tables: list[Read], axes: Axes, env: Env, graph: fx.Graph) -> str:
    places = [x for r in tables for x in (*r.places, *r.index) if axes.follows(x)]
    if all(_is_relative(x, axes, env, graph) for x in places):
        return "relative"
    looked = all(any(map(axes.follows, r.places)) for r in tables)
    constant = all(env.pure(env.node(x.args[0], graph)) for e in places for x in E.loads(e))
    return "table" if looked and constant else ""


def _is_relative(e: Expr, axes: Axes, env: Env, graph: fx.Graph, depth: int = 0) -> bool:
    """Say whether ``e`` depends on ``k - q`` only, be it through functions of one tensor (T5's logarithm)."""
    by: dict[Expr, Expr] = {}
    for load in E.loads(e):
        node = env.node(load.args[0], graph)
        if base_name(node) not in _FUNCTIONS or depth > DEEPEST:
            return False
        inner = env.derive(step_into(At(node, load.args[1]), node.args[0]))
        if inner is None or not _is_relative(inner, axes, env, graph, depth + 1):
            return False
        by[load] = E.index(f"f{len(by)}", E.size("any"))
    if not by:
        return axes.is_relative(e)
    rest = _without(e, by)
    return axes.is_relative(rest) or not axes.follows(rest)


def _without(e: Expr, by: dict[Expr, Expr]) -> Expr:
    """Return ``e`` with its loads replaced; a float's stands alone, an integer's inside of polynomials."""
    if e in by:
        return by[e]
    if e.op == "call":
        return E.call(e.args[0], *(_without(a, by) if isinstance(a, Expr) else a for a in e.args[1]))
    return E.substitute(e, by)


def _of_product(r: Read, axes: Axes, env: Env) -> str:
    """Name a second contraction by how its result is read."""
    if any(map(axes.is_relative, r.places)):
        return "disentangled"
    if any(map(axes.is_relative, r.index)) or _is_skewed(r.index, axes):
        return "relative-shift"
    keys = [x for x in r.index if set(E.indices(x)) & set(axes.key)]
    parts = [g for x in keys for g in E.walk(x) if g.op in ("floordiv", "mod")]
    if not r.places and len(keys) == 1 and parts and set(E.indices(keys[0])) == set(axes.key):
        return "decomposed-relative"
    return "second-contraction"


def _is_skewed(index: Index, axes: Axes) -> bool:
    """Say whether row ``p // n`` and column ``p % n`` are read with ``p = (n - 1) * q + k + c``.

    In rows of n columns that is column ``k - q + c`` of row q: pad, reshape and cut off.
    """
    if len(axes.query) != 1 or len(axes.key) != 1:
        return False
    q, k = axes.query[0], axes.key[0]
    rows = [g.args for x in index if (g := E.only_generator(x)) is not None and g.op == "floordiv"]
    columns = [g.args for x in index for g in E.walk(x) if g.op == "mod"]
    for p, n in rows:
        rest = E.sub(E.sub(p, E.mul(E.sub(n, ONE), E.generator(q))), E.generator(k))
        if (p, n) in columns and not {q, k} & set(E.indices(rest)) and rest != ZERO:
            return True
    return False
