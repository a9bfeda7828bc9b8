"""Read a whole ONNX graph; see the package."""

from __future__ import annotations

import ast
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnc.codegen.onnx.reading import elementwise, layers, layout
from attnc.codegen.onnx.reading.inference import inferred
from attnc.codegen.onnx.reading.known import FROM_SHAPE, KNOWN_RULES
from attnc.codegen.onnx.reading.reader import KNOWN, Entry, Items, Reader, UnreadError
from attnc.codegen.onnx.reading.symbols import Equal, EqualSizesError, Symbols
from attnc.codegen.onnx.reading.tensors import torch_type
from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("attnc.codegen")

RULES = elementwise.RULES | layout.RULES | layers.RULES
_SCOPES = 4096
"""Characters of an exporter's list of scopes that are looked at."""
_MOST_EQUAL = 64
"""Pairs of sizes that may turn out to be equal before a graph counts as unreadable."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An ONNX graph as the detector reads it.

    Attributes:
        graph: calls on fake tensors; its inputs are those of the file, and its constants.
        tensors: names of nodes that are constants, with their values (None for large ones).
        links: names of nodes to the values of the file that they are.
        origins: names of nodes to the nodes of the file that made them.
        sizes: names of nodes that are symbolic sizes, to a value of the file and the element that it is.
        shape_readers: nodes of the file that read the shape of a value and no element, with its node's name.
        names: symbols to the names that the file has for the sizes.
        equal: sizes that must be a number or a multiple, or equal to another size, for the graph to run.
        assumed: what else was taken for granted of sizes, in words.
        unread: operators that are not read, how many there are of each, and why.
    """

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor | None]
    links: Mapping[str, ir.Value]
    origins: Mapping[str, ir.Node]
    sizes: Mapping[str, tuple[ir.Value, int]]
    shape_readers: Sequence[tuple[ir.Node, str]]
    names: Mapping[str, str]
    equal: Mapping[str, Equal]
    assumed: tuple[str, ...]
    unread: Mapping[str, tuple[int, str]]


def read(model: ir.Model) -> Reading:
    """Read the graph of ``model``, which stays as it is.

    Raises:
        CodegenError: an input has no type or rank, or sizes contradict one another.
    """
    noisy = logging.getLogger("torch._subclasses.fake_tensor")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)  # it reports each rule that torch refuses as an error
    try:
        return _read_again(model)
    finally:
        noisy.setLevel(level)


def _read_again(model: ir.Model) -> Reading:
    """Read, and read again with what turned out on the way: sizes that are equal, nodes not to be run."""
    equal: dict[str, Equal] = {}
    refused: set[int] = set()
    for _ in range(_MOST_EQUAL):
        try:
            return _read(model, equal, refused)
        except _FixedSizeError as e:
            refused.add(e.place)
        except EqualSizesError as e:
            if e.name == e.other or e.name in equal:
                break
            equal[e.name] = e.other
    raise CodegenError(f"ONNX: too many sizes of the graph must be equal to read it: {equal}")


class _FixedSizeError(Exception):
    """Running a node on fake tensors took a free size for a number: it must not be run so."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def _read(model: ir.Model, equal: Mapping[str, Equal], refused: Collection[int]) -> Reading:
    r = Reader(Symbols(_fixed_sizes(model), equal), model.opset_imports.get("", 1))
    unread: dict[str, list[str]] = {}
    shape_readers: list[tuple[ir.Node, str]] = []
    for value in model.graph.inputs:
        r.entries[value] = entry = _input(r, value)
        if value.name in model.graph.initializers and entry.node is not None:
            r.tensors[entry.node.name] = None  # a weight, whose values a caller may replace
    for value in model.graph.initializers.values():
        if value.const_value is not None and value not in r.entries:
            _keep(r, value, r.constant(value.const_value, value, value.name or "constant"))
    for place, node in enumerate(model.graph):
        r.at, r.meta = node, _place(node)
        before = r.symbols.fixed()
        why = _node(r, node, may_run=place not in refused)
        if r.symbols.fixed() > before:
            raise _FixedSizeError(place)
        if why is not None:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            unread.setdefault(name, []).append(why)
        if node.op_type in FROM_SHAPE and node.domain == "" and node.inputs[0] is not None:
            source = r.entries.get(node.inputs[0])
            if source is not None and source.node is not None:
                shape_readers.append((node, source.node.name))
    outputs = [
        e.node for v in model.graph.outputs if (e := r.entries.get(v)) is not None and e.node is not None
    ]
    r.graph.output(tuple(outputs))
    return Reading(
        r.graph,
        r.tensors,
        r.links,
        r.origins,
        r.sizes,
        shape_readers,
        r.symbols.names,
        dict(equal),
        tuple(r.symbols.assumed),
        {name: (len(whys), Counter(whys).most_common(1)[0][0]) for name, whys in unread.items()},
    )


def _fixed_sizes(model: ir.Model) -> set[int]:
    """Return every number that is a size somewhere in the graph."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    return {n for v in values if v.shape is not None for n in v.shape if isinstance(n, int)}


