"""Operators that torch's exporter makes and ONNX Runtime refuses run after the repair, and mean the same."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from attnc.codegen.onnx.builder import Builder, onnx_dtype
from attnc.codegen.onnx.repairs import repair
from attnc.codegen.onnx.runtime import Session, failures

Shape = list[int | str]


def value(name: str, dtype: torch.dtype, shape: Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(onnx_dtype(dtype)), shape=ir.Shape(shape))


def run(graph: ir.Graph, feeds: dict[str, torch.Tensor], *, repaired: bool) -> torch.Tensor:
    if repaired:
        repair(graph)
    return Session(ir.Model(graph, ir_version=10))(feeds)[0]


@pytest.mark.parametrize("shown", [True, False], ids=["shape", "shape of the angles"])
def test_rotary_tables_of_one_batch_serve_all(shown: bool) -> None:
    """The exporter leaves out the shapes of cos and sin; their angles have one."""

    def graph() -> ir.Graph:
        b = Builder("t")
        x, angles = value("x", torch.float32, ["b", 2, "s", 8]), value("angles", torch.float32, [1, "s", 4])
        cos, sin = b.op("Cos", angles), b.op("Sin", angles)
        if shown:
            cos.shape = sin.shape = ir.Shape([1, "s", 4])
        out = b.op("RotaryEmbedding", x, cos, sin, dtype=torch.float32, num_heads=2, interleaved=0)
        return ir.Graph([x, angles], [out], nodes=b.nodes, opset_imports={"": 23}, name="g")

    g = torch.Generator().manual_seed(0)
    x, angles = torch.randn(3, 2, 5, 8, generator=g), torch.randn(1, 5, 4, generator=g)
    feeds = {"x": x, "angles": angles}
    with pytest.raises(failures(), match="cos_cache"):
        run(graph(), feeds, repaired=False)
    wide = torch.cat([angles, angles], -1)[:, None]
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    expected = x * wide.cos() + turned * wide.sin()
    torch.testing.assert_close(run(graph(), feeds, repaired=True), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_of_half_precision_with_a_single_scale_is_computed_in_single() -> None:
    def graph() -> ir.Graph:
        b = Builder("t")
        x, scale = value("x", torch.float16, ["b", 8]), value("scale", torch.float32, [8])
        out = b.op("RMSNormalization", x, scale, dtype=torch.float32, axis=-1, epsilon=1e-5, stash_type=1)
        total = b.op("Mul", out, b.const(2.0, torch.float32), dtype=torch.float32)
        return ir.Graph([x, scale], [total], nodes=b.nodes, opset_imports={"": 23}, name="g")

    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(3, 8, generator=g).half(), torch.randn(8, generator=g)
    feeds = {"x": x, "scale": scale}
    with pytest.raises(failures()):
        run(graph(), feeds, repaired=False)
    expected = 2 * torch.nn.functional.rms_norm(x.float(), (8,), scale, 1e-5)
    torch.testing.assert_close(run(graph(), feeds, repaired=True), expected, rtol=1e-5, atol=1e-6)
