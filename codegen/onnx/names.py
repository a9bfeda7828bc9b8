"""Name inputs, outputs and dynamic sizes of an exported model as a user would.

Inputs keep the names of the forward's parameters, outputs get the keys of the output structure
(``last_hidden_state``), sizes are ``batch`` and ``sequence`` where they are the first two axes of an input.
A cache of (key, value) pairs is named as such files are: ``past_key_values.0.key``, ``present.0.value``, with
``past_sequence`` positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc.printer import parse

if TYPE_CHECKING:
    import onnx_ir as ir

CACHES = ("past", "present")
"""How arguments and outputs begin that hold keys and values of earlier tokens."""

DimNames = Mapping[str, Mapping[int, str]]
"""Names of dynamic sizes by input name and axis."""


def is_attend(node: fx.Node) -> bool:
    """Say whether ``node`` is an attention site."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == "attnc::attend"


def input_nodes(program: ExportedProgram) -> list[fx.Node]:
    """Return the placeholders that a user feeds, in the order of the flattened call."""
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    names = [s.arg.name for s in program.graph_signature.input_specs if s.kind == kind]
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return [nodes[n] for n in names]


def input_names(program: ExportedProgram) -> list[str]:
    """Return the name of each input, in the order of ``input_nodes``.

    That is the placeholder's, and for the layers of a cache ``past_key_values.0.key``.
    """
    nodes, spec = input_nodes(program), program.call_spec.in_spec
    paths = _paths(spec) if spec is not None else []
    if len(paths) != len(nodes):
        return [n.name for n in nodes]
    out = []
    for node, (_, first, *rest) in zip(nodes, paths, strict=True):
        head = node.name.removesuffix("_" + "_".join(rest)) if rest else first
        out.append(_cache_name((head, *rest)) or node.name)
    return out


def _cache_name(path: Sequence[str]) -> str | None:
    """Return the name of a tensor in a list of (key, value) pairs that is called past or present.

    A layer may have several pairs by name: ``past_key_values.0.encoder.key``.
    """
    if len(path) < 3 or not path[0].startswith(CACHES) or not path[1].isdigit():
        return None
    *way, last = path
    return ".".join([*way, {"0": "key", "1": "value"}.get(last, last)])


def output_names(program: ExportedProgram) -> list[str]:
    """Return one name per tensor that the program gives back, from the keys of its output structure."""
    spec = program.call_spec.out_spec
    kind = torch.export.graph_signature.OutputKind.USER_OUTPUT
    specs = [s for s in program.graph_signature.output_specs if s.kind == kind]
    found = _paths(spec) if spec is not None else []
    paths = [_cache_name(p) or "_".join(p) or "output" for p in found]
    if len(paths) != len(specs):
        paths = [f"output_{i}" for i in range(len(specs))]
    constant = torch.export.graph_signature.ConstantArgument
    kept = [p for p, s in zip(paths, specs, strict=True) if not isinstance(s.arg, constant)]
    return [p if p[0].isalpha() else f"output_{p}" for p in kept]


def _paths(spec: Any) -> list[tuple[str, ...]]:
    """Return the way to each leaf of a pytree: keys, fields or positions."""
    if spec.is_leaf():
        return [()]
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    keys = _keys(spec, len(children))
    return [(k, *rest) for k, child in zip(keys, children, strict=True) for rest in _paths(child)]


def _keys(spec: Any, count: int) -> list[str]:
    context = spec.context
    if isinstance(context, type) and hasattr(context, "_fields"):
        return list(context._fields)
    for part in (context, *(context if isinstance(context, (list, tuple)) else ())):
        if isinstance(part, (list, tuple)) and len(part) == count and all(isinstance(k, str) for k in part):
            return list(part)
    return [str(i) for i in range(count)]


def rename_inputs(model: ir.Model, program: ExportedProgram) -> None:
    """Give the graph's inputs the names of the program's; an output may have taken one."""
    named = zip(input_nodes(program), input_names(program), strict=True)
    names = [name for node, name in named if isinstance(node.meta.get("val"), torch.Tensor)]
    inner = {v.name: v for n in model.graph for v in n.outputs}
    for value, name in zip(model.graph.inputs, names, strict=True):
        if value.name != name and name in inner:
            inner[name].name = f"{name}_inner"
        value.name = name


