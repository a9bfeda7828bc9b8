"""Elementwise chains become one expression that computes what the graph computes; nothing else passes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.ir import Bias, Gain, Pointwise, Scale, Softcap
from attnc.masks import CAUSAL, Full
from attnc.printer import parse
from tests.corpus import CASES, make_inputs
from tests.rewriting import Traced, only_spec, rounding, traced

ARGS = make_inputs(CASES["no_scale"])
SIDE = torch.randn(1, 3, 7, 17, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
KEEP = torch.rand(2, 1, 7, 17, generator=torch.Generator().manual_seed(6)) < 0.7


def trace(f, *more: Tensor) -> Traced:
    return traced(lambda q, k, v, *m: f(q @ k.mT, *m).softmax(-1) @ v, (*ARGS, *more))


def check_same(f, *more: Tensor) -> None:
    """Rewrite and compare with the original, in fp64."""
    args = (*ARGS, *more)
    t = trace(f, *more)
    found, _ = t.detect()
    t.rewrite(found)
    assert any(n.target is torch.ops.attnc.attend.default for n in t.graph.nodes)
    expected = f(ARGS[0] @ ARGS[1].mT, *more).softmax(-1) @ ARGS[2]
    torch.testing.assert_close(
        t.run(*args), expected, rtol=1e-10, atol=64 * rounding(ARGS, 30), equal_nan=True
    )


@pytest.mark.parametrize(
    ("f", "expr"),
    [
        (lambda w: w.abs(), "abs(s)"),
        (lambda w: torch.maximum(w, -w), "maximum(s,neg(s))"),
        (lambda w: w.clamp(-2, 2), "minimum(maximum(s,-2.0),2.0)"),
        (lambda w: torch.clamp(w, max=2.0), "minimum(s,2.0)"),
        (lambda w: w.clamp_min(-2.0), "maximum(s,-2.0)"),
        (lambda w: torch.maximum(w, torch.full((), -2.0, dtype=w.dtype)), "maximum(s,-2.0)"),
        (lambda w: F.hardtanh(w, -2.0, 2.0), "minimum(maximum(s,-2.0),2.0)"),
        (lambda w: w.sign(), "sign(s)"),
        (lambda w: w.cos(), "cos(s)"),
        (lambda w: w**2, "square(s)"),
        (lambda w: w * w, "(s*s)"),
        (lambda w: w.relu(), "relu(s)"),
        (lambda w: F.gelu(w), "gelu(s)"),
        (lambda w: F.gelu(w, approximate="tanh"), "gelu_tanh(s)"),
        (lambda w: F.leaky_relu(w, 0.1), "where((s>0.0),s,(s*0.1))"),
        (lambda w: w * w.sigmoid(), "(s*sigmoid(s))"),
        (lambda w: w.abs().log1p() * w.sign(), "(log1p(abs(s))*sign(s))"),
        (lambda w: w.abs().sqrt(), "sqrt(s)"),
        (lambda w: w.erf(), "erf(s)"),
        (lambda w: 1.0 / (1.0 + w.exp()), "reciprocal(s)"),
        (lambda w: torch.where(w > 0, w, 0.5 * w), "where((s>0.0),s,(s*0.5))"),
    ],
)
def test_functions_of_the_score(f, expr):
    last = only_spec(trace(f)).scores[-1]
    if isinstance(last, Pointwise) and "where" not in expr:
        assert last.expr == expr
    check_same(f)


@pytest.mark.parametrize(
    ("f", "side"),
    [
        (lambda w, c: w / c, SIDE),
        (lambda w, c: c - w, SIDE),
        (lambda w, c: torch.add(w, c, alpha=0.5), SIDE),
        (lambda w, c: torch.maximum(w, c), SIDE),
        (lambda w, c: w * c.sigmoid() + (1 - c.sigmoid()) * w.relu(), SIDE[:, :, :1]),
        (lambda w, c: torch.where(c, w, 0.5 * w), KEEP),
        (lambda w, c: w.masked_fill(~c, 0.0), KEEP),
        (lambda w, c: w.masked_fill(~c, -3.0), KEEP),
    ],
)
def test_tensors_beside_the_score(f, side):
    spec = only_spec(trace(f, side))
    assert any(isinstance(s, Pointwise) for s in spec.scores)
    assert spec.mask == Full()
    assert parse(str(spec)) == spec
    check_same(f, side)


def test_known_steps_below_an_expression_keep_their_names():
    spec = only_spec(trace(lambda w, c: (torch.tanh(w / 8) * 2 * c + 1).relu(), SIDE[:, :, :1, :1]))
    assert [type(s) for s in spec.scores] == [Scale, Softcap, Gain, Pointwise, Pointwise]
    assert [str(s) for s in spec.scores[-2:]] == ["pointwise((s+1.0))", "pointwise(relu(s))"]


@pytest.mark.parametrize("value", [torch.finfo(torch.float64).min, -math.inf])
def test_a_bound_at_the_least_number_says_nothing(value):
    """The bound that XGLM puts on masked scores."""
    low = torch.finfo(torch.float64).min

    def bounded(w: Tensor) -> Tensor:
        keep = torch.ones(w.shape[-2:], dtype=torch.bool).tril()
        w = w + torch.zeros_like(keep, dtype=w.dtype).masked_fill(~keep, value)
        return torch.max(w, torch.full((), low, dtype=w.dtype))

    spec = only_spec(trace(bounded))
    assert (spec.scores, spec.mask, spec.fill.value) == ((), CAUSAL, low)
    check_same(bounded)


def test_a_bound_stays_where_a_bias_may_hold_minus_infinity():
    low = torch.finfo(torch.float64).min
    bias = SIDE.masked_fill(SIDE > 0, -math.inf)
    bias[0, 0, 0] = -math.inf
    spec = only_spec(trace(lambda w, c: (w + c).clamp_min(low), bias))
    assert [type(s) for s in spec.scores] == [Bias, Pointwise]
    check_same(lambda w, c: (w + c).clamp_min(low), bias)


@pytest.mark.parametrize("f", [lambda w: w * 2 + 1, lambda w: w.clamp_max(3.0), lambda w: w.sinh()])
def test_a_mask_moves_behind_what_keeps_it_hidden(f):
    def masked(w: Tensor) -> Tensor:
        keep = torch.ones(w.shape[-2:], dtype=torch.bool).tril()
        return f(w.masked_fill(~keep, -math.inf))

    spec = only_spec(trace(masked))
    assert spec.mask == CAUSAL
    assert spec.fill.value == -math.inf
    check_same(masked)


@pytest.mark.parametrize(
    "f", [lambda w: w.abs(), lambda w: 5 * torch.tanh(w / 5), lambda w: -w, lambda w: w.exp(), torch.relu]
)
def test_a_mask_inside_is_part_of_the_scores(f):
    """What hid a key hides it no longer: the fill goes through the function like any score."""

    def masked(w: Tensor, keep: Tensor) -> Tensor:
        return f(w.masked_fill(~keep, -20000.0))

    spec = only_spec(trace(masked, KEEP))
    assert spec.mask == Full()
    assert spec.captured[0].dtype == torch.bool
    check_same(masked, KEEP)


@pytest.mark.parametrize(
    "f",
    [
        lambda w: w + w.roll(1, -1),
        lambda w: w * w.flip(-1),
        lambda w: w.cumsum(-1) + w,
        lambda w: torch.div(w, 2, rounding_mode="floor"),
        lambda w: F.softplus(w, beta=2.0),
        lambda w: torch.lgamma(w.abs() + 1),
    ],
)
def test_what_is_not_elementwise_does_not_pass(f):
    found, missed = trace(f).detect()
    assert not [x for x in found if not x.match.escapes]
    assert found or missed


def test_scores_against_their_own_transpose_are_refused():
    q = ARGS[0]
    found, missed = traced(
        lambda q, v: ((w := q @ q.mT) + w.mT.relu()).softmax(-1) @ v, (q, ARGS[2][:, :, :7])
    ).detect()
    assert not found
    assert missed[0][0].code == "scores-combined"