def _input(r: Reader, value: ir.Value) -> Entry:
    dtype = torch_type(value.dtype)
    if dtype is None or value.shape is None:
        what = "no shape" if value.shape is None else f"the type {value.dtype}"
        raise CodegenError(
            f"ONNX: expected input {value.name!r} to have a number of axes and a type of torch, found "
            f"{what}; give it one, with sizes by name where they vary"
        )
    try:
        val = r.fake([r.symbols.of(n) for n in value.shape], dtype)
    except UnreadError as e:
        raise CodegenError(f"ONNX: expected input {value.name!r} to have the sizes of a tensor: {e}") from e
    node = r.placeholder(value.name or "input", val)
    r.links[node.name] = value
    return Entry(node, None, dtype, value)


def _keep(r: Reader, value: ir.Value, entry: Entry | None) -> None:
    if entry is not None:
        r.entries[value] = entry


def _node(r: Reader, n: ir.Node, *, may_run: bool = True) -> str | None:
    """Read one node; return why it stays opaque, None if it was read."""
    if n.op_type == "Constant" and n.domain == "":
        value = n.outputs[0]
        tensor = _constant_of(n)
        _keep(r, value, None if tensor is None else r.constant(tensor, value, value.name or "constant"))
        return None
    why = "it is not in the standard domain" if n.domain else "there is no rule for it"
    why = why if may_run else "torch runs it for one size alone"
    rules = RULES if n.domain == "" else layers.OF_RUNTIME if n.domain == "com.microsoft" else {}
    if rules and may_run:
        try:
            if (n.domain == "" and _known(r, n)) or _by_rule(r, n, rules.get(n.op_type)):
                return None
        except EqualSizesError:
            raise
        except UnreadError as e:
            why = str(e)
        except Exception as e:  # torch refuses what a rule made of it; the node is left alone
            why = " ".join(f"{type(e).__name__}: {e}".split())[:160]
            log.info("%s %s is not read: %s", n.op_type, n.name, why)
    _opaque(r, n)
    return why


def _constant_of(n: ir.Node) -> ir.TensorProtocol | None:
    import onnx_ir as ir

    found = next(iter(n.attributes.values()), None)
    if found is None:
        return None
    if found.name == "value":
        return found.as_tensor()
    if found.name in ("value_int", "value_ints"):
        return ir.tensor(found.value, dtype=ir.DataType.INT64)
    if found.name in ("value_float", "value_floats"):
        return ir.tensor(found.value, dtype=ir.DataType.FLOAT)
    return None


def _known(r: Reader, n: ir.Node) -> bool:
    """Work a node out element by element; say whether that could be done."""
    rule = KNOWN_RULES.get(n.op_type)
    if rule is None:
        return False
    entries = [None if v is None else r.entries.get(v) for v in n.inputs]
    if n.op_type not in FROM_SHAPE and any(
        v is not None and (e is None or e.items is None) for v, e in zip(n.inputs, entries, strict=True)
    ):
        return False
    if n.op_type in FROM_SHAPE and (entries[0] is None or not _has_shape(entries[0])):
        return False
    try:
        found = rule(r, n, [None if e is None else e.items for e in entries])
    except UnreadError:  # not element by element; there may be a rule for the whole
        return False
    if found is None:
        return False
    parts: list[Items] = found if isinstance(found, list) else [found]
    if any(x.size > KNOWN for x in parts):
        return False
    for value, items in zip(n.outputs, parts, strict=False):
        r.entries[value] = Entry(None, items, _type_of(n, value, entries), value)
    return True


