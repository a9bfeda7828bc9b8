"""Repair what torch's exporter fuses into operators of opset 23 that do not run.

It fuses rotary positions into ai.onnx RotaryEmbedding whatever the batch of cos and sin, which is 1 where the
positions are counted and not given; without position ids the operator wants the batch of its input (ONNX
operators, RotaryEmbedding-23: ``[batch_size, sequence_length, head_size / 2]``).  It fuses norms into
RMSNormalization with an input in half precision and a scale in single, for which runtimes have no kernel; the
model's own norm computes such a thing in single precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnc.codegen.onnx.builder import Builder, torch_dtype

if TYPE_CHECKING:
    import onnx_ir as ir


def repair(graph: ir.Graph) -> None:
    """Make the fused operators of ``graph`` such that they run."""
    _expand_tables(graph)
    _widen_norms(graph)


def _widen_norms(graph: ir.Graph) -> None:
    """Cast the input of every RMSNormalization to the type of its scale."""
    for i, node in enumerate(list(graph)):
        if node.domain == "" and node.op_type == "RMSNormalization":
            x, scale = node.inputs[0], node.inputs[1]
            wanted = None if scale is None else torch_dtype(scale)
            if x is not None and wanted is not None and torch_dtype(x) not in (None, wanted):
                b = Builder(f"norm_{i}")
                node.replace_input_with(0, b.cast(x, wanted))
                graph.insert_before(node, b.nodes)


def _expand_tables(graph: ir.Graph) -> None:
    """Expand cos and sin of every RotaryEmbedding in ``graph`` to the batch of what they rotate."""
    for i, node in enumerate(list(graph)):
        given = [x for x in node.inputs if x is not None]
        if node.domain == "" and node.op_type == "RotaryEmbedding" and len(given) == 3:
            x, *tables = given
            b = Builder(f"rotary_{i}")
            for at, table in enumerate(tables, 1):
                if _batch(table) is None or _batch(table) != _batch(x):
                    sizes = b.op("Concat", b.size(x, 0), b.ints(1, 1), axis=0, dtype=torch.int64)
                    node.replace_input_with(at, b.op("Expand", table, sizes))
            graph.insert_before(node, b.nodes)


def _batch(x: ir.Value) -> int | str | None:
    """Return the first size of ``x``; the exporter leaves the shapes of cos and sin, not of their angles."""
    node = x.producer()
    if x.shape is None and node is not None and node.op_type in ("Cos", "Sin"):
        angles = node.inputs[0]
        return None if angles is None else _batch(angles)
    size = None if x.shape is None else x.shape[0]
    return size if isinstance(size, int) or size is None else size.value
