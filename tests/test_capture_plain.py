"""Graphs that are functional as exported are read as they are; others are traced again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnc.capture import plain as capture_plain
from attnc.capture.plain import is_costly, plain_copy
from attnc.capture.whole import capture_export


class Attention(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        if self.in_place:
            scores.mul_(0.5)
        w = scores.softmax(-1)
        unused = w.reshape(-1).exp()  # noqa: F841
        return nn.functional.dropout(w, 0.1, self.training) @ x.movedim(0, 0)


def graph_of(model: nn.Module) -> torch.fx.Graph:
    return torch.export.export(model.eval(), (torch.randn(3, 5, 8),), strict=False).graph


def test_a_functional_graph_is_copied_without_its_dead_ends():
    graph = graph_of(Attention())
    work = plain_copy(graph)
    assert work is not None
    assert [n.name for n in work.nodes] == [n.name for n in graph.nodes if n.name not in ("reshape", "exp")]
    assert any(n.name == "exp" for n in graph.nodes), "the original keeps what nobody reads"


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.clone().add_(1),
        lambda x: nn.functional.batch_norm(x, torch.zeros(5), torch.ones(5), training=True),
        lambda x: torch.linalg.diagonal(x).unsqueeze(1),
    ],
    ids=["in_place", "statistics", "unknown_view"],
)
def test_what_writes_or_views_in_other_ways_is_traced_again(write):
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return write(x) * 2

    assert plain_copy(graph_of(Writes())) is None


def test_both_ways_lead_to_the_same_site():
    x = torch.randn(3, 5, 8)
    captured = [capture_export(Attention(in_place).eval(), (x,)) for in_place in (False, True)]
    again = [c.work is not c.graph and len(c.work.nodes) for c in captured]
    assert all(again)
    assert captured[0].links == captured[0].moments, "names are shared"
    assert captured[1].links != captured[1].moments, "the scores are written to"


def test_a_long_program_that_writes_gets_fixed_sizes_and_a_warning(monkeypatch):
    x = torch.randn(3, 5, 8)
    monkeypatch.setattr(capture_plain, "MOST", 5)
    for in_place, fixed in ((False, False), (True, True)):
        captured = capture_export(Attention(in_place).eval(), (x,))
        assert any("writes in place" in w for w in captured.warnings) == fixed
        assert ("x dim 1 == 5" in captured.static) == fixed
        assert not is_costly(captured.graph)


def test_a_view_to_numbers_that_has_a_symbol_is_traced_again():
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.einsum("bgnsd,bgtd->bgnst", q.view(2, 2, 2, 3, 8), k)

    args = (torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8))
    captured = capture_export(Grouped(), args)
    (view,) = (n for n in captured.work.nodes if str(n.target) == "aten.view.default")
    assert list(view.meta["val"].shape) == [2, 2, 2, 3, 8]
    assert all(isinstance(n, int) for n in view.meta["val"].shape)
