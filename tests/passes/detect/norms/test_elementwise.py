"""Weights that are no softmax: sites of their own kind, or named for what they are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen import sdpa
from attnc.ir import Elementwise, RoundedSoftmax, SignedSoftmax, Softmax
from attnc.masks import CAUSAL, Full
from attnc.printer import parse
from tests.rewriting import Traced, only_spec, rounding, traced

S, D = 7, 8


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ARGS = (randn(2, 3, S, D, seed=1), randn(2, 3, S, D, seed=2), randn(2, 3, S, 5, seed=3))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 8


def hidden(w: Tensor) -> Tensor:
    return torch.ones(w.shape[-2:], dtype=torch.bool).triu(1)


def trace(weigh, *more: Tensor) -> Traced:
    return traced(lambda q, k, v, *m: weigh(scores(q, k), *m) @ v, (*ARGS, *more))


def check_same(weigh, *more: Tensor) -> None:
    """Rewrite and compare with the original, in fp64."""
    args = (*ARGS, *more)
    t = trace(weigh, *more)
    found, missed = t.detect()
    assert len(found) == 1, missed
    assert not found[0].match.escapes
    t.rewrite(found)
    expected = weigh(scores(*ARGS[:2]), *more) @ ARGS[2]
    torch.testing.assert_close(
        t.run(*args), expected, rtol=1e-10, atol=64 * rounding(ARGS, D + S), equal_nan=True
    )


@pytest.mark.parametrize(
    ("weigh", "norm", "mask"),
    [
        (lambda w: w.sigmoid(), "sigmoid(s)", Full()),
        (lambda w: (w - math.log(S)).sigmoid(), "sigmoid(s)", Full()),
        (lambda w: w.masked_fill(hidden(w), -math.inf).sigmoid(), "sigmoid(s)", CAUSAL),
        (lambda w: w.sigmoid().masked_fill(hidden(w), 0.0), "sigmoid(s)", CAUSAL),
        (lambda w: torch.where(hidden(w), torch.zeros_like(w), w.sigmoid()), "sigmoid(s)", CAUSAL),
        (lambda w: w.relu() / S, "(relu(s)/7.0)", Full()),
        (lambda w: w.relu() ** 2 / S, "(square(relu(s))/7.0)", Full()),
        (lambda w: w.relu().square() * (1 / 8), "(square(relu(s))*0.125)", Full()),
        (lambda w: w.exp(), "exp(s)", Full()),
        (lambda w: F.gelu(w), "gelu(s)", Full()),
        (lambda w: F.softplus(w), "softplus(s)", Full()),
    ],
)
def test_weights_of_single_scores(weigh, norm, mask):
    spec = only_spec(trace(weigh))
    assert (spec.norm, spec.mask) == (Elementwise(norm), mask)
    assert parse(str(spec)) == spec
    assert sdpa.can_run(spec).code in ("sdpa-norm", "sdpa-scores")
    check_same(weigh)


def test_a_constant_before_a_function_is_not_dropped():
    assert [str(s) for s in only_spec(trace(lambda w: (w + 2.0).sigmoid())).scores] == [
        "scale(0.125)",
        "pointwise((s+2.0))",
    ]


@pytest.mark.parametrize(
    ("weigh", "mask"),
    [
        (lambda w: w.sign() * w.abs().softmax(-1), Full()),
        (lambda w: w.abs().softmax(-1) * w.sgn(), Full()),
        (lambda w: w.sign() * w.abs().masked_fill(hidden(w), -math.inf).softmax(-1), CAUSAL),
        (lambda w: w.sign() * (w.abs() * 0.5).softmax(-1), Full()),
    ],
)
def test_signed_softmax(weigh, mask):
    spec = only_spec(trace(weigh))
    assert (spec.norm, spec.mask) == (SignedSoftmax(), mask)
    assert parse(str(spec)) == spec
    check_same(weigh)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda w: (w - w.logsumexp(-1, keepdim=True)).exp(),
        lambda w: (w - w.logsumexp(-1).unsqueeze(-1)).exp(),
        lambda w: torch.exp(w - torch.logsumexp(w, dim=3, keepdim=True)),
        lambda w: (w - torch.logsumexp(w, -1)[..., None]).exp(),
    ],
)
def test_logsumexp_spellings(weigh):
    assert only_spec(trace(weigh)).norm == Softmax()
    check_same(weigh)


def by_logsumexp(w: Tensor) -> Tensor:
    return (w - w.logsumexp(-1, keepdim=True)).exp()


ROWS = torch.ones(2, 1, S, 1, dtype=torch.bool)
ROWS[1, 0, 3] = False
MIN = torch.finfo(torch.float64).min


@pytest.mark.parametrize(
    "weigh",
    [
        lambda w, m: by_logsumexp(w.masked_fill(~m, MIN)),
        lambda w, m: by_logsumexp(w + torch.zeros_like(m, dtype=w.dtype).masked_fill(~m, MIN)),
        lambda w, m: by_logsumexp(w + m.to(w.dtype)),
    ],
)
def test_a_logsumexp_that_may_round_away_the_keys_is_read_as_written(weigh):
    """With a row of finfo.min the weights are all 1, so it is no softmax."""
    assert only_spec(trace(weigh, ROWS)).norm == RoundedSoftmax()
    check_same(weigh, ROWS)


def test_a_logsumexp_of_rows_that_see_a_key_is_a_softmax():
    weigh = lambda w: by_logsumexp(w.masked_fill(hidden(w), MIN))  # noqa: E731
    assert only_spec(trace(weigh)).mask == CAUSAL
    check_same(weigh)


def sparsemax(s: Tensor) -> Tensor:
    """Sparsemax (arXiv:1602.02068), algorithm 1."""
    z = s.sort(-1, descending=True).values
    c, r = z.cumsum(-1) - 1, torch.arange(1, S + 1, dtype=s.dtype)
    n = (r * z > c).sum(-1, keepdim=True)
    return (s - c.gather(-1, n - 1) / n).clamp(min=0)


MIX = randn(3, 3, seed=9)


@pytest.mark.parametrize(
    ("weigh", "more", "code"),
    [
        (lambda w: w.softmax(-2), (), "query-axis-softmax"),
        (lambda w: w.softmax(1), (), "softmax-over-shared-axis"),
        (lambda w, m: torch.einsum("gh,bhij->bgij", m, w.softmax(-1)), (MIX,), "talking-heads"),
        (
            lambda w: torch.einsum("gh,bhij->bgij", torch.eye(3, dtype=w.dtype), w).softmax(-1),
            (),
            "talking-heads",
        ),
        (
            lambda w: (
                F.linear(w.permute(0, 2, 3, 1), torch.eye(3, dtype=w.dtype)).permute(0, 3, 1, 2).softmax(-1)
            ),
            (),
            "talking-heads",
        ),
        (
            lambda w: F.conv2d(w, torch.ones(3, 1, 1, 3, dtype=w.dtype), padding=(0, 1), groups=3).softmax(
                -1
            ),
            (),
            "score-convolution",
        ),
        (sparsemax, (), "entmax"),
        (lambda w: w.relu() / w.relu().sum(-2, keepdim=True), (), "not-softmax"),
        (lambda w: w, (), "linear-attention"),
        (lambda w: w.sign() * (w.abs() + 1).relu().softmax(-1), (), "signed-softmax"),
        (lambda w: w.sign() * w.abs().masked_fill(hidden(w), -1e9).softmax(-1), (), "signed-softmax"),
    ],
)
def test_what_is_no_single_pass_is_named(weigh, more, code):
    found, missed = trace(weigh, *more).detect()
    assert not found
    assert code in [m.code for m, _ in missed]


@pytest.mark.parametrize(
    ("weigh", "norm"),
    [
        (lambda w: (w.relu() + 1).log1p().masked_fill(hidden(w), 0.0), "log1p(s)"),
        (lambda w: torch.where(hidden(w), 0.0, w**2), "square(s)"),
    ],
)
def test_zeroed_weights_of_a_function_that_does_not_vanish_get_a_choice_that_does(weigh, norm):
    spec = only_spec(trace(weigh))
    assert (spec.norm, spec.mask) == (Elementwise(f"where((s==-inf),0.0,{norm})"), CAUSAL)
    assert spec.norm.hides
    check_same(weigh)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda w, m: ((w + m) ** 2).masked_fill(hidden(w), 0.0),  # a bias may hold -inf
        lambda w, m: (w.masked_fill(m > 0, -math.inf) ** 2).masked_fill(hidden(w), 0.0),
        lambda w, m: ((w.abs().log() + 1) ** 2).masked_fill(hidden(w), 0.0),
        lambda w, m: (torch.where(m > 0, w, -math.inf).tanh() ** 2).masked_fill(hidden(w), 0.0),
    ],
)
def test_zeroed_weights_are_refused_where_a_score_may_be_minus_infinity_besides(weigh):
    found, missed = trace(weigh, randn(S, S, seed=7)).detect()
    assert not found
    assert [m.code for m, _ in missed] == ["not-softmax"]


def test_the_softmax_inside_of_signed_weights_is_no_miss():
    found, missed = trace(lambda w: w.sign() * w.abs().softmax(-1)).detect()
    assert (len(found), missed) == (1, [])


def test_other_signs_are_no_signed_softmax():
    found, _ = trace(lambda w: (w + 1).sign() * w.abs().softmax(-1)).detect()
    assert not found
