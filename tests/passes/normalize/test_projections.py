"""One linear layer that makes q, k and v becomes three, where the views behind it part its columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import attnc.codegen.ops  # noqa: F401  (the attend operator)
from attnc.passes.normalize.projections import separate_projections

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
SPEC = (
    f"attn q=bhqd[b,{HEADS},s,{SIZE}]:float32 k=bhkd[b,{HEADS},s,{SIZE}]:float32 "
    f"v=bhke[b,{HEADS},s,{SIZE}]:float32 group=1 scale(0.5) mask=none softmax"
)
Views = Callable[[Tensor], tuple[Tensor, ...]]


def by_permute(y: Tensor) -> tuple[Tensor, ...]:
    b, s, _ = y.shape
    return y.reshape(b, s, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)


def by_chunk(y: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in y.chunk(3, -1))


def by_select(y: Tensor) -> tuple[Tensor, ...]:
    parted = y.unflatten(-1, (3, HEADS, SIZE)).movedim(3, 1)
    return parted[..., 2, :], parted[..., 0, :], parted[..., 1, :]


def interleaved(y: Tensor) -> tuple[Tensor, ...]:
    """Part the columns by head first, so that no operand is one run of them."""
    return y.unflatten(-1, (HEADS, 3, SIZE)).permute(3, 0, 2, 1, 4).unbind(0)


def with_a_gate(y: Tensor) -> tuple[Tensor, ...]:
    q, k, v = by_chunk(y)
    return q, k, v * y.sigmoid().mean()


def scaled(y: Tensor) -> tuple[Tensor, ...]:
    q, k, v = by_chunk(y)
    return q * 2, k, v


class Joint(nn.Module):
    def __init__(self, views: Views, bias: bool) -> None:
        super().__init__()
        self.qkv, self.views = nn.Linear(7, 3 * WIDTH, bias=bias), views

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.attnc.attend(*self.views(self.qkv(x)), [], SPEC)[0]


def program_of(views: Views, bias: bool = True) -> tuple[ExportedProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return torch.export.export(Joint(views, bias), (x,), dynamic_shapes=shapes, strict=False), x


def widths(program: ExportedProgram) -> list[int]:
    """Return how many columns each linear layer makes."""
    linear = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    return [n.meta["val"].shape[-1] for n in linear]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("views", [by_permute, by_chunk, by_select])
def test_a_joint_projection_is_parted(views: Views, bias: bool):
    program, x = program_of(views, bias)
    parted = separate_projections(program)
    assert widths(program) == [3 * WIDTH]
    assert widths(parted) == [WIDTH] * 3
    for size in (x, torch.randn(3, 8, 7)):
        torch.testing.assert_close(parted.module()(size), program.module()(size))


@pytest.mark.parametrize("views", [interleaved, with_a_gate, scaled])
def test_other_columns_and_other_readers_leave_it_whole(views: Views):
    program, _ = program_of(views)
    assert separate_projections(program) is program
