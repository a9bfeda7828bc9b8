"""Types and tensors of ONNX as those of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

_TYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "COMPLEX64": torch.complex64,
}


def torch_type(dtype: ir.DataType | None) -> torch.dtype | None:
    """Return the torch type, None if torch has none or it is not known."""
    return None if dtype is None else _TYPES.get(dtype.name)


def onnx_number(dtype: torch.dtype) -> int:
    """Return the number that ONNX has for a type of torch."""
    import onnx_ir as ir

    return int(ir.DataType[next(name for name, t in _TYPES.items() if t == dtype)])


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return a copy of a stored tensor."""
    array = tensor.numpy()
    if tensor.dtype.name == "BFLOAT16":
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
