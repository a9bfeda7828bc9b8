"""The window form keeps the window it says, on top of the site's own mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnc.ir import AttentionSpec, Operand, Scale
from attnc.masks import CAUSAL, Band, Full, Grid, Mask, Padding, both
from attnc.passes.rewrite.sparse.sliding_window import SlidingWindow

S = 9


def spec(mask: Mask, sq: int | str = S, sk: int | str = S) -> AttentionSpec:
    return AttentionSpec(
        Operand("q", "bhqd", (2, 3, sq, 4), torch.float64),
        Operand("k", "bhkd", (2, 3, sk, 4), torch.float64),
        Operand("v", "bhke", (2, 3, sk, 4), torch.float64),
        1,
        (Scale(0.5),),
        mask,
        captured=(Operand("c0", "bk", (2, sk), torch.bool),) if mask.operands else (),
    )


ROW = torch.arange(S).expand(2, S) < torch.tensor([[7], [9]])


def kept(mask: Mask) -> Tensor:
    grid = Grid(S, S, torch.device("cpu"), {"c0": ROW})
    return mask.keep(grid).expand(2, 1, S, S)


@pytest.mark.parametrize(
    "mask", [Full(), CAUSAL, Padding("c0"), both(CAUSAL, Padding("c0")), Band(5, 0)], ids=str
)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("causal", [None, True, False])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_mask_is_the_window_written_out(mask, sinks, causal, window):
    if sinks > window:
        pytest.skip("more sinks than the window reaches")
    is_causal = causal if causal is not None else "causal" in str(mask) or "right=0" in str(mask)
    q, k = torch.arange(S)[:, None], torch.arange(S)[None]
    near = (q - k < window) & (k <= q) if is_causal else (q - k).abs() <= window
    sink = (k < sinks) & (k <= q) if is_causal else k < sinks
    form = SlidingWindow(window, sinks, causal)
    assert torch.equal(kept(form.mask(spec(mask))), kept(mask) & (near | sink))


def test_rows_that_see_nothing_give_zeros():
    new = SlidingWindow(2).rewrite(spec(both(CAUSAL, Padding("c0"))))
    assert new.fill.value == -math.inf
    x = torch.randn(2, 3, S, 4, dtype=torch.float64)
    left = torch.arange(S).expand(2, S) >= 3
    out, _ = new(x, x, x, (left,))
    assert torch.equal(out[:, :, :3], torch.zeros_like(out[:, :, :3]))
    assert out[:, :, 3:].isfinite().all()


def test_error_falls_to_zero_as_the_window_grows():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, S, 4, generator=g, dtype=torch.float64) for _ in range(3))
    exact, _ = spec(CAUSAL)(q, k, v)
    errors = [
        float((SlidingWindow(w).rewrite(spec(CAUSAL))(q, k, v)[0] - exact).abs().max()) for w in (1, 4, 7, S)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-14


def test_queries_and_keys_must_be_the_same_positions():
    form = SlidingWindow(4)
    assert form.applies(spec(CAUSAL)) is None
    assert form.applies(spec(CAUSAL, "s0", "s0")) is None
    miss = form.applies(spec(CAUSAL, 1, S))
    assert miss is not None
    assert miss.code == "pattern-needs-self-attention"
    assert form.applies(replace(spec(CAUSAL), k=spec(CAUSAL, S, "s1").k)) is not None
