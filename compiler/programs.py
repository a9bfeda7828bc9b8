"""Exported programs as values: copies that share tensors, and signatures that stay true after edits."""

from __future__ import annotations

import copy

from torch import fx
from torch.export import ExportedProgram


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy whose nodes have the names of the original's.

    A plain deep copy renames what Python has a builtin for: an input called ``input`` becomes ``input_1``.
    """
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        if new.name != old.name:
            copied._graph_namespace._used_names.add(old.name)
            copied._graph_namespace._obj_to_name[new] = old.name
            new.name = old.name
    return copied


def copy_program(program: ExportedProgram) -> ExportedProgram:
    """Return a program with its own graph and signature.

    Sharing all tensors and the sub-graphs of higher-order calls.
    """
    copied = ExportedProgram(
        root=program.graph_module,
        graph=copy_graph(program.graph),
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )
    copied.graph_module.meta.update(program.graph_module.meta)
    return copied


def fix_outputs(program: ExportedProgram) -> None:
    """Make the signature name the nodes that the graph returns now.

    Callers recompile before they run the program.
    """
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    returned = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name
