"""Put rewritten sites into an ONNX graph in place of what computed them, and touch nothing else.

The nodes of a site go if nothing uses them any more; every other node, initializer and name stays as it is,
in its place.  The value that a site computes keeps its name.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.builder import MICROSOFT, OURS, Builder
from attnc.codegen.onnx.emission import Emission
from attnc.codegen.onnx.guarded import Functions
from attnc.codegen.onnx.lower import Written, lower
from attnc.codegen.onnx.names import is_attend
from attnc.codegen.onnx.reading import Reading
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import Row
from attnc.editing import Builder as Editor
from attnc.sizes import dim

if TYPE_CHECKING:
    import onnx_ir as ir

LEAST_IR = 8
"""The first version of the format in which a file may have functions of its own."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A site, the node that computed it before, the node that does now, and its normalizer before.

    ``stays`` says that the normalizer is read elsewhere and is computed as before.
    """

    site: str
    old: str
    new: str
    anchor: str
    stays: bool


@dataclass(frozen=True, slots=True)
class Sized:
    """A node of the file that reads the shape of a value that goes, and the sizes that it gives."""

    reader: ir.Node
    sizes: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Spliced:
    """The new model, what each attend node became, and the sites whose normalizer is still computed."""

    model: ir.Model
    written: list[Written]
    alive: tuple[Replaced, ...]


class _Copy:
    """A copy of the model, with the counterparts of the original's values and nodes."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        graph = self.model.graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
        self._values = {v.name: v for v in values}
        self._nodes = dict(zip(map(id, model.graph), graph, strict=True))

    def value(self, value: ir.Value) -> ir.Value:
        return self._values[value.name]

    def node(self, node: ir.Node) -> ir.Node:
        return self._nodes[id(node)]


def splice(
    model: ir.Model,
    reading: Reading,
    graph: fx.Graph,
    calls: Sequence[Call],
    rows: Sequence[Row | None],
    replaced: Sequence[Replaced],
    sized: Iterable[Sized] = (),
) -> Spliced:
    """Return a copy of ``model`` in which the sites of ``graph`` are written as their rows say.

    ``graph`` is the edited copy of ``reading.graph``; ``calls`` are its attend nodes in order, ``rows`` what
    each becomes (None: a function of basic operators).
    """
    copied = _Copy(model)
    opset = model.opset_imports[""]
    functions: Functions = {}
    prefix = _prefix(model)
    emission = Emission(
        Builder(prefix),
        {name: copied.value(v) for name, v in reading.links.items()},
        {name: (copied.value(v), i) for name, (v, i) in reading.sizes.items()},
        reading.names,
    )
    untold = _tell(reading, emission)
    places = {r.site: copied.node(reading.origins[r.old]) for r in replaced}
    new = [n for n in graph.nodes if n.op == "call_function" and n.name not in _names(reading.graph)]
    written = _write(copied.model.graph, new, places, emission, calls, rows, functions, opset)
    for value in untold:
        value.shape = None
    roots = [_rename(copied.model.graph, emission, r) for r in replaced]
    roots += [_resize(copied, emission, s, f"{prefix}_size{i}") for i, s in enumerate(sized)]
    gone = _remove_dead(copied.model.graph, roots)
    _declare(copied.model, functions, opset)
    alive = [r for r in replaced if not r.stays and copied.node(reading.origins[r.anchor]) not in gone]
    return Spliced(copied.model, written, tuple(alive))


def _tell(reading: Reading, emission: Emission) -> list[ir.Value]:
    """Let values whose shape the file leaves out have it while sites are written; return these values."""
    untold = []
    for node in reading.graph.nodes:
        value = emission.values.get(node.name)
        if value is not None and value.shape is None and hasattr(node.meta.get("val"), "shape"):
            value.shape = emission.shape(node.meta["val"])
            untold.append(value)
    return untold


