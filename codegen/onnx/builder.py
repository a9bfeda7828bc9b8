"""Write ONNX nodes one line at a time.

A ``Builder`` records nodes in order and knows nothing about graphs: the caller puts ``nodes`` where they
belong, in the main graph, in a model-local function or in a test model.  Everything it writes is plain ONNX;
constants are Constant nodes, because a function has no initializers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
OURS = "attnc"

_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
    torch.bool: "BOOL",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.int64: "INT64",
}


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return the ONNX element type of ``dtype``.

    Raises:
        CodegenError: ONNX models of ours have no such type.
    """
    import onnx_ir as ir

    if dtype not in _NAMES:
        raise CodegenError(f"ONNX export: expected one of {sorted(map(str, _NAMES))}, found {dtype}")
    return ir.DataType[_NAMES[dtype]]


class Builder:
    """Record nodes; ``prefix`` starts every value name, so names are unique and the same in every run."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def op(
        self,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        dtype: torch.dtype | None = None,
        shape: Sequence[Any] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append one node and return its first output, of ``dtype`` and ``shape`` where they are known."""
        return self.ops(
            name, *inputs, domain=domain, outputs=outputs, dtype=dtype, shape=shape, **attributes
        )[0]

    def ops(
        self,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        dtype: torch.dtype | None = None,
        shape: Sequence[Any] | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append one node and return all its outputs."""
        import onnx_ir as ir

        at = f"{self.prefix}_{len(self.nodes)}"
        values = [ir.Value(name=f"{at}_{name}" + (f"_{i}" if i else "")) for i in range(outputs)]
        if dtype is not None:
            values[0].dtype = onnx_dtype(dtype)
        if shape is not None:
            values[0].shape = ir.Shape(shape)
        attrs = ir.convenience.convert_attributes({k: attributes[k] for k in sorted(attributes)})
        self.nodes.append(ir.Node(domain, name, inputs, attrs, outputs=values, name=at))
        return values

    def const(self, values: Sequence[int | float] | float, dtype: torch.dtype) -> ir.Value:
        """Return a constant: a scalar for a number, a vector for a sequence.  Equal ones are written once."""
        import onnx_ir as ir

        flat = tuple(values) if isinstance(values, Sequence) else values
        key = (repr(flat), dtype)
        if key not in self._constants:
            tensor = ir.tensor(torch.tensor(flat, dtype=dtype), name=f"{self.prefix}_{len(self.nodes)}_const")
            self._constants[key] = self.op("Constant", value=tensor, dtype=dtype, shape=list(tensor.shape))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """Return an int64 vector."""
        return self.const(values, torch.int64)

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Return ``x`` as ``dtype``; nothing is written if it is known to be so already."""
        to = onnx_dtype(dtype)
        return x if x.dtype == to else self.op("Cast", x, dtype=dtype, to=int(to))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """Return the size of one axis as an int64 vector of one element, read before layout changes."""
        x, axis = _origin(x, axis)
        known = None if x.shape is None else x.shape[axis]
        if isinstance(known, int):
            return self.ints(known)
        return self.op("Shape", x, start=axis, end=axis + 1, dtype=torch.int64, shape=[1])

    def scalar(self, x: ir.Value) -> ir.Value:
        """Return a vector of one element as a scalar."""
        return self.op("Squeeze", x, self.ints(0), dtype=torch_dtype(x), shape=[])


def _origin(x: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """Return the value and axis of the same size before layout changes and projections, which may then go."""
    node = x.producer()
    while (
        node is not None and node.domain == "" and node.op_type in ("Transpose", "Reshape", "Add", "MatMul")
    ):
        if node.op_type in ("Add", "MatMul"):
            projected = _projected(node, x, axis)
            if projected is None:
                break
            x, node = projected, projected.producer()
            continue
        before = node.inputs[0]
        assert before is not None, "a layout change has an input"
        if node.op_type == "Transpose":
            axis = node.attributes["perm"].as_ints()[axis]
        else:
            same = _axis_of(before.shape, x.shape[axis] if x.shape is not None else None)
            if same is None:
                break
            axis = same
        x, node = before, before.producer()
    return x, axis


def _projected(node: ir.Node, x: ir.Value, axis: int) -> ir.Value | None:
    """Return what a stored matrix or row was multiplied with or added to, if that has ``axis`` of ``x``."""
    rank = None if x.shape is None else len(x.shape)
    one, other = node.inputs
    stored = other if other is not None and other.const_value is not None else None
    if stored is None or stored.shape is None or rank is None or axis % rank == rank - 1:
        return None
    same = one is not None and one.shape is not None and len(one.shape) == rank
    return one if same and len(stored.shape) == (1 if node.op_type == "Add" else 2) else None


def _axis_of(shape: ir.Shape | None, size: Any) -> int | None:
    """Return the axis of ``shape`` with the symbolic size ``size``; equal symbols are equal sizes."""
    if shape is None or size is None or isinstance(size, int) or size.value is None:
        return None
    return next((i for i, n in enumerate(shape) if not isinstance(n, int) and n.value == size.value), None)


def torch_dtype(x: ir.Value) -> torch.dtype | None:
    """Return the element type of ``x`` where it is known and one of ours."""
    return next((t for t, n in _NAMES.items() if x.dtype is not None and x.dtype.name == n), None)
