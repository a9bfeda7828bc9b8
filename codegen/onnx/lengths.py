"""Find the lengths of a past in a program, and the sizes at which its file must be run because of them.

A past is an input that the program puts before new values, along an axis whose size is free, and gives back:
``present = cat([past, new])``.  A prompt has a past of length 0 and every later step mostly one new position;
torch.export assumes all free sizes to be at least 2, so what it wrote has to be run at both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from attnc.codegen.onnx.names import input_names, input_nodes
from attnc.errors import CodegenError
from attnc.programs import copy_program

_RESHAPES = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)


def write_known_sizes(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with the number for each -1 in a reshape that stands for a fixed size.

    ONNX, as torch, cannot tell what -1 is where another size is 0.
    """
    copied = copy_program(program)
    for node in copied.graph.nodes:
        if node.target in _RESHAPES:
            sizes, value = list(node.args[1]), node.meta["val"]
            known = [
                int(v) if n == -1 and isinstance(v, int) else n
                for n, v in zip(sizes, value.shape, strict=True)
            ]
            node.args = (node.args[0], known)
    copied.graph_module.recompile()
    return copied


def past_lengths(program: ExportedProgram) -> dict[Any, Any]:
    """Return the symbol of each past length with that of the new values' length, None if it is fixed."""
    inputs, out = set(input_nodes(program)), dict[Any, Any]()
    specs = program.graph_signature.output_specs
    given = {s.arg.name for s in specs if s.kind is OutputKind.USER_OUTPUT and hasattr(s.arg, "name")}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.cat.default and node.name in given:
            found = _past_and_new(node, inputs)
            if found is not None:
                out[found[0]] = found[1]
    return out


def _past_and_new(node: fx.Node, inputs: set[fx.Node]) -> tuple[Any, Any] | None:
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not isinstance(axis, int):
        return None
    past, new = parts
    if not isinstance(past, fx.Node) or not isinstance(new, fx.Node) or past not in inputs:
        return None
    before, after = (_symbol(x.meta["val"].shape[axis]) for x in (past, new))
    return None if before is None else (before, after)


def _symbol(size: Any) -> Any:
    """Return a size's symbol if it is one and nothing more."""
    expr = size.node.expr if isinstance(size, torch.SymInt) else None
    return expr if expr is not None and expr.is_symbol else None


def check_free(program: ExportedProgram) -> None:
    """Refuse a program with a cache (pairs called past) whose lengths are not free.

    Raises:
        CodegenError: the past, or the new tokens, have a fixed length, so that the file would serve no other.
    """
    named = zip(input_nodes(program), input_names(program), strict=True)
    pasts = [n.meta["val"].shape[-2] for n, name in named if name.endswith((".key", ".value"))]
    found = past_lengths(program)
    if not pasts or None in found.values() or any(_symbol(size) not in found for size in pasts):
        known = ", ".join(f"{p} with {n} after it" for p, n in found.items()) or "none"
        raise CodegenError(
            "ONNX export: expected a past and new tokens of any length, so that one file serves the prompt "
            f"and every step; the past is {', '.join(sorted({str(p) for p in pasts}))} long, free are {known}"
            "\n  try: look into the report's warnings for what fixed a size"
        )


def edges(program: ExportedProgram, sizes: Mapping[Any, int]) -> Iterator[dict[Any, int]]:
    """Yield the sizes to run besides ``sizes`` because a past may be empty and a step one position long.

    Yields: an empty past; the same with all else 1; one new position; one of all but the past; and one new
    position with nothing new for a past that nothing else grows with, as an encoder's states in later steps.
    """
    pasts = past_lengths(program)
    if not pasts:
        return
    new = {n for n in pasts.values() if n is not None}
    idle = new - _shown(program)
    empty = dict.fromkeys(pasts, 0)
    step = dict.fromkeys(new, 1)
    single = {s: 1 for s in sizes if s not in pasts}
    later = step | dict.fromkeys(idle, 0) if idle and idle != new else {}
    for change in (empty, single | empty, step, single, later):
        if change:
            yield dict(sizes) | change


def _shown(program: ExportedProgram) -> set[Any]:
    """Return the symbols in the sizes of outputs that are no longer past."""
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    inputs = set(input_nodes(program))
    found: set[Any] = set()
    for node in output.all_input_nodes:
        grown = node.target is torch.ops.aten.cat.default and _past_and_new(node, inputs) is not None
        value = node.meta.get("val")
        if not grown and isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    found |= size.node.expr.free_symbols
    return found
