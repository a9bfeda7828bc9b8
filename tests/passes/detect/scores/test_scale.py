"""Constant factors add up to one scale; tensors become gains; what cannot be is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc.ir import Gain, Pointwise, Scale
from tests.corpus import CASES, make_inputs
from tests.rewriting import only_spec, traced

ARGS = make_inputs(CASES["no_scale"])


def trace(f, *more: Tensor):
    return traced(lambda q, k, v, *m: f(q @ k.mT, *m).softmax(-1) @ v, (*ARGS, *more))


@pytest.mark.parametrize(
    ("f", "factor"),
    [
        (lambda w: w * 0.25, 0.25),
        (lambda w: 0.25 * w, 0.25),
        (lambda w: w / 4, 0.25),
        (lambda w: w / math.sqrt(16), 0.25),
        (lambda w: torch.mul(w, torch.full((1, 1, 1), 0.25, dtype=w.dtype)), 0.25),
        (lambda w: w / torch.full((), 4.0, dtype=w.dtype), 0.25),
        (lambda w: w.div(torch.full((), 16.0, dtype=w.dtype).sqrt()), 0.25),
        (lambda w: -w, -1.0),
        (lambda w: w * 3 / 4, 0.75),
        (lambda w: (w * 0.5).transpose(-1, -2).transpose(-1, -2) * 0.5, 0.25),
    ],
)
def test_spellings_of_a_factor(f, factor):
    spec = only_spec(trace(f))
    assert spec.scores == (Scale(factor),)


def test_a_factor_of_one_is_none():
    assert only_spec(trace(lambda w: w * 2 / 2)).scores == ()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_factors_multiply(factors):
    def scaled(w: Tensor) -> Tensor:
        for x in factors:
            w = w * x
        return w

    assert only_spec(trace(scaled)).scale == pytest.approx(math.prod(factors), rel=1e-12)


def test_a_tensor_is_a_gain():
    t = torch.randn(3, 1, 1, dtype=torch.float64)
    spec = only_spec(trace(lambda w, m: w * m, t))
    assert spec.scores == (Gain("c0"),)
    assert spec.captured[0].shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ("f", "code"),
    [
        (lambda w: w / 0.0, "division-by-zero"),
        (lambda w: w * math.inf, "scale-not-finite"),
        (lambda w: torch.div(w, 2, rounding_mode="floor"), "score-step-unknown"),
        (lambda w: w * w.mT.mT.flip(-1), "scores-combined"),
    ],
)
def test_what_is_no_factor_is_refused(f, code):
    found, missed = trace(f).detect()
    assert not found
    assert missed[0][0].code == code


def test_division_by_a_tensor_is_no_gain():
    spec = only_spec(trace(lambda w, m: w / m, torch.rand(3, 1, 1, dtype=torch.float64) + 1))
    assert spec.scores == (Pointwise("(s/c0)"),)
