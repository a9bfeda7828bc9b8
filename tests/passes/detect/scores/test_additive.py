"""What is added to the scores: nothing, a constant, a mask with a closed form, or a bias; never a guess."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.ir import AttentionSpec, Bias
from attnc.masks import CAUSAL, Dense, Full
from tests.corpus import CASES, make_inputs, positions
from tests.rewriting import only_spec, traced

S = "qs ks vs"


def spec_of(added, *more: Tensor) -> AttentionSpec:
    """Return the spec of attention whose scores become ``added(scores, *more)``."""
    q, k, v = make_inputs(CASES["causal_by_tril"])
    return only_spec(traced(lambda q, k, v, *m: added(q @ k.mT, *m).softmax(-1) @ v, (q, k, v, *more)))


def triangle(w: Tensor, value: float) -> Tensor:
    i, j = positions(w)
    return torch.where(j <= i, 0.0, value).to(w.dtype)


@pytest.mark.parametrize(
    "added",
    [
        lambda w: w + triangle(w, -1e9),
        lambda w: triangle(w, -1e9) + w,
        lambda w: w - triangle(w, 1e9),
        lambda w: w + torch.full(w.shape[-2:], -1e9, dtype=w.dtype).triu(1),
        lambda w: w + (1.0 - torch.ones(w.shape[-2:], dtype=w.dtype).tril()) * -1e9,
        lambda w: torch.sub(w, triangle(w, 1e9)[None]),
    ],
)
def test_causal_tensors_are_causal(added):
    spec = spec_of(added)
    assert spec.mask == CAUSAL
    assert (spec.fill.value, spec.fill.how) == (-1e9, "add")
    assert spec.scores == ()
    assert spec.captured == ()


@pytest.mark.parametrize(
    "added",
    [
        lambda w: w + 0.0,
        lambda w: w + torch.zeros_like(w),
        lambda w: w + 3.5,
        lambda w: w - torch.full((1, 1), 2.0, dtype=w.dtype),
        lambda w: w + torch.where(positions(w)[0] >= 0, 0.0, -1e9).to(w.dtype),
    ],
)
def test_what_changes_no_weight_vanishes(added):
    spec = spec_of(added)
    assert spec.mask == Full()
    assert spec.scores == ()


@pytest.mark.parametrize(
    "added",
    [
        lambda w: w + triangle(w, -9e3),
        lambda w: w - triangle(w, -1e9),
        lambda w: w + triangle(w, -1e9) * 0.5 + 1.0 - triangle(w, -1e9) * 0.5,
        lambda w: w + torch.where(positions(w)[1] <= positions(w)[0], 0.5, -1e9).to(w.dtype),
        lambda w: w + torch.arange(w.shape[-1]).to(w.dtype),
    ],
)
def test_what_only_resembles_a_mask_stays_a_bias(added):
    spec = spec_of(added)
    assert not isinstance(spec.mask, Dense)
    assert spec.mask in (Full(), CAUSAL)
    assert any(isinstance(step, Bias) for step in spec.scores)


def test_a_bias_keeps_its_sign_and_its_shape():
    bias = torch.randn(1, 3, 1, 7, dtype=torch.float64)
    spec = spec_of(lambda w, m: w - m, bias)
    assert spec.scores == (Bias("c0", -1),)
    assert spec.captured[0].shape == (1, 3, 1, 7)


def test_a_mask_that_becomes_a_bias_keeps_its_sign():
    def added(w: Tensor, keep: Tensor) -> Tensor:
        hidden = torch.where(keep, 0.0, 1e9).to(w.dtype)
        return (w - hidden).masked_fill(positions(w)[1] > positions(w)[0], float("-inf"))

    spec = spec_of(added, torch.rand(2, 1, 7, 7) < 0.5)
    assert spec.scores == (Bias("c0", -1),)
    assert spec.mask == CAUSAL
