"""Weights divided by their own sum, whatever the function of the score, early or late."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.codegen import flex, sdpa
from attnc.ir import Elementwise, Normalized
from attnc.masks import CAUSAL, Full
from attnc.printer import parse
from tests.passes.detect.norms.test_elementwise import ARGS, D, S, check_same, hidden, scores, trace
from tests.rewriting import only_spec, rounding, traced

TAYLOR = "((s+1.0)+((s*s)/2.0))"
HIDING = f"where((s==-inf),0.0,{TAYLOR})"


def taylor(w: Tensor) -> Tensor:
    """The first terms of the exponential; at least 1/2."""
    return 1 + w + w * w / 2


def shares(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("weigh", "norm", "mask"),
    [
        (lambda w: shares(taylor(w)), Normalized(TAYLOR), Full()),
        (lambda w: (p := taylor(w)) / p.sum(dim=3).unsqueeze(-1), Normalized(TAYLOR), Full()),
        (lambda w: (p := taylor(w)) * (1 / p.sum(-1, keepdim=True)), Normalized(TAYLOR), Full()),
        (
            lambda w: (p := taylor(w)) * p.sum(-1, keepdim=True).expand(2, 3, S, S).reciprocal(),
            Normalized(TAYLOR),
            Full(),
        ),
        (lambda w: w.relu() / w.relu().sum(-1, keepdim=True), Normalized("relu(s)"), Full()),
        (lambda w: shares(F.softplus(w)), Normalized("softplus(s)"), Full()),
        (
            lambda w: (p := w.relu()) / (p.sum(-1, keepdim=True) + 1e-6),
            Normalized("relu(s)", added=1e-6),
            Full(),
        ),
        (
            lambda w: (p := w.relu() ** 2) / (1 + p.sum(-1, keepdim=True)),
            Normalized("square(relu(s))", added=1.0),
            Full(),
        ),
        (
            lambda w: (p := w.relu()) / p.sum(-1, keepdim=True).clamp(min=0.25),
            Normalized("relu(s)", least=0.25),
            Full(),
        ),
        (
            lambda w: shares(w.masked_fill(hidden(w), -math.inf).sigmoid()),
            Normalized("sigmoid(s)"),
            CAUSAL,
        ),
        (lambda w: shares(w.sigmoid().masked_fill(hidden(w), 0.0)), Normalized("sigmoid(s)"), CAUSAL),
        (lambda w: shares(taylor(w).masked_fill(hidden(w), 0.0)), Normalized(HIDING), CAUSAL),
        (lambda w: shares(torch.where(hidden(w), 0.0, taylor(w))), Normalized(HIDING), CAUSAL),
        (lambda w: shares(taylor(w.masked_fill(hidden(w), -1e4))), Normalized(TAYLOR), CAUSAL),
    ],
)
def test_weights_divided_by_their_sum(weigh, norm, mask):
    spec = only_spec(trace(weigh))
    assert (spec.norm, spec.mask) == (norm, mask)
    assert parse(str(spec)) == spec
    assert sdpa.can_run(spec).code == "sdpa-norm"
    assert flex.can_run(spec, "cpu").code == "flex-norm"
    check_same(weigh)


def late(divide, weigh=taylor):
    return traced(lambda q, k, v: divide(weigh(scores(q, k)), v), ARGS)


@pytest.mark.parametrize(
    ("divide", "norm"),
    [
        (lambda p, v: (p @ v) / p.sum(-1, keepdim=True), Normalized(TAYLOR)),
        (lambda p, v: (p @ v) / (p.sum(-1, keepdim=True) + 0.5), Normalized(TAYLOR, added=0.5)),
        (
            lambda p, v: (p @ v) / (0.5 + p.sum(-1, keepdim=True)).clamp(min=8),
            Normalized(TAYLOR, added=0.5, least=8.0),
        ),
        (
            lambda p, v: torch.einsum("bhij,bhjd->bihd", p, v) / p.sum(-1).transpose(1, 2)[..., None],
            Normalized(TAYLOR),
        ),
        (lambda p, v: (p @ v) * p.sum(-1, keepdim=True).reciprocal(), Normalized(TAYLOR)),
    ],
)
def test_the_division_may_come_after_the_values(divide, norm):
    t = late(divide)
    found, missed = t.detect()
    assert [f.match.spec.norm for f in found] == [norm], missed
    assert not found[0].match.escapes
    t.rewrite(found)
    expected = divide(taylor(scores(*ARGS[:2])), ARGS[2])
    torch.testing.assert_close(t.run(*ARGS), expected, rtol=1e-10, atol=64 * rounding(ARGS, D + S))


@pytest.mark.parametrize(
    "divide",
    [
        lambda p, v: (p @ v) / p.sum(-2).unsqueeze(-1),  # another axis, of the same length
        lambda p, v: (p @ v) / (p + 1).sum(-1, keepdim=True),
        lambda p, v: (p @ v) / p.flip(2).sum(-1, keepdim=True),  # another row
        lambda p, v: (p @ v) / p.sum((-1, -2), keepdim=True),
    ],
)
def test_a_later_division_by_something_else_stays_outside(divide):
    (found,), _ = late(divide).detect()
    assert found.match.spec.norm == Elementwise(TAYLOR)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda w: taylor(w) / taylor(w).sum(-2, keepdim=True),
        lambda w: taylor(w) / taylor(w + 1).sum(-1, keepdim=True),
        lambda w: taylor(w) / taylor(w).sum((1, 3), keepdim=True),
        lambda w: shares(taylor(w)).masked_fill(hidden(w), 0.0),  # what is zeroed counts in the sum
        lambda w: taylor(w) / taylor(w).masked_fill(hidden(w), 0.0).sum(-1, keepdim=True),
        lambda w: taylor(w).masked_fill(hidden(w), 0.0) / taylor(w).sum(-1, keepdim=True),
        lambda w: taylor(w) / taylor(w).sum(-1, keepdim=True).clamp(min=0.1, max=9.0),
        lambda w: taylor(w).div(taylor(w).sum(-1, keepdim=True), rounding_mode="floor"),
        lambda w: taylor(w) / (taylor(w).sum(-1, keepdim=True) + w),
    ],
)
def test_other_divisions_are_refused(weigh):
    found, missed = trace(weigh).detect()
    assert not found
    assert missed


def test_weights_read_elsewhere_escape():
    def weigh(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = shares(taylor(scores(q, k)))
        return w @ v, w

    (found,), _ = traced(weigh, ARGS).detect()
    assert found.match.escapes


def test_a_row_whose_sum_is_zero_is_what_the_model_makes_of_it():
    def weigh(w: Tensor) -> Tensor:
        return shares((w - 100).relu())

    assert only_spec(trace(weigh)).norm == Normalized("relu(s)")
    check_same(weigh)  # NaN everywhere
