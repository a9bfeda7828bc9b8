"""Check that a tensor stored in an ONNX file holds what its type and shape say: no more, no less.

Source: onnx.proto, TensorProto: which field holds which type, two numbers of four bits in a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnc.codegen.onnx.opening.wire import quoted
from attnc.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

AXES = 64
"""numpy's arrays have at most so many axes."""
LARGEST = 2**63 - 1
# fmt: off
BITS: Mapping[str, int] = {
    "FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8,
    "FLOAT16": 16, "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128,
    "BFLOAT16": 16, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8,
    "FLOAT8E8M0": 8, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2,
}
"""Bits per number as bytes are written; texts have none."""
STORE: Mapping[str, str] = {
    "FLOAT": "float_data", "COMPLEX64": "float_data", "DOUBLE": "double_data", "COMPLEX128": "double_data",
    "INT64": "int64_data", "UINT32": "uint64_data", "UINT64": "uint64_data", "STRING": "string_data",
}
"""The field of numbers that are not written as bytes; ``int32_data`` for all others."""
# fmt: on
STORES = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_tensor(tensor: onnx.TensorProto) -> int | None:
    """Check type, shape and stored numbers; return the bytes that it has by type and shape, None for texts.

    External data is left to its caller, who has the folder.

    Raises:
        CheckpointError: an unknown type, a bad shape, or data of another length or in the wrong field.
    """
    where = f"tensor {quoted(tensor.name)}: "
    kind = type_name(tensor.data_type)
    if kind is None:
        raise CheckpointError(f"{where}expected an element type, found number {tensor.data_type}")
    count = _count(tensor, where)
    nbytes = None if kind == "STRING" else math.ceil(count * BITS[kind] / 8)
    if tensor.HasField("segment"):
        raise CheckpointError(f"{where}expected a whole tensor, found a segment of one")
    filled = [name for name in STORES if len(getattr(tensor, name))]
    if tensor.data_location == tensor.EXTERNAL:
        if filled or tensor.HasField("raw_data"):
            raise CheckpointError(f"{where}expected its data in one place, found it in the model and outside")
        return nbytes
    if tensor.external_data:
        raise CheckpointError(
            f"{where}expected no external data, for it is said to lie in the model; found some"
        )
    _check_stored(tensor, where, kind, count, nbytes, filled)
    return nbytes


def type_name(number: int) -> str | None:
    """Return the name of an element type that can be read, None for an unknown or undefined one."""
    import onnx

    if number not in onnx.TensorProto.DataType.values():
        return None
    name = str(onnx.TensorProto.DataType.Name(number))
    return name if name in BITS or name == "STRING" else None


def _count(tensor: onnx.TensorProto, where: str) -> int:
    """Return the number of elements."""
    dims = list(tensor.dims[: AXES + 1])
    if len(dims) > AXES:
        raise CheckpointError(f"{where}expected at most {AXES} axes, found {len(tensor.dims)}")
    if any(d < 0 for d in dims):
        raise CheckpointError(f"{where}expected sizes >= 0, found shape {quoted(dims)}")
    count: int = math.prod(dims)
    if count * 16 > LARGEST or math.prod(d for d in dims if d) * 16 > LARGEST:
        raise CheckpointError(
            f"{where}expected a size that can be counted in 63 bits, found shape {quoted(dims)}"
        )
    return count


def _check_stored(
    tensor: onnx.TensorProto, where: str, kind: str, count: int, nbytes: int | None, filled: list[str]
) -> None:
    if tensor.HasField("raw_data"):
        if filled or nbytes is None:
            also = filled[0] if filled else "a tensor of texts"
            raise CheckpointError(f"{where}expected its data in one field, found raw_data and {also}")
        if len(tensor.raw_data) != nbytes:
            raise CheckpointError(
                f"{where}expected {nbytes} bytes for {kind} {quoted(list(tensor.dims))}, found "
                f"{len(tensor.raw_data)}"
            )
        return
    store = STORE.get(kind, "int32_data")
    if filled not in ([], [store]):
        raise CheckpointError(f"{where}expected {kind} in {store}, found {' and '.join(filled)}")
    bits = BITS.get(kind, 8)
    per = 2 if kind.startswith("COMPLEX") else 1
    need = math.ceil(count * bits / 8) if bits < 8 else count * per
    found = len(getattr(tensor, store))
    if found != need:
        raise CheckpointError(
            f"{where}expected {need} numbers in {store} for {kind} {quoted(list(tensor.dims))}, found {found}"
        )
