"""Check the graphs of an ONNX model: every name has one maker, which comes first; attributes hold their type.

A graph is a list of nodes in an order in which they can run.  A subgraph, held by an attribute, sees the
names made so far around it.  A function sees its own names alone.
Source: ONNX, Intermediate Representation: Graphs, Names within a graph, Functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnc.codegen.onnx.opening.payload import AXES, type_name
from attnc.codegen.onnx.opening.wire import SHOWN, quoted
from attnc.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

ATTRIBUTES: Mapping[str, str] = {
    "FLOAT": "f",
    "INT": "i",
    "STRING": "s",
    "TENSOR": "t",
    "GRAPH": "g",
    "TYPE_PROTO": "tp",
    "FLOATS": "floats",
    "INTS": "ints",
    "STRINGS": "strings",
    "TENSORS": "tensors",
    "GRAPHS": "graphs",
    "TYPE_PROTOS": "type_protos",
    "SPARSE_TENSOR": "sparse_tensor",
    "SPARSE_TENSORS": "sparse_tensors",
}
"""The field that holds an attribute of each type."""
STEPS = 5
ELEMENTS = 2**48
"""No computer holds a tensor of more elements; sizes above overflow where they are multiplied."""
NAME = 256
PARENTHESES, POWERS = 50, 4
_POWER = re.compile(r"\*\*(?!\d(?!\d|\*\*))")


@dataclass(slots=True)
class _Level:
    """One graph on the way in: the names that can be read now, and what makes the others later."""

    visible: set[str]
    makers: dict[str, int]
    nodes: Sequence[onnx.NodeProto] = field(default=())


def check_graph(
    graph: onnx.GraphProto,
    where: str = "",
    outer: tuple[_Level, ...] = (),
    declared: frozenset[str] | None = None,
) -> None:
    """Check one graph and those inside it.

    ``declared`` names the attributes of the function that it lies in, None outside of functions.

    Raises:
        CheckpointError: names made twice or never, nodes out of order or in a circle, bad attributes.
    """
    for info in (*graph.input, *graph.output, *graph.value_info):
        check_type(info.type, f"{where}value {quoted(info.name)}")
    if graph.sparse_initializer:
        raise CheckpointError(
            f"{where}expected dense initializers, found sparse ones, which attnc does not read"
        )
    inputs = [i.name for i in graph.input]
    stored = [t.name for t in graph.initializer]
    for names, what in ((inputs, "inputs"), (stored, "initializers")):
        _check_once(names, f"{where}{what}")
    check_nodes(graph.node, {*inputs, *stored}, [o.name for o in graph.output], where, outer, declared)


def check_nodes(
    nodes: Sequence[onnx.NodeProto],
    given: set[str],
    results: Sequence[str],
    where: str,
    outer: tuple[_Level, ...] = (),
    declared: frozenset[str] | None = None,
) -> None:
    """Check a list of nodes that starts with the names ``given`` and has to make ``results``.

    Raises:
        CheckpointError: as ``check_graph``.
    """
    level = _Level(set(given), {}, nodes)
    for i, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in given or name in level.makers:
                raise CheckpointError(
                    f"{where}expected one maker of the value {quoted(name)}, found two; the second is "
                    f"{label(node, i)}"
                )
            level.makers[name] = i
    levels = (*outer, level)
    for i, node in enumerate(nodes):
        if not node.op_type:
            raise CheckpointError(f"{where}{label(node, i)}: expected an operator, found none")
        for name in filter(None, node.input):
            _check_made(name, levels, f"{where}{label(node, i)}")
        _check_attributes(node.attribute, f"{where}{label(node, i)}: ", levels, declared)
        level.visible.update(filter(None, node.output))
    for name in results:
        if not name or not any(name in at.visible for at in levels):
            raise CheckpointError(
                f"{where}expected something to make the output {quoted(name)}, found nothing"
            )


def _check_made(name: str, levels: tuple[_Level, ...], reader: str) -> None:
    """Check that a name is made before it is read, searching from the innermost graph outwards."""
    for level in reversed(levels):
        if name in level.visible:
            return
        if name in level.makers:
            circle = _circle(level)
            if circle:
                raise CheckpointError(f"expected a graph without circles, found {' -> '.join(circle)}")
            maker = label(level.nodes[level.makers[name]], level.makers[name])
            raise CheckpointError(
                f"{reader} reads {quoted(name)} before {maker} makes it; expected the nodes in an order in "
                "which they can run"
            )
    raise CheckpointError(f"{reader} reads {quoted(name)}, which nothing makes")


def _circle(level: _Level) -> list[str]:
    """Return the nodes of a circle in one graph, first and last the same, or nothing."""
    needs = [{level.makers[name] for name in reads(node) if name in level.makers} for node in level.nodes]
    users: dict[int, list[int]] = {}
    for i, before in enumerate(needs):
        for j in before:
            users.setdefault(j, []).append(i)
    open_, ready = [len(n) for n in needs], [i for i, n in enumerate(needs) if not n]
    for i in ready:  # grows while it is walked
        for j in users.get(i, ()):
            open_[j] -= 1
            if not open_[j]:
                ready.append(j)
    left = set(range(len(needs))) - set(ready)
    if not left:
        return []
    at, way = min(left), dict[int, None]()
    while at not in way:
        way[at] = None
        at = min(needs[at] & left)
    circle = list(way)[list(way).index(at) :][::-1]
    shown = [label(level.nodes[i], i) for i in (circle[-1], *circle)]
    return shown if len(shown) <= STEPS else [*shown[: STEPS - 2], "...", shown[-1]]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Give every name that a node or a graph inside it reads, those made inside included."""
    pending = [node]
    while pending:
        node = pending.pop()
        yield from filter(None, node.input)
        for graph in subgraphs(node.attribute):
            yield from (o.name for o in graph.output)
            pending.extend(graph.node)


