"""Any ``a * tanh(b * s)`` is a soft cap, and means what the graph computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.ir import Pointwise, Scale, Softcap
from tests.corpus import CASES, make_inputs
from tests.rewriting import only_spec, traced

ARGS = make_inputs(CASES["no_scale"])


def trace(f):
    return traced(lambda q, k, v: f(q @ k.mT).softmax(-1) @ v, ARGS)


@pytest.mark.parametrize(
    "f",
    [
        lambda w: 50.0 * torch.tanh(w / 50.0),
        lambda w: torch.tanh(w / 50.0) * 50.0,
        lambda w: torch.tanh(w * 0.02) * 50.0,
        lambda w: (0.02 * w).tanh() * torch.full((), 50.0, dtype=w.dtype),
        lambda w: (w / 50.0).tanh() / 0.02,
    ],
)
def test_spellings_of_a_cap(f):
    spec = only_spec(trace(f))
    assert [type(x) for x in spec.scores if not (isinstance(x, Scale) and abs(x.factor - 1) < 1e-12)] == [
        Softcap
    ]
    assert spec.scores[-1].cap == pytest.approx(50.0, rel=1e-12)


def test_a_bare_tanh_is_a_cap_of_one():
    assert only_spec(trace(torch.tanh)).scores == (Softcap(1.0),)


@settings(max_examples=15, deadline=None)
@given(a=st.floats(0.1, 100.0), b=st.floats(0.01, 3.0), sign=st.sampled_from([1, -1]))
def test_steps_mean_what_the_graph_computes(a, b, sign):
    b *= sign
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    y = x
    for step in only_spec(trace(lambda w: a * torch.tanh(b * w))).scores:
        y = step.apply(y, {})
    torch.testing.assert_close(y, a * torch.tanh(b * x), rtol=1e-12, atol=1e-12)


def test_a_negative_cap_is_a_cap_and_a_sign():
    assert only_spec(trace(lambda w: -50.0 * torch.tanh(w / 50.0))).scores == (Softcap(50.0), Scale(-1.0))


@pytest.mark.parametrize(
    ("f", "expr"),
    [
        (lambda w: torch.sigmoid(w / 50.0) * 50.0, "sigmoid(s)"),
        (lambda w: torch.tanh(w / 50.0 + 1.0) * 50.0, "(s+50.0)"),
        (lambda w: torch.atan(w / 50.0) * 50.0, "atan(s)"),
    ],
)
def test_what_is_not_quite_a_cap_is_an_expression(f, expr):
    assert Pointwise(expr) in only_spec(trace(f)).scores


def test_a_cap_of_zero_is_refused():
    found, missed = trace(lambda w: torch.tanh(w) * 0.0).detect()
    assert not found
    assert missed[0][0].code == "softcap-sign"
