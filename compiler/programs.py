"""Exported programs as values: copies that share tensors, and signatures that stay true after edits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from attnc.capture.alias import bypass, hidden_writes, writes
from attnc.errors import CaptureError


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


def is_functional(program: ExportedProgram) -> bool:
    """Say whether the program writes nothing in place and has no bodies of higher-order calls."""
    higher = torch._ops.HigherOrderOperator
    return not any(isinstance(n.target, higher) or writes(n) for n in program.graph.nodes)


def functional_program(program: ExportedProgram) -> ExportedProgram:
    """Return a program that writes nothing in place and has the bodies of higher-order calls in line.

    Raises:
        CaptureError: the program writes to what may be a view of something else, which torch loses track of.
    """
    with quiet():
        functional: ExportedProgram = safe_to_functionalize(program).run_decompositions({})
    return functional


def safe_to_functionalize(program: ExportedProgram) -> ExportedProgram:
    """Return the program, or a copy without dropouts through which functionalization would lose a write.

    Raises:
        CaptureError: as for ``functional_program``.
    """
    if any(hidden_writes(program.graph)):
        program = copy_program(program)
        dropouts, others = hidden_writes(program.graph)
        if others:
            raise CaptureError(
                f"capture: {others[0].name} may return a view of its input, which the model then writes to\n"
                f"  expected: a write that torch can follow; found one through {others[0].target}\n"
                "  try: write it without the in-place operation"
            )
        bypass(dropouts)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's own FutureWarnings and DeprecationWarnings, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def fix_outputs(program: ExportedProgram) -> None:
    """Make the signature name the nodes that the graph returns now.

    Callers recompile before they run the program.
    """
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    returned = output.args[0] if isinstance(output.args[0], list | tuple) else (output.args[0],)
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name


def placeholder_values(program: ExportedProgram, inputs: Any = None) -> dict[str, Any] | None:
    """Return the values of a program's inputs by placeholder name.

    Its weights, and the example inputs if there are any.
    """
    inputs = program.example_inputs if inputs is None else inputs
    if inputs is None:
        return None
    leaves = iter(pytree.tree_leaves(inputs))
    out: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            out[name] = next(leaves)
        elif spec.target in program.state_dict:
            out[name] = program.state_dict[spec.target]
        elif spec.target in program.constants:
            out[name] = program.constants[spec.target]
    return out