def subgraphs(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    """Give the graphs that attributes hold, not those inside them."""
    for a in attributes:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def _check_attributes(
    attributes: Sequence[onnx.AttributeProto],
    where: str,
    levels: tuple[_Level, ...] = (),
    declared: frozenset[str] | None = None,
) -> None:
    _check_once([a.name for a in attributes], f"{where}attributes")
    for a in attributes:
        what = f"{where}attribute {quoted(a.name)}: "
        if a.ref_attr_name:
            if declared is None or a.ref_attr_name not in declared:
                raise CheckpointError(
                    f"{what}expected a function that declares {quoted(a.ref_attr_name)}, found none"
                )
            if a.type in (a.GRAPH, a.GRAPHS):
                raise CheckpointError(f"{what}expected a graph of its own, found a reference to one")
            continue
        check_attribute(a, what)
        for graph in subgraphs((a,)):
            check_graph(graph, what, levels, declared)


def check_attribute(a: onnx.AttributeProto, where: str) -> None:
    """Check that an attribute holds a value of the type that it says, and no other.

    Raises:
        CheckpointError: it does not.
    """
    kind = a.AttributeType.Name(a.type)
    if kind not in ATTRIBUTES:
        raise CheckpointError(f"{where}expected a type, found none")
    if kind.startswith("SPARSE"):
        raise CheckpointError(
            f"{where}expected a dense value, found a sparse tensor, which attnc does not read"
        )
    filled = [name for name in ATTRIBUTES.values() if _is_set(a, name)]
    if filled not in ([], [ATTRIBUTES[kind]]) or (kind in ("TENSOR", "GRAPH", "TYPE_PROTO") and not filled):
        raise CheckpointError(f"{where}expected a value of type {kind} alone, found {filled or 'none'}")
    for text in a.strings:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{where}expected UTF-8 texts, found {quoted(text)}") from None
    for t in (a.tp,) if kind == "TYPE_PROTO" else a.type_protos:
        check_type(t, where)


def _is_set(a: onnx.AttributeProto, name: str) -> bool:
    value: Any = getattr(a, name)
    return bool(len(value)) if name.endswith("s") and name != "s" else a.HasField(name)


def check_type(t: onnx.TypeProto, where: str) -> None:
    """Check a type that is given; none at all is no error here.

    Raises:
        CheckpointError: an unknown element type, a map, or a size that is negative or no name.
    """
    inside = False
    while t.WhichOneof("value") in ("sequence_type", "optional_type"):
        t = t.sequence_type.elem_type if t.HasField("sequence_type") else t.optional_type.elem_type
        inside = True
    if t.HasField("map_type") or t.HasField("opaque_type"):
        raise CheckpointError(f"{where}: expected a tensor, found a map or an opaque type")
    tensor: Any = t.sparse_tensor_type if t.HasField("sparse_tensor_type") else t.tensor_type
    if inside and not tensor.HasField("elem_type"):
        raise CheckpointError(f"{where}: expected the type of what the sequence holds, found none")
    if tensor.HasField("elem_type") and tensor.elem_type and type_name(tensor.elem_type) is None:
        raise CheckpointError(f"{where}: expected an element type, found number {tensor.elem_type}")
    dims = tensor.shape.dim
    if len(dims) > AXES:
        raise CheckpointError(f"{where}: expected at most {AXES} axes, found {len(dims)}")
    if math.prod(d.dim_value for d in dims if d.dim_value > 0) > ELEMENTS:
        found = quoted([d.dim_value for d in dims])
        raise CheckpointError(f"{where}: expected at most {ELEMENTS:.0e} elements, found sizes {found}")
    for axis, dim in enumerate(dims):
        if dim.HasField("dim_value") and dim.dim_value < 0:
            raise CheckpointError(
                f"{where}, axis {axis}: expected a size >= 0 or a name, found {dim.dim_value}; give it a "
                "name where it varies"
            )
        if not _is_size(dim.dim_param):
            raise CheckpointError(
                f"{where}, axis {axis}: expected a name of a size, found {quoted(dim.dim_param)}"
            )


def _is_size(name: str) -> bool:
    """Say whether who reads a size's name as an expression comes to an end: no towers, no deep nesting."""
    if len(name) > NAME or name.count("(") > PARENTHESES or name.count("**") > POWERS:
        return False
    return "**" not in name or not _POWER.search(name.replace(" ", ""))


def _check_once(names: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise CheckpointError(f"{where}: expected names, found an empty one")
        if name in seen:
            raise CheckpointError(f"{where}: expected each name once, found {quoted(name)} twice")
        seen.add(name)


def label(node: onnx.NodeProto, at: int) -> str:
    """Name a node for a reader."""
    operator = (
        node.op_type if node.op_type.isprintable() and len(node.op_type) <= SHOWN else quoted(node.op_type)
    )
    return f"node {quoted(node.name)} ({operator})" if node.name else f"node {at} ({operator})"
