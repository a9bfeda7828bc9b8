"""Name what feeds the queries and keys of a site: rotary embeddings and norms.

A name is for the report.  It never changes what is rewritten, and what is not proven has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import ONE, Expr
from attnc.passes.analyze.operands.norms import norm_at
from attnc.passes.analyze.operands.place import FEATURE, feature_of, place
from attnc.passes.analyze.operands.products import products
from attnc.passes.analyze.operands.rotation import Rotation, rotation
from attnc.passes.analyze.operands.slots import slots, varying
from attnc.passes.analyze.operands.tables import Tables, read
from attnc.passes.analyze.operands.values import Values
from attnc.passes.analyze.operands.wording import wording
from attnc.passes.detect import Env, Found
from attnc.passes.detect.found import Joined, Making
from attnc.passes.detect.graph import shape
from attnc.passes.detect.layout import Recipe
from attnc.passes.detect.pull import OverBudgetError
from attnc.passes.detect.views import At

__all__ = ["Namer"]

ROUNDS = 4
"""Norms and rotations that are named one behind the other."""
LENGTH = 2
"""Axis of the positions in a canonical operand."""
LIMIT = 600
"""Elements that are visited on the way back to what an operand is made from."""


@dataclass
class Namer:
    """Name operands of sites of one working graph; what repeats from layer to layer is read once.

    ``tensors`` names the inputs that are parameters, buffers or constants, as for ``detect``.
    """

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor | None]
    _known: dict[Any, tuple[At | None, str, tuple[str, ...]] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.values = Values(self.graph, self.tensors, LIMIT)
        self.tables = Tables(Env(self.tensors, frozenset(self.tensors)), self.nodes, self.tensors)

    def names(self, found: Found) -> dict[str, str]:
        """Return a text for q and for k, such as ``rms-norm, rope(half)``; none for one without a name."""
        texts = {n: self._text(found.operands[n]) for n in ("q", "k")}
        return {n: text for n, text in texts.items() if text}

    def _text(self, making: Making) -> str:
        """Return the name of an operand; one that comes in pieces has the name that all pieces have."""
        if isinstance(making, Joined) and making.axis == LENGTH:
            texts = {self._text(p) if p is not None else "" for p in making.parts}
            return texts.pop() if len(texts) == 1 else ""
        return self._name(making) if isinstance(making, Recipe) else ""

    def _name(self, recipe: Recipe) -> str:
        at = place(recipe, self.nodes[recipe.source])
        words: list[str] = []
        for _ in range(ROUNDS):
            if at is None or (feature := feature_of(at)) is None or E.as_int(feature.args[1]) is None:
                break
            at, word = self._step(at, feature)
            if word:
                words.insert(0, word)
        return ", ".join(words)

    def _step(self, at: At, feature: Expr) -> tuple[At | None, str]:
        """Return what an element is made from, and the name of what was done to it ('' for a gain)."""
        norm = norm_at(at)
        if norm is not None:
            return norm.of, norm.name
        try:
            e = self.values.value(at.node, at.index)
        except OverBudgetError:
            return None, ""
        size = E.as_int(feature.args[1])
        assert size is not None, "the caller has checked it"
        turned = self._turned(e, feature, size)
        if turned is not None:
            return turned
        alone = products(e, self.tables.is_table)
        source = self.tables.source(alone[0]) if alone is not None and len(alone) == 1 else None
        load = read(source) if source is not None else None
        behind = None if load is None else At(self.nodes[load.args[0]], load.args[1])
        return (None if behind is None or behind.node is at.node else behind), ""

    def _turned(self, e: Expr, feature: Expr, size: int) -> tuple[At | None, str] | None:
        """Return what was rotated, and the rotation's name.

        Layers differ in the names of their data and weights only, so each such family is looked at once.
        """
        if e.op == "load":
            return None
        names: dict[str, int] = {}
        key = slots((e, feature.args[1]), lambda name: self._family(name, names))
        if key not in self._known:
            found = rotation(e, feature, size, self.tables)
            self._known[key] = None if found is None else (self._source(found), wording(found), tuple(names))
        known = self._known[key]
        if known is None:
            return None
        at, text, first = known
        if at is None or tuple(names) == first:
            return at, text
        if E.loads(E.call("index", *at.index)):
            return None, text
        here = dict(zip(first, names, strict=True)).get(at.node.name, at.node.name)
        return At(self.nodes[here], at.index), text

    def _family(self, name: str, names: dict[str, int]) -> str:
        """Return a tensor's name, or a number in order of appearance for data and for weights."""
        node = self.nodes[name]
        if name in self.tensors:
            t = self.tensors[name]
            kind = "" if t is not None and not t.requires_grad else "w"
        else:
            kind = "" if node.op == "placeholder" or self.tables.env.pure(node) else "x"
        return f"{kind}{names.setdefault(name, len(names))}" if kind else name

    def _source(self, r: Rotation) -> At | None:
        return self._common([x for p in r.pairs for x in p.sources] + list(r.plain))

    def _common(self, sources: list[Expr]) -> At | None:
        """Return the one tensor that all sources are elements of, indexed by a feature of its own."""
        loads = [read(s) for s in sources]
        if any(x is None for x in loads) or len({slots(x)[0] for x in loads}) != 1:
            return None
        rows = [slots(x)[1] for x in loads]
        columns = varying(rows)
        first = loads[0]
        assert first is not None, "no source is None"
        if len(columns) != 1:
            return None
        places = sorted({int(row[columns[0]]) for row in rows})
        if places != list(range(places[0], places[0] + len(sources))):
            return None
        feature = E.index(FEATURE, E.integer(len(places)))
        moving = [
            i for i, x in enumerate(first.args[1]) if any(x != y.args[1][i] for y in loads if y is not None)
        ]
        if len(moving) != 1:
            return None
        axis = moving[0]
        lowest = next(x for x, row in zip(loads, rows, strict=True) if row[columns[0]] == places[0])
        assert lowest is not None, "no source is None"
        node = self.nodes[first.args[0]]
        index = tuple(E.add(x, feature) if i == axis else x for i, x in enumerate(lowest.args[1]))
        return At(node, index) if shape(node)[axis] != ONE else None
