"""What detection knows of a site beyond its Match: how to build every operand from the user's graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnc.expr import Expr, loads
from attnc.ir import AttentionSpec, Match
from attnc.passes.detect.layout import Recipe


@dataclass(frozen=True, slots=True)
class Computed:
    """A captured operand that is a symbolic predicate: a bool tensor of ``value``, one axis per role.

    ``axes`` lists, per canonical axis, the atoms (index generators) of that axis; an empty group is an axis
    of size 1. ``leaves`` maps each tensor that is loaded to how its elements are indexed (already in
    ``value``).
    """

    value: Expr
    axes: tuple[tuple[Expr, ...], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The nodes whose elements the condition loads."""
        return tuple(e.args[0] for e in loads(self.value))


@dataclass(frozen=True, slots=True)
class Joined:
    """An operand that comes in pieces: its parts, one behind the other along canonical axis ``axis``.

    Parts broadcast against one another along the other axes.  A part None is zeros, as long as the same part
    of ``beside``.
    """

    parts: tuple[Recipe | Computed | None, ...]
    axis: int
    beside: Joined | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The nodes that the parts are made from."""
        return tuple(n for p in self.parts if p is not None for n in p.reads)


Making = Recipe | Computed | Joined
"""How a canonical tensor is made from nodes of the user's graph."""


@dataclass(frozen=True, slots=True)
class Term:
    """One attention of a sum, times ``number`` and ``gates``, tensors that broadcast to ``[B, H, Sq, 1]``."""

    spec: AttentionSpec
    operands: Mapping[str, Making]
    captured: Mapping[str, Making]
    number: float = 1.0
    gates: tuple[Recipe, ...] = ()


@dataclass(frozen=True, slots=True)
class Flat:
    """The sum of all values, times ``number`` and ``gates``, as in ``Term``."""

    values: Making
    number: float = 1.0
    gates: tuple[Recipe, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A match and its recipes, all in names of the working graph.

    ``operands`` has q, k, v; ``captured`` one entry per ``match.spec.captured``; ``result`` turns the
    canonical output into the value of ``match.output``. ``fused`` says that the user's graph already calls a
    fused op here, ``improves`` that the spec knows more than that call.  With ``terms`` the output is their
    sum, and spec, operands and captured are those of the first; ``flats`` are added to it.  ``others`` are
    the anchors of further normalizers that the site stands for: the turns of a loop, or the terms of a sum.
    """

    match: Match
    operands: Mapping[str, Making]
    captured: Mapping[str, Making]
    result: Recipe
    anchor: str
    fused: bool = False
    improves: bool = False
    terms: tuple[Term, ...] = ()
    flats: tuple[Flat, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def makings(self) -> tuple[Making, ...]:
        """How every tensor is made that the rewritten site reads."""
        out = [*self.operands.values(), *self.captured.values()]
        for t in self.terms:
            out += [*t.operands.values(), *t.captured.values(), *t.gates]
        out += [x for f in self.flats for x in (f.values, *f.gates)]
        return tuple(out)
