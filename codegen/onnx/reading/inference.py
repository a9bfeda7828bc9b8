"""Ask onnx's own shape inference what an operator without a rule gives, where the file does not say."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.reading.reader import KNOWN, Entry, Reader, UnreadError
from attnc.codegen.onnx.reading.symbols import Size
from attnc.codegen.onnx.reading.tensors import onnx_number, torch_type

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

log = logging.getLogger("attnc.codegen")


CRASHES = frozenset({"GatherND", "LayerNormalization", "Split"})
"""Operators whose inference, of onnx 1.23, ends the process or never ends for some attributes.

All were tried with attributes, shapes and constants at random, 500 nodes each."""


def inferred(r: Reader, n: ir.Node) -> dict[str, torch.Tensor]:
    """Return a fake tensor for each output of a standard operator whose type and rank can be told, by name.

    Sizes that nothing is known of are new symbols.
    """
    import onnx
    import onnx_ir as ir

    entries = {v.name: r.entries.get(v) for v in n.inputs if v is not None and v.name}
    sizes: dict[str, Size] = {}
    types, data = dict[str, Any](), dict[str, Any]()
    for name, e in entries.items():
        if e is None or (e.node is not None and not isinstance(e.node.meta.get("val"), torch.Tensor)):
            return {}
        types[name] = _type_of(e, sizes)
        stored = _stored(e)
        if stored is not None:
            data[name] = stored
    try:
        schema = onnx.defs.get_schema(n.op_type, r.opset, "")
        if n.op_type in CRASHES or not _fits(n, schema):
            return {}
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.serde.serialize_node(n),
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", r.opset)],
        )
    except (
        onnx.defs.SchemaError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ) as e:
        log.info("%s %s: its shape cannot be told: %s", n.op_type, n.name, e)
        return {}
    return {name: t for name, p in found.items() if (t := _fake(r, p, sizes)) is not None}


def _fits(n: ir.Node, schema: onnx.defs.OpSchema) -> bool:
    """Say whether a node has as many inputs and outputs as its operator may have."""
    inside = schema.min_input <= len(n.inputs) <= schema.max_input
    return inside and schema.min_output <= len(n.outputs) <= schema.max_output


def _type_of(e: Entry, sizes: dict[str, Size]) -> onnx.TypeProto:
    import onnx

    shape = list(e.node.meta["val"].shape) if e.node is not None else list(e.items.shape)  # type: ignore[union-attr]
    dtype = e.node.meta["val"].dtype if e.node is not None else e.dtype
    texts = [n if isinstance(n, int) else str(n.node.expr) for n in shape]
    sizes |= {text: n for text, n in zip(texts, shape, strict=True) if isinstance(text, str)}
    return onnx.helper.make_tensor_type_proto(onnx_number(dtype), texts)


def _stored(e: Entry) -> onnx.TensorProto | None:
    """Return the elements of a value that are all numbers, None if they are not or are many."""
    import onnx

    if e.items is not None and not any(isinstance(x, torch.SymInt) for x in e.items.flat):
        t = torch.tensor([int(x) for x in e.items.flat], dtype=e.dtype).reshape(e.items.shape)
    elif e.tensor is not None and e.tensor.numel() <= KNOWN and e.tensor.dtype != torch.bfloat16:
        t = e.tensor
    else:
        return None
    return onnx.numpy_helper.from_array(t.numpy())


def _fake(r: Reader, found: onnx.TypeProto, sizes: dict[str, Size]) -> torch.Tensor | None:
    import onnx_ir as ir

    tensor = found.tensor_type
    dtype = torch_type(ir.DataType(tensor.elem_type)) if tensor.elem_type else None
    if dtype is None or not tensor.HasField("shape"):
        return None
    try:
        return r.fake([_size(r, d, sizes) for d in tensor.shape.dim], dtype)
    except UnreadError:
        return None


def _size(r: Reader, d: Any, sizes: dict[str, Size]) -> Size:
    if d.HasField("dim_value"):
        return int(d.dim_value)
    return sizes[d.dim_param] if d.dim_param in sizes else r.symbols.fresh()