def rename_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give the graph's outputs their names; a value that has one of them already is renamed first.

    An output that shares its name with an input gets ``_out`` at its end.
    """
    taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    wanted: list[str] = []
    for name in names:
        while name in taken:
            name += "_out"
        wanted.append(name)
        taken.add(name)
    inner = {v.name: v for n in model.graph for v in n.outputs}
    for value, name in zip(model.graph.outputs, wanted, strict=True):
        if name in inner and inner[name] is not value:
            inner[name].name = f"{name}_inner"
    for value, name in zip(model.graph.outputs, wanted, strict=True):
        value.name = name


def size_names(program: ExportedProgram, given: DimNames | None) -> dict[str, str]:
    """Return a name for each symbolic size of the inputs.

    Sizes that an attend node proves equal (a validity row has the keys' length) share one.
    """
    classes = _equal_sizes(program)
    out: dict[str, str] = {}
    for node, shown in zip(input_nodes(program), input_names(program), strict=True):
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            symbol = str(size)
            if not isinstance(size, torch.SymInt) or not symbol.isidentifier():
                continue
            first = classes.get(symbol, symbol)
            name = (given or {}).get(shown, {}).get(axis)
            if name is not None:
                out[first] = name
            elif first not in out:
                out[first] = _fresh(shown, axis, set(out.values()))
            out[symbol] = out[first]
    return out


def _fresh(name: str, axis: int, taken: set[str]) -> str:
    plain = {0: "batch", 1: "sequence"}.get(axis, f"{name}_dim{axis}")
    if axis == 2 and name.endswith((".key", ".value")):
        plain = "encoder_past_sequence" if ".encoder." in name else "past_sequence"
    return plain if plain not in taken else f"{name}_{plain}"


def _equal_sizes(program: ExportedProgram) -> dict[str, str]:
    """Map each symbol to the first one that it must equal, by the axes of all operands of attend nodes."""
    parent: dict[str, str] = {}

    def find(x: str) -> str:
        while x in parent:
            x = parent[x]
        return x

    for node in program.graph.nodes:
        if not is_attend(node):
            continue
        for a, b in _pairs(node):
            a, b = find(a), find(b)
            if a != b:
                parent[max(a, b, key=_order)] = min(a, b, key=_order)
    return {x: find(x) for x in parent}


def _order(symbol: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", symbol)
    return int(digits or 0), symbol


def _pairs(node: fx.Node) -> list[tuple[str, str]]:
    """Return pairs of symbols on axes of the same meaning."""
    q, k, v, captured, text = node.args
    assert isinstance(text, str), "the schema of attnc::attend ends with a text"
    assert isinstance(captured, Sequence), "the captured tensors of attnc::attend are a list"
    spec, at, out = parse(text), dict[str, str](), []
    shown: list[tuple[str, Any]] = [
        ("bhqd", q),
        ("b.kd", k),
        ("b.k.", v),
        *((o.axes, c) for o, c in zip(spec.captured, captured, strict=True)),
    ]
    for axes, x in shown:
        shape = x.meta["val"].shape
        for axis, size in zip(axes[len(axes) - len(shape) :], shape, strict=True):
            symbol = str(size)
            if axis == "." or not isinstance(size, torch.SymInt) or not symbol.isidentifier():
                continue
            out.append((at.setdefault(axis, symbol), symbol))
    return [(a, b) for a, b in out if a != b]


def rename_sizes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace symbols in the shapes of all values, expressions such as ``2*s77`` included.

    A size that torch proved to be a number, and wrote as a symbol called ``8``, becomes that number.
    """
    import onnx_ir as ir

    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names))) + r")\b") if names else None

    def renamed(size: int | str | None) -> int | str | None:
        if not isinstance(size, str):
            return size
        text = pattern.sub(lambda m: names[m[1]], size) if pattern else size
        return int(text) if text.isdigit() else text

    values = [*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph for v in n.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else d.value for d in value.shape]
            value.shape = ir.Shape([renamed(d) for d in dims])
