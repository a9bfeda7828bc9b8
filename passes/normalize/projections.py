"""Give q, k and v projections of their own where one linear layer makes all three.

Layers with a joint weight part its product by views, as timm's ``qkv`` does.  Which rows of the weight make
which operand follows from the views' index maps, however they are written.  Runtimes fuse projections that
stand apart, and a product with a part of the weight needs no change of layout behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc import expr as E
from attnc.editing import Builder
from attnc.expr import ONE, ZERO
from attnc.passes.detect.graph import shape
from attnc.passes.detect.views import At, stepped
from attnc.programs import copy_program

aten = torch.ops.aten
_AXES = "bhsd"


@dataclass(frozen=True, slots=True)
class _Part:
    """An operand ``[B, H, S, D]`` that is the columns from ``first`` of a linear layer's output.

    ``views`` are the nodes between the two, the layer among them.
    """

    layer: fx.Node
    first: int
    heads: int
    size: int
    views: frozenset[fx.Node]


def separate_projections(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with three linear layers before each attend node whose operands one layer makes.

    Only where nothing else reads that layer, which then goes: no product is computed twice.
    """
    copied = copy_program(program)
    graph, changed = copied.graph, False
    builder = Builder(graph)
    for node in [n for n in graph.nodes if n.target is torch.ops.attnc.attend.default]:
        parts = [_part(x) for x in node.args[:3]]
        found = [p for p in parts if p is not None]
        if len(found) == 3 and len({p.layer for p in found}) == 1 and _read_by(node, found):
            node.args = (*(_projection(builder.before(node), p) for p in found), *node.args[3:])
            changed = True
    if not changed:
        return program
    graph.eliminate_dead_code()
    copied.graph_module.recompile()
    return copied


def _part(operand: fx.Node) -> _Part | None:
    """Follow the views behind an operand to a linear layer."""
    sizes = shape(operand)
    if len(sizes) != 4:
        return None
    index = tuple(ZERO if n == ONE else E.index(a, n) for a, n in zip(_AXES, sizes, strict=True))
    batch, head, position, feature = index
    heads, size = E.as_int(sizes[1]), E.as_int(sizes[3])
    at, views = At(operand, index), [operand]
    while at.node.target is not aten.linear.default:
        step = stepped(at)
        if step is None or step[1]:
            return None
        at = step[0]
        views.append(at.node)
    if heads is None or size is None or at.index[:-1] != (batch, position):
        return None
    column = E.sub(at.index[-1], E.add(E.mul(E.integer(size), head), feature))
    first = E.as_int(column)
    return None if first is None else _Part(at.node, first, heads, size, frozenset(views))


def _read_by(attend: fx.Node, parts: list[_Part]) -> bool:
    """Say whether the layer and its views are read by this attend node alone."""
    inside = frozenset((attend,)).union(*(p.views for p in parts))

    def stays(user: fx.Node) -> bool:  # a call with several results stands between a view and its parts
        return user in inside or (bool(user.users) and all(u in inside for u in user.users))

    return all(stays(user) for node in inside - {attend} for user in node.users)


def _projection(b: Builder, part: _Part) -> fx.Node:
    """Write the operand as a linear layer of its own, with heads in front."""
    x, weight, *bias = part.layer.args
    end = part.first + part.heads * part.size
    rows = [b.call(aten.slice.Tensor, t, 0, part.first, end) for t in (weight, *bias) if t is not None]
    y = b.call(aten.linear.default, x, *rows)
    parted = b.call(aten.unflatten.int, y, -1, [part.heads, part.size])
    return b.call(aten.transpose.int, parted, 1, 2)
