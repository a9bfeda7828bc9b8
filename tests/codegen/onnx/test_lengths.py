"""Files with a past are run with none and with one new position; modules may hold it as plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import attnc
from attnc.codegen.onnx.export import export_model
from attnc.codegen.onnx.lengths import check_free, edges, past_lengths
from attnc.codegen.onnx.names import input_names, output_names
from attnc.codegen.onnx.runtime import Session
from attnc.errors import CodegenError

HEADS, SIZE = 4, 8


class Causal(nn.Module):
    """One layer of causal attention that takes and returns its past as two tensors."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.least = least

    def forward(
        self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (p.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if key.shape[2] < self.least:
            q = q * 2
        key, value = torch.cat([key, k], 2), torch.cat([value, v], 2)
        seen = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool).tril(key.shape[2] - x.shape[1])
        a = nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=seen)
        return self.out(a.transpose(1, 2).flatten(2)), key, value


class Layers(nn.Module):
    """Two such layers with the past as a list of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Causal() for _ in range(2))

    def forward(
        self, x: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor | list[tuple[torch.Tensor, ...]]]:
        present = []
        for layer, pair in zip(self.layers, past, strict=True):
            x, *pair = layer(x, *pair)
            present.append(tuple(pair))
        return {"hidden": x, "present": present}


def step(past: int = 6, new: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(past)
    pair = torch.randn(2, batch, HEADS, past, SIZE, generator=g)
    return torch.randn(batch, new, 32, generator=g), pair[0], pair[1]


def program_of(model: nn.Module) -> ExportedProgram:
    free = {0: Dim.AUTO, 2: Dim.AUTO}
    shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "key": free, "value": free}
    return torch.export.export(model.eval(), step(), dynamic_shapes=shapes, strict=False)


def test_a_past_is_what_the_program_puts_new_values_after() -> None:
    found = past_lengths(program_of(Causal()))
    assert len(found) >= 1
    assert None not in found.values()

    class Prefix(nn.Module):
        def forward(self, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
            return torch.cat([prefix, x], 1).sum(1)  # not given back, so nothing says that it may be empty

    x = torch.randn(2, 5, 3)
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(Prefix(), (x, x[:, :3]), dynamic_shapes={"x": free, "prefix": free})
    assert past_lengths(program) == {}
    assert list(edges(program, {"s": 5})) == []


def test_plain_tensors_serve_the_prompt_and_every_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Causal().eval(), tmp_path / "m.onnx"
    became = attnc.export_onnx(model, path, step())
    assert [s.is_fused for s in became] == [True]
    session = Session(path)
    for past, new, batch in ((0, 9, 2), (0, 1, 1), (7, 1, 3), (4, 4, 2)):
        feeds = step(past, new, batch)
        with torch.no_grad():
            expected = model(*feeds)
        found = session(dict(zip(session.inputs, feeds, strict=True)))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_checks_run_an_empty_past_and_one_new_position(tmp_path: Path) -> None:
    model = Causal().eval()
    done = export_model(program_of(model), tmp_path / "m.onnx", check_inputs=[(step(), {})], reference=model)
    assert [c.shape for c in done.checks] == [
        (2, 3, 32),
        (3, 2, 32),
        (2, 3, 32),
        (1, 1, 32),
        (2, 1, 32),
        (1, 1, 32),
    ]
    assert all(c.ok for c in done.checks)


def test_a_file_that_is_wrong_for_an_empty_past_is_refused(tmp_path: Path) -> None:
    """The capture follows the branch that its example takes, and an empty past takes the other one."""
    path = tmp_path / "m.onnx"
    model = Causal(least=2).eval()
    with pytest.raises(CodegenError, match="disagrees with the reference"):
        export_model(program_of(model), path, check_inputs=[(step(), {})], reference=model)
    assert list(tmp_path.iterdir()) == []


def test_pairs_called_past_and_present_are_named_by_layer_and_part(tmp_path: Path) -> None:
    x, key, value = step()
    model = Layers().eval()
    inputs = (x, [(key, value), (key.clone(), value.clone())])
    path = tmp_path / "m.onnx"
    attnc.export_onnx(model, path, inputs)
    session = Session(path)
    pairs = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert session.inputs == ["x", *(f"past.{p}" for p in pairs)]
    assert session.outputs == ["hidden", *(f"present.{p}" for p in pairs)]
    assert session._session.get_inputs()[1].shape == ["batch", HEADS, "past_sequence", SIZE]


def test_a_cache_of_fixed_length_is_refused() -> None:
    x, key, value = step()
    inputs = (x, [(key, value), (key.clone(), value.clone())])
    free: dict[int, Any] = {0: Dim.AUTO, 2: Dim.AUTO}
    for past, ok in ((free, True), ({0: Dim.AUTO}, False)):
        shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "past": [(past, past)] * 2}
        program = torch.export.export(Layers(), inputs, dynamic_shapes=shapes, strict=False)
        if ok:
            check_free(program)
        else:
            with pytest.raises(CodegenError, match="past and new tokens of any length"):
                check_free(program)


def test_other_names_stay_as_they_were() -> None:
    program = program_of(Causal())
    assert input_names(program) == ["x", "key", "value"]
    assert output_names(program) == ["output_0", "output_1", "output_2"]
