"""Write the opaque nodes of a converted model, tidy the result, and say in the file what was done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.builder import OURS, Builder, torch_dtype
from attnc.codegen.onnx.guarded import Functions, Shared
from attnc.codegen.onnx.linear import LinearForm, lower_linear
from attnc.codegen.onnx.lower import Written, lower
from attnc.codegen.onnx.repairs import repair
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import Row
from attnc.codegen.onnx.translate import ATTEND, LINEAR

if TYPE_CHECKING:
    import onnx_ir as ir


def assemble(
    base: ir.Model,
    calls: Sequence[Call],
    rows: Sequence[Row | None],
    form: LinearForm | None,
    opset: int,
    *,
    inline: bool,
) -> tuple[ir.Model, list[Written]]:
    """Return a copy of ``base`` with every site written as its row says.

    A row of None means basic operators, in a function unless ``inline``.
    """
    model = base.clone()
    shared: Shared = {}
    functions: Functions = {}
    stored: dict[str, ir.Value] = {}
    written: list[Written] = []
    for i, node in enumerate(list(model.graph)):
        if node.domain != OURS:
            continue
        b = Builder(f"site_{len(written)}" if node.op_type == ATTEND else f"linear_{i}")
        if node.op_type == ATTEND:
            call = calls[node.attributes["site"].as_int()]
            inputs = [x for x in node.inputs if x is not None]
            taken = None if inline else functions
            done = lower(b, call, rows[call.index], inputs, shared, taken, opset)
            written.append(done)
            _replace(model.graph, node, b, [done.out, done.lse])
        else:
            assert node.op_type == LINEAR, f"unknown operator {node.op_type}"
            assert form is not None, "the caller chose a form for a program with integer linears"
            out = lower_linear(b, form, node.inputs, torch_dtype(node.outputs[0]) or torch.float32, stored)
            _replace(model.graph, node, b, [out])
    for value in stored.values():
        model.graph.register_initializer(value)
    for function in functions.values():
        model.functions[function.identifier()] = function
    tidy(model)
    return model, written


def _replace(graph: ir.Graph, node: ir.Node, b: Builder, results: Sequence[ir.Value | None]) -> None:
    graph.insert_before(node, b.nodes)
    for old, new in zip(node.outputs, results, strict=True):
        if new is None:
            assert not old.uses(), "a site whose log-sum-exp is used is written as basic operators"
            continue
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def tidy(model: ir.Model) -> None:
    """Cancel pairs of layout changes, drop what nothing uses, and clear all text that names sources."""
    import onnx_ir.passes.common as passes

    repair(model.graph)
    _cancel_layouts(model.graph)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.OutputFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    used = {n.domain for n in model.graph} | {d for f in model.functions.values() for d in f.opset_imports}
    for domain in [d for d in model.opset_imports if d and d not in used]:
        del model.opset_imports[domain]
    for domain in sorted(used):
        model.opset_imports.setdefault(domain, 1)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in _values(model):
        value.metadata_props.clear()


def _values(model: ir.Model) -> list[ir.Value]:
    graph = model.graph
    return [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]


def _cancel_layouts(graph: ir.Graph) -> None:
    """Make ``Reshape(Transpose(Transpose(Reshape(x))))`` into ``x`` where the shapes known say it is."""
    for node in graph:
        if node.domain == "" and node.op_type in ("Transpose", "Reshape") and node.inputs[0] is not None:
            out = node.outputs[0]
            same = _before_transposes(node) if node.op_type == "Transpose" else _before_reshapes(node)
            if same is not None and not out.is_graph_output():
                out.replace_all_uses_with(same)


def _before_transposes(node: ir.Node) -> ir.Value | None:
    first = node.inputs[0].producer() if node.inputs[0] is not None else None
    if first is None or first.domain != "" or first.op_type != "Transpose":
        return None
    one, two = (n.attributes["perm"].as_ints() for n in (first, node))
    return first.inputs[0] if [one[i] for i in two] == sorted(one) else None


def _before_reshapes(node: ir.Node) -> ir.Value | None:
    first = node.inputs[0].producer() if node.inputs[0] is not None else None
    if first is None or first.domain != "" or first.op_type != "Reshape" or first.inputs[0] is None:
        return None
    a, b = first.inputs[0].shape, node.outputs[0].shape
    if a is None or b is None or len(a) != len(b):
        return None
    same = all(_known(x) is not None and _known(x) == _known(y) for x, y in zip(a, b, strict=True))
    return first.inputs[0] if same else None


def _known(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value


def sign(model: ir.Model, target: str, opset: int, facts: Mapping[str, Any]) -> None:
    """Write into the file's metadata who made it, for which target, and ``facts`` as sorted JSON."""
    model.producer_name, model.producer_version = "attnc", version("attnc")
    model.domain, model.doc_string, model.model_version = None, None, None
    entries = {"attnc.version": version("attnc"), "attnc.target": target, "attnc.opset": str(opset)}
    entries |= {f"attnc.{k}": json.dumps(v, sort_keys=True) for k, v in facts.items()}
    model.metadata_props.update(sorted(entries.items()))
