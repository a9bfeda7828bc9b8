"""What torch's exporter has no translation for, or one that does not run, translated or written otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc.editing import Builder
from attnc.programs import copy_program, fix_outputs

aten = torch.ops.aten
_GROUPED = (("transformers", "grouped_mm_fallback"), ("aten", "_grouped_mm"))


def reworded(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` with ``c - x`` of a number c as ``-x + c``, which is the same in every bit.

    The exporter's type promotion (torch 2.13) fails on ``aten.rsub`` where x holds integers and c is none.
    """
    if not any(_is_reversed_difference(n) for n in program.graph.nodes):
        return program
    copied = copy_program(program)
    graph = copied.graph
    builder = Builder(graph)
    for node in [n for n in graph.nodes if _is_reversed_difference(n)]:
        x, number = node.args
        minus = builder.before(node).call(aten.neg.default, x)
        node.replace_all_uses_with(builder.call(aten.add.Tensor, minus, number))
        graph.erase_node(node)
    fix_outputs(copied)
    copied.graph_module.recompile()
    return copied


def _is_reversed_difference(node: fx.Node) -> bool:
    return node.target is aten.rsub.Scalar and len(node.args) == 2 and not node.kwargs


def translations(opset: int) -> dict[Any, Any]:
    """Return torch operator -> translation for those that this process has registered."""
    found = {}
    for namespace, name in _GROUPED:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found[packet.default] = _grouped_mm(opset)
    found[torch.ops.aten.sym_numel.default] = _numel(opset)
    found[torch.ops.aten.repeat_interleave.self_int] = _repeat_interleave(opset)
    found[torch.ops.aten.squeeze.dim] = found[torch.ops.aten.squeeze.dims] = _squeeze(opset)
    return found


def _operators(opset: int) -> Any:
    """Return onnxscript's operators of ``opset``, or its newest: those used here are the same in both."""
    import onnxscript

    sets = (getattr(onnxscript, f"opset{n}", None) for n in range(opset, 0, -1))
    return next(x for x in sets if x is not None)


def _repeat_interleave(opset: int) -> Any:
    """Return the translation of ``repeat_interleave(x, repeats, dim)`` with one number of repeats.

    The exporter's own (onnxscript 0.7) expands to a wrong shape without a dim.
    """
    op = _operators(opset)

    def repeat_interleave(
        x: Any, repeats: int, dim: int | None = None, output_size: int | None = None
    ) -> Any:
        if dim is None:
            x, rank, dim = op.Reshape(x, [-1]), 1, 0
        else:
            rank = len(x.shape)
            dim %= rank
        parted = op.Unsqueeze(x, [dim + 1])
        tiles = [1] * (rank + 1)
        tiles[dim + 1] = repeats
        before, after = op.Shape(x, start=0, end=dim), op.Shape(x, start=dim + 1)
        shape = op.Concat(before, op.Constant(value_ints=[-1]), after, axis=0)
        return op.Reshape(op.Tile(parted, tiles), shape)

    return repeat_interleave


def _squeeze(opset: int) -> Any:
    """Return the translation of ``squeeze(x, dim)``, which does nothing to an axis longer than 1.

    The exporter's own (onnxscript 0.7) writes a Squeeze that no runtime takes.  Free sizes are never 1.
    """
    op = _operators(opset)

    def squeeze(x: Any, dim: int | Sequence[int]) -> Any:
        axes = [d % len(x.shape) for d in ([dim] if isinstance(dim, int) else dim)] if len(x.shape) else []
        ones = [a for a in axes if x.shape[a] == 1]
        return op.Squeeze(x, ones) if ones else op.Identity(x)

    return squeeze


def _numel(opset: int) -> Any:
    """Return the translation of ``x.numel()`` where a size of ``x`` varies."""
    op = _operators(opset)

    def numel(x: Any) -> Any:
        return op.Size(x)

    return numel


def _grouped_mm(opset: int) -> Any:
    """Return the translation of ``grouped_mm(x [S, K], weight [E, K, N], offs [E]) -> [S, N]``.

    Rows ``offs[e - 1] .. offs[e]`` are multiplied by ``weight[e]``, rows past the last offset are zeros.
    Each expert is one Slice and one MatMul, so no row is multiplied twice and no weight is copied per row.
    """
    from onnxscript import ir

    op = _operators(opset)

    def grouped_mm(x: Any, weight: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
        if len(x.shape) != 2 or len(weight.shape) != 3 or bias is not None:
            raise NotImplementedError("expected x [S, K], weight [E, K, N] and no bias")
        ends = op.Cast(offs, to=int(ir.DataType.INT64))
        first = op.Constant(value_ints=[0])
        start, parts = first, []
        for expert in range(weight.shape[0]):
            end = op.Slice(ends, [expert], [expert + 1], [0])
            rows = op.Slice(x, start, end, first)
            parts.append(op.MatMul(rows, op.Gather(weight, expert, axis=0)))
            start = end
        left = op.Sub(op.Shape(x, start=0, end=1), start)
        width = op.Shape(weight, start=2, end=3)
        zero = op.CastLike(op.Constant(value_float=0.0), x)
        parts.append(op.Expand(zero, op.Concat(left, width, axis=0)))
        out = op.Concat(*parts, axis=0)
        return out if out_dtype is None else op.Cast(out, to=out_dtype)

    return grouped_mm
