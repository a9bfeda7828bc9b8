"""Programs that torch's exporter alone cannot convert, or that are not functional."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import attnc.codegen.ops  # noqa: F401
from attnc.codegen.onnx.export import export_model
from attnc.codegen.onnx.runtime import Session


class Experts(nn.Module):
    """Rows sorted by expert, each group times its expert's weight; some experts get none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 12))

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, self.weight, offs)
        return out


def test_grouped_products_run_whatever_the_groups_are(tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.moe")
    model, path = Experts(), tmp_path / "m.onnx"
    args = torch.randn(10, 8), torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    program = torch.export.export(model, args, dynamic_shapes=({0: Dim("n")}, None), strict=False)
    export_model(program, path)
    session = Session(path)
    for n, offs in ((10, [3, 3, 9, 10]), (7, [0, 0, 0, 7]), (1, [1, 1, 1, 1])):
        x, ends = torch.randn(n, 8), torch.tensor(offs, dtype=torch.int32)
        (found,) = session({"x": x, "offs": ends})
        torch.testing.assert_close(found, model(x, ends), rtol=1e-5, atol=1e-5)
    (found,) = session({"x": torch.randn(6, 8), "offs": torch.tensor([1, 2, 3, 4], dtype=torch.int32)})
    assert found.shape == (6, 12)
    assert (found[4:] == 0).all(), "rows of no expert are zeros"


class Repeats(nn.Module):
    """Elements repeated in place, with and without a dim."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.repeat_interleave(3), x.repeat_interleave(2, 0), x.repeat_interleave(2, dim=-1)


def test_repeats(tmp_path: Path) -> None:
    x = torch.randn(2, 5)
    program = torch.export.export(Repeats(), (x,), dynamic_shapes=({1: Dim("n")},), strict=False)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    assert [c.shape for c in done.checks] == [(2, 5), (2, 3)]


class Written(nn.Module):
    """Each site's result is written into its place of one tensor."""

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        for i in range(2):
            text = "attn q=bhqd[2,1,9,8]:float32 k=bhkd[2,1,9,8]:float32 v=bhke[2,1,9,8]:float32 group=1 "
            part = q[:, i : i + 1]
            a, _ = torch.ops.attnc.attend(part, part, part, [], text + f"scale(0.{i + 2}) mask=none softmax")
            out[:, i : i + 1] = a
        return out


def test_sites_that_are_written_in_place_are_found(tmp_path: Path) -> None:
    q = torch.randn(2, 2, 9, 8)
    program = torch.export.export(Written(), (q,), strict=False)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((q,), {})])
    assert [s.operator for s in done.sites] == ["MultiHeadAttention"] * 2


class Channels(nn.Module):
    """Attention among channels: the head size is the length of the sequence, which varies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = "n"
        text = (
            f"attn q=bhqd[2,4,16,{n}]:float32 k=bhkd[2,4,16,{n}]:float32 v=bhke[2,4,16,{n}]:float32 group=1 "
            "scale(0.3) mask=none softmax"
        )
        out: torch.Tensor = torch.ops.attnc.attend(x, x, x, [], text)[0]
        return out


def test_a_head_size_that_varies_is_one_function(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 16, 10)
    program = torch.export.export(Channels(), (x,), dynamic_shapes=({3: Dim("n")},), strict=False)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    (site,) = done.sites
    assert site.operator.startswith("Attention_")
    assert "varies" in site.reason
    assert [c.shape for c in done.checks] == [(2, 4, 16, 10), (2, 4, 16, 6)]


def test_a_file_does_without_the_folding_of_constants_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: torch.onnx.ONNXProgram) -> None:
        program.model.graph.remove(list(program.model.graph), safe=False)
        raise RuntimeError("folding failed half way")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fail)
    x = torch.randn(2, 4, 16, 10)
    program = torch.export.export(Channels(), (x,), strict=False)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    assert all(c.ok for c in done.checks)


class Squeezes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(1) + x.squeeze((0, 1, 3)).squeeze(-1)


def test_squeezing_a_longer_axis_does_nothing(tmp_path: Path) -> None:
    x = torch.randn(3, 1, 5, 4)
    program = torch.export.export(
        Squeezes(), (x,), dynamic_shapes=({0: Dim("n"), 2: Dim("t")},), strict=False
    )
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[((x,), {})])
    assert [c.shape for c in done.checks] == [(3, 1, 5, 4), (2, 1, 3, 4)]
    assert all(c.ok for c in done.checks)


class Hides(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + (1.0 - mask) * -10000.0 + (2 - x)


def test_a_number_less_integers_is_exported(tmp_path: Path) -> None:
    args = torch.randn(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    program = torch.export.export(Hides(), args, dynamic_shapes=({0: Dim("n")},) * 2, strict=False)
    done = export_model(program, tmp_path / "m.onnx", check_inputs=[(args, {})])
    assert all(c.ok for c in done.checks)
