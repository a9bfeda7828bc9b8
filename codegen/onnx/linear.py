"""Write ``attnc::linear_w8a8`` as ONNX: the same integers and scales as on the torch side.

The codes are shifted by 128 to uint8 with a zero point, because MatMulInteger of ONNX Runtime 1.31 on CPU is
fast for that pair of types alone.  Measured on one thread of a CPU with VNNI, rows 1024, 384 -> 1536
features, against fp32 MatMul: uint8 codes x int8 weights 2 to 2.5 times faster, uint8 x uint8 1.1 to 1.5
times faster, int8 x int8 3 times *slower*.  DynamicQuantizeMatMul is faster still (1.3 times the first), but
has one scale for the whole tensor: 1.6 times the error on rows of unlike size, and other outputs than the
checked model; so it is not used.

uint8 x int8 saturates on x86 before VNNI (pairs of products are added in 16 bits), so the installed runtime
is asked once; where it does, and in models for any runtime, uint8 x uint8 is written, which is exact
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from attnc.codegen.onnx.builder import Builder, onnx_dtype
from attnc.codegen.onnx.runtime import Session
from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

Weights = Literal["int8", "uint8"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class LinearForm:
    """How integer linears are written, and why."""

    weights: Weights
    reason: str


def choose_form(target: str) -> LinearForm:
    """Choose the type of the stored weights for ``target``; see the module."""
    if target != "ort-cpu":
        return LinearForm("uint8", "uint8 codes x uint8 weights are exact in every runtime")
    if pairs_saturate():
        return LinearForm(
            "uint8", "this CPU adds uint8 x int8 products with saturation; uint8 x uint8 is exact"
        )
    return LinearForm(
        "int8", "uint8 codes x int8 weights are exact here and the fastest per-row form in ONNX Runtime"
    )


@cache
def pairs_saturate() -> bool:
    """Ask the installed ONNX Runtime once whether uint8 x int8 products saturate on this CPU."""
    import onnx_ir as ir

    k, n = 64, 32
    b = Builder("probe")
    a = ir.Value(name="a", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([16, k]))
    w = _initializer("w", torch.full((k, n), 127, dtype=torch.int8))
    out = b.op("MatMulInteger", a, w, dtype=torch.int32)
    graph = ir.Graph([a], [out], nodes=b.nodes, initializers=[w], opset_imports={"": 18}, name="probe")
    (found,) = Session(ir.Model(graph, ir_version=9))({"a": torch.full((16, k), 255, dtype=torch.uint8)})
    return bool((found != 255 * 127 * k).any())


def lower_linear(
    b: Builder,
    form: LinearForm,
    inputs: Sequence[ir.Value | None],
    dtype: torch.dtype,
    stored: dict[str, ir.Value],
) -> ir.Value:
    """Write one integer linear and return ``[..., N]`` in ``dtype``.

    ``inputs`` are x ``[..., K]``, the weight int8 ``[N, K]``, its scale ``[N]``, and a bias ``[N]`` or
    nothing. ``stored`` takes the weights as they are stored here, ``[K, N]``, by the name of the original.
    """
    x, weight, scale, bias = (*inputs, None)[:4]
    assert x is not None, "the operator's schema has x"
    assert weight is not None, "the operator's schema has a weight"
    assert scale is not None, "the operator's schema has a scale"
    f32 = torch.float32
    xf, unit = _row_scale(b, x)
    codes = b.op("Round", b.op("Mul", xf, b.op("Reciprocal", unit, dtype=f32), dtype=f32), dtype=f32)
    codes = b.cast(b.op("Add", codes, b.const(128.0, f32), dtype=f32), torch.uint8)
    zero = b.const(128, torch.uint8)
    zeros = (zero,) if form.weights == "int8" else (zero, zero)
    sums = b.op("MatMulInteger", codes, _weights(weight, form.weights, stored), *zeros, dtype=torch.int32)
    y = b.op("Mul", b.op("Mul", b.cast(sums, f32), unit, dtype=f32), b.cast(scale, f32), dtype=f32)
    if bias is not None:
        y = b.op("Add", y, b.cast(bias, f32), dtype=f32)
    return b.cast(y, dtype)


def _row_scale(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return x in fp32 and its scale ``max |x| / 127`` per row, NaN where the row is not finite.

    ReduceMax of ONNX Runtime passes over NaN, so zero times the row's sum is added: it is NaN just then.
    """
    f32 = torch.float32
    xf = b.cast(x, f32)
    most = b.op("ReduceMax", b.op("Abs", xf, dtype=f32), b.ints(-1), keepdims=1, dtype=f32)
    unit = b.op("Max", b.op("Mul", most, b.const(1 / 127, f32), dtype=f32), b.const(_TINY, f32), dtype=f32)
    total = b.op("ReduceSum", xf, b.ints(-1), keepdims=1, dtype=f32)
    return xf, b.op("Add", unit, b.op("Mul", total, b.const(0.0, f32), dtype=f32), dtype=f32)


def _weights(weight: ir.Value, kind: Weights, stored: dict[str, ir.Value]) -> ir.Value:
    """Return the constant ``weight`` ``[N, K]`` as ``[K, N]`` in the type wanted."""
    tensor, name = weight.const_value, weight.name
    if tensor is None or name is None:
        raise CodegenError(f"ONNX export: expected integer weights that are constants, found {weight}")
    if name not in stored:
        codes = torch.from_numpy(tensor.numpy().copy()).t()
        if kind == "uint8":
            codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        stored[name] = _initializer(f"{name}.{kind}", codes.contiguous())
    return stored[name]


def _initializer(name: str, tensor: torch.Tensor) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(
        name=name,
        type=ir.TensorType(onnx_dtype(tensor.dtype)),
        shape=ir.Shape(list(tensor.shape)),
        const_value=ir.tensor(tensor, name=name),
    )
