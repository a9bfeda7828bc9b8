"""Masks written over the scores: which side is kept, with what value, and what does not hide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnc.ir import Pointwise, Scale
from attnc.masks import CAUSAL, Full
from tests.corpus import CASES, make_inputs, positions
from tests.rewriting import only_spec, traced

NEG = float("-inf")


def trace(f, dtype: torch.dtype = torch.float64):
    q, k, v = make_inputs(CASES["causal_by_tril"], dtype=dtype)
    return traced(lambda q, k, v: f(q @ k.mT).softmax(-1) @ v, (q, k, v))


def keep(w: Tensor) -> Tensor:
    i, j = positions(w)
    return j <= i


@pytest.mark.parametrize(
    ("fill", "value"),
    [
        (lambda w: w.masked_fill(~keep(w), NEG), NEG),
        (lambda w: w.masked_fill(~keep(w), -1e9), -1e9),
        (lambda w: w.masked_fill(keep(w).logical_not(), torch.full((), -5e4, dtype=w.dtype)), -5e4),
        (lambda w: torch.where(keep(w), w, NEG), NEG),
        (lambda w: torch.where(~keep(w), torch.full_like(w, -2e4), w), -2e4),
        (lambda w: torch.where(keep(w), w, w.new_full((), -1e30)), -1e30),
        (lambda w: torch.masked_fill(w, torch.ones_like(w, dtype=torch.bool).triu(1), NEG), NEG),
    ],
)
def test_masks_over_the_scores(fill, value):
    spec = only_spec(trace(fill))
    assert spec.mask == CAUSAL
    assert spec.fill.how == "replace"
    assert spec.fill.value == value


def test_a_mask_that_hides_nothing_vanishes():
    assert only_spec(trace(lambda w: torch.where(positions(w)[1] >= 0, w, NEG))).mask == Full()


@pytest.mark.parametrize(
    "fill",
    [
        lambda w: w.masked_fill(~keep(w), -9e3),
        lambda w: w.masked_fill(~keep(w), 0.0),
        lambda w: w.masked_fill(~keep(w), math.inf),
        lambda w: torch.where(keep(w), w, torch.arange(w.shape[-1]).to(w.dtype)),
        lambda w: torch.where(keep(w), w, w * 2),
    ],
)
def test_what_hides_nothing_is_no_mask(fill):
    spec = only_spec(trace(fill))
    assert spec.mask == Full()
    assert [type(step) for step in spec.scores] == [Pointwise]


def test_a_value_beyond_the_type_is_what_the_type_makes_of_it():
    spec = only_spec(trace(lambda w: torch.where(keep(w), w, -1e30), torch.float16))
    assert spec.fill.value == NEG
    spec = only_spec(trace(lambda w: torch.where(keep(w), w, -1e30), torch.bfloat16))
    assert spec.fill.value == pytest.approx(-1e30, rel=2**-8)


def test_scaling_a_masked_score_scales_what_stands_in_its_place():
    assert only_spec(trace(lambda w: w.masked_fill(~keep(w), -4e4) * 0.5)).fill.value == -2e4
    assert only_spec(trace(lambda w: w.masked_fill(~keep(w), NEG) * 0.5)).fill.value == NEG
    overflow = trace(lambda w: w.masked_fill(~keep(w), torch.finfo(w.dtype).min) * 4.0, torch.float32)
    assert only_spec(overflow).fill.value == NEG
    flipped = only_spec(trace(lambda w: w.masked_fill(~keep(w), NEG) * -0.5))
    assert flipped.mask == Full()
    assert [type(step) for step in flipped.scores] == [Pointwise, Scale]


def test_a_shift_of_the_scores_shifts_a_mild_fill():
    spec = only_spec(trace(lambda w: (w + 500.0).masked_fill(~keep(w), -1e4)))
    assert spec.fill.value == -10500.0


def bias(w: Tensor) -> Tensor:
    i, j = positions(w)
    return (i * 3 + j) % 5 * 0.25


def first(w: Tensor) -> Tensor:
    """Hide the first keys: with the causal mask, the first queries see nothing."""
    return (positions(w)[1] < 3).expand_as(w)


def later(w: Tensor) -> Tensor:
    i, j = positions(w)
    return j >= i


def hidden(w: Tensor, mask: Tensor) -> Tensor:
    """Add the least number where ``mask`` hides, and for the first queries once more, which overflows."""
    again = (positions(w)[0] < 2).expand_as(mask)
    return w + LEAST * mask.to(w.dtype) + LEAST * again.to(w.dtype)


LEAST = torch.finfo(torch.float64).min
SEEN_LATER = {
    "another_fill": lambda w: w.masked_fill(~keep(w), -2e4).masked_fill(keep(w).mT & (bias(w) > 0), -1e5),
    "infinite_fill": lambda w: w.masked_fill(~keep(w), -1e9).masked_fill(bias(w) == 0, NEG),
    "softcap": lambda w: 5 * torch.tanh(w.masked_fill(~keep(w), -2e4).masked_fill(bias(w) == 0, -2e4) / 5),
    "clamp": lambda w: (w.masked_fill(~keep(w), NEG).masked_fill(bias(w) == 0, NEG)).clamp(-3.0, 3.0),
    "shift": lambda w: (w + 2.0).masked_fill(~keep(w), -2e4).masked_fill(bias(w) == 0, -3e4),
    "negative": lambda w: w.masked_fill(~keep(w), -2e4).masked_fill(bias(w) == 0, -2e4) * -0.5,
    "least_over_infinite": lambda w: w.masked_fill(~keep(w), NEG).masked_fill(first(w), LEAST) + bias(w),
    "least_added_twice": lambda w: hidden(w, later(w)) / 2 + bias(w),
}


@pytest.mark.parametrize("name", SEEN_LATER)
def test_masks_that_later_steps_see_become_steps(name):
    q, k, v = make_inputs(CASES["causal_by_tril"])
    f = SEEN_LATER[name]
    t = trace(f)
    t.rewrite(t.detect()[0])
    expected = f(q @ k.mT).softmax(-1) @ v
    torch.testing.assert_close(t.run(q, k, v), expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_bare_exponentials_of_masks_that_later_steps_see_are_refused():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = SEEN_LATER["another_fill"](q @ k.mT).exp()
        return (e / e.sum(-1, keepdim=True)) @ v

    found, missed = traced(attention, make_inputs(CASES["causal_by_tril"])).detect()
    assert not found
    assert [m.code for m, _ in missed] == ["empty-rows-differ"]
