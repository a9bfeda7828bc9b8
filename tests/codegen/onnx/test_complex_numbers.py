"""Programs with complex values compute the same on pairs of real ones, and are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from attnc.codegen.onnx.complex_numbers import without_complex
from attnc.codegen.onnx.export import export_model
from attnc.errors import CodegenError


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of features ``[B, S, H, D]`` by their position, as Llama 4 does."""
    frequencies = 1.0 / 100.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.arange(x.shape[1])[:, None] * frequencies[None]
    turns = (torch.polar(torch.ones_like(angles), angles) * 1.5).to(torch.complex64)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None, :]).flatten(3)


def layouts(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    z = torch.cat([z.transpose(1, 2), z.permute(0, 2, 1, 3)[:, :1]], 1).expand(2, -1, -1, -1)
    return torch.view_as_real(z.reshape(-1, z.shape[-1]).unsqueeze(0)[..., 1])


def arithmetic(x: Tensor) -> Tensor:
    z = torch.complex(x, x.flip(-1)) - 2.0
    w = (3j * z + z.conj() * (1 + 2j)) * x + x.to(torch.complex64)
    return torch.stack([w.real, w.imag, w.abs(), (z * w).sum(-1, keepdim=True).real.expand_as(x)])


class Of(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def program_of(f: Callable[[Tensor], Tensor]) -> tuple[ExportedProgram, Tensor]:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    return torch.export.export(Of(f), (x,), dynamic_shapes=({1: Dim.DYNAMIC},), strict=False), x


@pytest.mark.parametrize("f", [rotated, layouts, arithmetic])
def test_parts_compute_what_the_complex_values_do(f: Callable[[Tensor], Tensor]):
    program, x = program_of(f)
    real = without_complex(program)
    values = [n.meta["val"] for n in real.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not any(v.is_complex() for v in values)
    for given in (x, torch.randn(2, 9, 3, 8)):
        torch.testing.assert_close(real.module()(given), f(given))


def test_a_program_of_real_values_is_left_alone():
    program, _ = program_of(torch.exp)
    assert without_complex(program) is program


def test_rotary_positions_of_complex_numbers_are_exported(tmp_path: Path):
    program, x = program_of(rotated)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    assert [c.shape[1] for c in done.checks] == [5, 3]
    assert all(c.ok for c in done.checks)


class Turned(nn.Module):
    """A buffer and a constant of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(40.0).view(10, 4)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.tensor(1 + 2j)
        return torch.view_as_real(pairs * self.turns[: x.shape[1], None]).flatten(3)


def test_stored_complex_values_are_stored_as_pairs(tmp_path: Path):
    model, x = Turned(), torch.randn(2, 5, 3, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim.DYNAMIC},), strict=False)
    real = without_complex(program)
    given = torch.randn(2, 9, 3, 8)
    torch.testing.assert_close(real.module()(given), model(given))
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    assert all(c.ok for c in done.checks)


def test_what_is_not_known_is_named():
    program, _ = program_of(lambda x: torch.view_as_real(torch.complex(x, x).exp()))
    with pytest.raises(CodegenError, match=r"aten\.exp\.default of complex values is not known"):
        without_complex(program)
    program = torch.export.export(Of(lambda z: z.real), (torch.complex(torch.ones(3), torch.ones(3)),))
    with pytest.raises(CodegenError, match="expected real inputs and outputs, found x"):
        without_complex(program)
