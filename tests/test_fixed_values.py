"""Inputs whose values become sizes: seen in a run, fixed, and said so."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import attnc
from attnc.codegen.onnx.runtime import Session
from attnc.errors import RewriteError
from attnc.fixed_values import fix_values, followed_constants


class Tower(nn.Module):
    """Attention among the patches of images; ``grid`` ``[images, 2]`` says how many rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.rows = nn.Linear(16, 48), nn.Embedding(8, 16)

    def forward(self, patches: torch.Tensor, grid: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Map patches ``[n, 16]`` to as many features."""
        places = [torch.full((w,), row) for h, w in grid.tolist() for row in range(h)]
        x = patches + self.rows(torch.cat(places)) + shift
        q, k, v = (t.view(-1, 2, 8).transpose(0, 1)[None] for t in self.qkv(x).chunk(3, -1))
        a = torch.softmax(q @ k.transpose(-2, -1) * 0.3, -1) @ v
        return a[0].transpose(0, 1).flatten(1)


def call() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "patches": torch.randn(10, 16),
        "grid": torch.tensor([[2, 3], [2, 2]]),
        "shift": torch.tensor([3]),
    }


def test_only_what_python_reads_is_fixed() -> None:
    found = fix_values(Tower(), (), call())
    assert found is not None
    module, rest, values = found
    assert values == {"grid": [[2, 3], [2, 2]]}
    assert list(rest) == ["patches", "shift"]
    torch.testing.assert_close(module(**rest), module(**rest))
    with followed_constants():
        program = torch.export.export(module, (), rest, strict=False)
    assert [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"] == list(
        rest
    )


def test_a_model_that_reads_nothing_has_nothing_to_fix() -> None:
    assert fix_values(nn.Linear(4, 4), (torch.zeros(2, 4),), {}) is None


def test_export_fixes_the_grid_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, given = Tower().eval(), call()
    fast = attnc.optimize(model, (), given, cost_model=False)
    with caplog.at_level(logging.WARNING, "attnc"):
        (site,) = attnc.export_onnx(fast, tmp_path / "m.onnx")
    assert site.operator == "MultiHeadAttention"
    assert "grid is fixed to [[2, 3], [2, 2]]" in caplog.text
    properties = {p.key: p.value for p in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert "grid is fixed to [[2, 3], [2, 2]]" in properties["attnc.notes"]
    session = Session(tmp_path / "m.onnx")
    assert session.inputs == ["patches", "shift"]
    given["patches"] = torch.randn(10, 16)
    (found,) = session(given)
    torch.testing.assert_close(found, model(**given), rtol=1e-5, atol=1e-5)


class Branching(nn.Module):
    """A model that no exporter follows, and in which no value becomes a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[n]`` to itself or its negative."""
        return x if bool(x.sum() > 0) else -x


def test_a_model_that_cannot_be_captured_either_way_is_refused(tmp_path: Path) -> None:
    fast = attnc.optimize(Branching(), (torch.ones(4),))
    with pytest.raises(RewriteError, match="not captured whole"):
        attnc.export_onnx(fast, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