def _has_shape(e: Entry) -> bool:
    return e.node is None or isinstance(e.node.meta.get("val"), torch.Tensor)


def _type_of(n: ir.Node, value: ir.Value, entries: Sequence[Entry | None]) -> torch.dtype:
    if n.op_type in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"):
        return torch.bool
    if n.op_type == "Cast":
        import onnx_ir as ir

        return torch_type(ir.DataType(n.attributes["to"].as_int())) or torch.int64
    if n.op_type in FROM_SHAPE:
        return torch.int64
    if n.op_type == "ConstantOfShape":
        return torch_type(n.attributes["value"].as_tensor().dtype) or torch.int64
    source = entries[1] if n.op_type == "Where" else entries[0]
    return torch.int64 if source is None else source.dtype


def _by_rule(r: Reader, n: ir.Node, rule: layers.Rule | None) -> bool:
    if rule is None:
        return False
    made = rule(r, n)
    nodes = made if isinstance(made, list) else [made]
    if len(nodes) < len([v for v in n.outputs if v.uses() or v.is_graph_output()]):
        raise UnreadError("it has more outputs than are read")
    for value, node in zip(n.outputs, nodes, strict=False):
        r.entries[value] = r.made(node, value)
        if r.origins.get(node.name) is n:
            r.links.setdefault(node.name, value)
    return True


def _opaque(r: Reader, n: ir.Node) -> None:
    """Put an opaque call in the node's place, with the shapes that the file says its outputs have."""
    inputs = [e.node for v in _reads(n) if (e := r.entries.get(v)) is not None and e.node is not None]
    told = all(v.dtype is not None and v.shape is not None for v in n.outputs)
    guessed = {} if told or n.domain else inferred(r, n)
    for value in n.outputs:
        dtype, val = torch_type(value.dtype), guessed.get(value.name or "")
        if dtype is not None and value.shape is not None:
            try:
                val = r.fake([r.symbols.of(m) for m in value.shape], dtype)
            except (UnreadError, RuntimeError) as e:  # too many axes, or negative at the hints of its symbols
                log.info("%s: its shape has no example: %s", value.name, e)
        elif val is not None:
            dtype = val.dtype
        node = r.opaque(inputs, val)
        r.entries[value] = Entry(node, None, dtype or torch.float32, value)
        r.links[node.name] = value


def _reads(n: ir.Node) -> list[ir.Value]:
    """Return the values that a node reads, also from inside of its own graphs."""
    out = [v for v in n.inputs if v is not None]
    for attribute in n.attributes.values():
        value = attribute.value
        bodies = (
            [value] if attribute.type.name == "GRAPH" else value if attribute.type.name == "GRAPHS" else []
        )
        for body in bodies:
            for inner in body:
                out += [v for v in _reads(inner) if v.graph is not body]
    return out


def _place(n: ir.Node) -> dict[str, Any]:
    """Return what a node's meta says of where it is: the module that the exporter wrote down, or its name."""
    name = n.name or n.op_type
    scopes = n.metadata_props.get("pkg.torch.onnx.name_scopes")
    path = name
    if scopes is not None:
        path = _module_of(scopes)
    elif "/" in name:
        path = ".".join(p for p in name.split("/")[:-1] if p)
    return {"nn_module_stack": {"": (path, n.op_type)}}


def _module_of(scopes: str) -> str:
    """Return the innermost module of the exporter's list of scopes, whose last entry is the value's name."""
    try:
        found = ast.literal_eval(scopes[:_SCOPES])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    modules = [s for s in found[:-1] if isinstance(s, str)] if isinstance(found, list) else []
    return modules[-1] if modules else ""