def _prefix(model: ir.Model) -> str:
    """Return how new names begin: no name of the file begins so."""
    names = {n.name for n in model.graph} | {v.name for n in model.graph for v in n.outputs}
    names |= {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    prefix, i = "attnc", 0
    while any(n is not None and n.startswith(prefix) for n in names):
        i += 1
        prefix = f"attnc{i}"
    return prefix


def _names(graph: fx.Graph) -> set[str]:
    return {n.name for n in graph.nodes}


def _site_of(node: fx.Node) -> str:
    """Return the site for which a rewrite made the node."""
    return str((node.meta.get("attnc") or {}).get("match"))


def _write(
    graph: ir.Graph,
    new: Sequence[fx.Node],
    places: Mapping[str, ir.Node],
    emission: Emission,
    calls: Sequence[Call],
    rows: Sequence[Row | None],
    functions: Functions,
    opset: int,
) -> list[Written]:
    """Write the new nodes, each before the file's node that computed the site for which it was made."""
    sites = dict(zip(filter(is_attend, new), calls, strict=True))
    made: dict[str, Written] = {}
    shared: dict[Any, Any] = {}
    prefix = emission.b.prefix
    for site, nodes in itertools.groupby(new, _site_of):
        emission.b = Builder(f"{prefix}_{len(emission.values)}")
        for node in nodes:
            if is_attend(node):
                q, k, v, captured, _ = node.args
                inputs = [emission.value(x) for x in (q, k, v, *captured)]  # type: ignore[misc]
                row = rows[sites[node].index]
                made[node.name] = lower(emission.b, sites[node], row, inputs, shared, functions, opset)
            elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
                emission.values[node.name] = made[node.args[0].name].out
            elif isinstance(node.meta["val"], torch.Tensor):
                emission.write(node)
        if emission.b.nodes:
            graph.insert_before(places[site], emission.b.nodes)
    return list(made.values())


def _rename(graph: ir.Graph, emission: Emission, r: Replaced) -> ir.Node:
    """Let the new value of a site take the place and the name of the old one; return who made the old one."""
    old, new = emission.values[r.old], emission.values[r.new]
    producer = old.producer()
    assert producer is not None, "a site's output is computed"
    if new.name is None or not new.name.startswith(emission.b.prefix.partition("_")[0]):
        b = Builder(f"{emission.b.prefix}_copy_{r.new}")  # a value that has a name already: of another site
        source = new.producer()
        new = b.op("Identity", new)
        if source is None:
            graph.insert_before(producer, b.nodes)
        else:
            graph.insert_after(source, b.nodes)
    name = old.name
    old.name, new.name = f"{new.name}_before", name
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    emission.values[r.old] = new
    return producer


def _resize(copied: _Copy, emission: Emission, s: Sized, prefix: str) -> ir.Node:
    """Let the sizes that a node reads off a value that goes be computed without it."""
    reader = copied.node(s.reader)
    emission.b, emission.sizes = Builder(prefix), {}
    sizes = emission.vector(s.sizes)
    copied.model.graph.insert_before(reader, emission.b.nodes)
    reader.outputs[0].replace_all_uses_with(sizes, replace_graph_outputs=True)
    return reader


def _remove_dead(graph: ir.Graph, roots: Sequence[ir.Node]) -> set[ir.Node]:
    """Remove nodes that nothing uses, from ``roots`` backwards, and constants that only they used."""
    gone: set[ir.Node] = set()
    stack = list(roots)
    constants: list[ir.Value] = []
    while stack:
        node = stack.pop()
        if node in gone or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        gone.add(node)
        before = [v for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        for value in before:
            producer = value.producer()
            if producer is not None:
                stack.append(producer)
            elif value.is_initializer():
                constants.append(value)
    for value in constants:
        if not value.uses() and not value.is_graph_output() and value not in graph.inputs:
            graph.initializers.pop(value.name or "", None)
    return gone


def _declare(model: ir.Model, functions: Functions, opset: int) -> None:
    """Declare the domains that new nodes are in, and the functions that they call."""
    used = {n.domain for n in model.graph}
    for domain in (MICROSOFT, OURS):
        if domain in used:
            model.opset_imports.setdefault(domain, 1)
    for function in functions.values():
        model.functions[function.identifier()] = function
    if functions and model.ir_version < LEAST_IR:
        model.ir_version = LEAST_IR


def sized_elsewhere(reading: Reading, graph: fx.Graph) -> list[Sized]:
    """Return how the shapes of values that are gone from ``graph`` are computed where the file reads them."""
    alive = {n.name: n for n in graph.nodes}
    lost = [(reader, name) for reader, name in reading.shape_readers if name not in alive]
    if not lost:
        return []
    before = {n.name: n for n in reading.graph.nodes}
    build, out = Editor(graph), list[Sized]()
    following = _following(reading, alive)
    for reader, name in lost:
        sizes = list(before[name].meta["val"].shape)
        start, end = (reader.attributes.get(k) for k in ("start", "end"))
        part = slice(start.as_int() if start else None, end.as_int() if end else None)
        wanted = [dim(n) for n in sizes[part]]
        build.before(following[name])
        if reader.op_type == "Shape" and all(build.knows(n) for n in wanted):
            out.append(Sized(reader, [build.size(n) for n in wanted]))
    return out


def _following(reading: Reading, alive: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """Return for each node of the graph that was read the next one that is still there."""
    out: dict[str, fx.Node] = {}
    at = alive["output"]
    for node in reversed(reading.graph.nodes):
        at = alive.get(node.name, at)
        out[node.name] = at
    return out
