"""The calls on which a written file is compared: other sizes, and masks that hide more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from attnc.codegen.onnx.export import export_model
from attnc.codegen.onnx.trials import masked, other_sizes


class Sum(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (ids * mask * x).sum()


def program(**dims: Any) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    call = torch.arange(2, 20).view(2, 9), torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9)
    shapes = {n: {0: dims.get("batch"), 1: dims.get("length")} for n in ("ids", "mask", "x")}
    return torch.export.export(Sum(), call, dynamic_shapes=shapes, strict=False), call


def shapes(calls: Any) -> list[tuple[int, ...]]:
    return [tuple(args[0].shape) for args, _ in calls]


def test_all_sizes_change_and_then_each_alone():
    exported, call = program(batch=Dim.DYNAMIC, length=Dim.DYNAMIC)
    both = [(3, 5), (4, 18)]
    assert shapes(other_sizes(exported, call, {})) == [*both, (3, 9), (4, 9), (2, 5), (2, 18)]


def test_a_single_free_size_is_changed_within_its_bounds():
    exported, call = program(batch=Dim.STATIC, length=Dim("length", min=6, max=12))
    assert shapes(other_sizes(exported, call, {})) == [(2, 6), (2, 12)]


def test_fixed_sizes_have_no_others():
    exported, call = program(batch=Dim.STATIC, length=Dim.STATIC)
    assert shapes(other_sizes(exported, call, {})) == []


def test_masks_hide_the_start_the_end_and_everything():
    exported, call = program(batch=Dim.STATIC, length=Dim.STATIC)
    (*calls,) = masked(exported, call, {})
    start, end, whole = [0, 0, 0, *[1] * 6], [*[1] * 6, 0, 0, 0], [0] * 9
    assert [args[1].tolist() for args, _ in calls] == [[start, end], [end, whole], [whole, start]]
    assert all(torch.equal(args[0], call[0]) and torch.equal(args[2], call[2]) for args, _ in calls)
    assert call[1].all(), "the given mask is as it was"


def test_inputs_that_hold_other_numbers_are_no_masks():
    exported, (ids, _, x) = program(batch=Dim.STATIC, length=Dim.STATIC)
    assert list(masked(exported, (ids, ids, x), {})) == []


class Chunks(nn.Module):
    """Means over chunks of four; a text of another length is padded, which an export at 8 does not see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = -x.shape[1] % 4
        if missing:
            x = nn.functional.pad(x, (0, missing))
        return x.view(x.shape[0], -1, 4).mean(-1)


def test_lengths_that_the_captured_program_does_not_take_are_not_compared(tmp_path: Path):
    x = torch.randn(2, 8)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    exported = torch.export.export(Chunks(), (x,), dynamic_shapes=shapes, strict=False)
    done = export_model(exported, tmp_path / "m.onnx", check_inputs=[((x,), {})], reference=Chunks())
    assert [c.shape for c in done.checks] == [(2, 8), (4, 16)]
