"""Anchors spelled out as exponentials over their sum.

Each divided by the sum of its own row, or not at all.
"""

from __future__ import annotations

import pytest
import torch

from attnc.passes.detect.norms import exp_sum
from attnc.passes.detect.norms.anchor import Anchor
from tests.rewriting import traced

X = torch.randn(2, 3, 4, 4)


def anchors(f) -> list[Anchor]:
    return exp_sum.find(traced(f, (X,)).work)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (e := x.exp()) / e.sum(-1, keepdim=True),
        lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(-1),
        lambda x: (e := x.exp()) / e.sum(-1)[..., None].expand_as(x),
        lambda x: (e := x.exp()) / e.sum(-1).view(2, 3, 4, 1),
        lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / e.sum(-1, True),
        lambda x: (e := x.exp()).div(e.sum(-1, True).clone()),
        lambda x: (e := x.exp()) * e.sum(-1, True).reciprocal(),
        lambda x: (1 / (e := x.exp()).sum(-1))[..., None] * e,
        lambda x: (e := (x - x.amax(-1, True)).exp()) / e.sum(-1, True).clamp(min=1e-6),
        lambda x: (e := (x - x.amax(-1, True)).exp()) / (e.sum(-1, True) + 1e-9),
    ],
)
def test_division_by_the_sum_of_the_row(f):
    found = [a for a in anchors(f) if a.denominator is None]
    assert len(found) == 1
    assert found[0].dim == 3
    assert found[0].weights.target in (torch.ops.aten.div.Tensor, torch.ops.aten.mul.Tensor)
    assert found[0].scores.op == "placeholder"
    assert str(found[0].norm) == "softmax"


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(-2),
        lambda x: (e := x.exp()) / e.sum(-1)[0, :1],
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x: (e := x.exp()) / e.sum(-1, True).transpose(-1, -2),
        lambda x: (e := x.exp()) / e.sum(-1, True).view(2, 3, 1, 4),
        lambda x: torch.div(e := x.exp(), e.sum(-1, True), rounding_mode="floor"),
        lambda x: (e := x.exp()).sum(-1, True) / e,
        lambda x: (e := x.exp())[0:1] / e.sum(-1, True),
        lambda x: (e := x.exp()) / e.sum(-1, True).clamp(min=1e-6),
        lambda x: (e := (x - x.amax(-1, True)).exp()) / e.sum(-1, True).clamp(min=1.5),
        lambda x: (e := (x - x.amax(-1, True)).exp()) / (e.sum(-1, True) + 1e-3),
        lambda x: (e := (x - x.amax((-1, -2), True)).exp()) / e.sum(-1, True).clamp(min=1e-6),
        lambda x: (e := (x - x.max()).exp()) / (e.sum(-1, True) + 1e-9),
        lambda x: (e := (x - x.amax(-1, True)).exp()) / (e.sum(-1, True) + x.amax(-1, True).exp()),
        lambda x: (e := x.exp()) * e.sum(-1, True),
        lambda x: (e := x.exp()).neg() / e.sum(-1, True),
    ],
)
def test_any_other_division_is_none(f):
    assert not [a for a in anchors(f) if a.denominator is None]


@pytest.mark.parametrize(
    ("f", "bare"),
    [
        (lambda x: (e := (x - x.amax(-1, True)).exp()) / e.sum(-1, True), False),
        (lambda x: (e := (x - x.max(-1, True)[0]).exp()) / e.sum(-1, True), False),
        (lambda x: (e := (x - x.amax((-1, -2), True)).exp()) / e.sum(-1, True), True),
        (lambda x: (e := (x - x.max()).exp()) / e.sum(-1, True), True),
        (lambda x: (e := x.exp()) / e.sum(-1, True), True),
    ],
)
def test_only_the_maximum_of_the_row_itself_keeps_the_sum_from_vanishing(f, bare):
    assert [a.bare for a in anchors(f)] == [bare]


def test_one_more_in_the_denominator_is_a_sink_of_zero():
    found = anchors(lambda x: (e := x.exp()) / (1 + e.sum(-1, True)))
    assert [str(a.norm) for a in found] == ["softmax(sink=0.0)"]


def test_a_maximum_before_softmax_plus_one_is_part_of_the_meaning():
    assert not anchors(lambda x: (e := (x - x.amax(-1, True)).exp()) / (1 + e.sum(-1, True)))


def test_a_sum_over_several_axes_is_no_normalizer_of_one():
    assert not anchors(lambda x: (e := x.exp()) / e.sum((-1, -2), True))


def test_a_sum_that_divides_later_is_kept_as_the_denominator():
    found = anchors(lambda x: ((e := x.exp()) @ x) / e.sum(-1, True))
    assert len(found) == 1
    assert found[0].weights.target is torch.ops.aten.exp.default
    assert found[0].denominator is not None


@pytest.mark.parametrize(
    "f",
    [
        lambda x, m: (e := (x - m).exp()) / (e.sum(-1, keepdim=True) + (-m).exp()),
        lambda x, m: (e := (x - m).exp()) / ((-m).exp() + e.sum(-1, keepdim=True)),
        lambda x, m: (e := (x - m).exp()) * (e.sum(-1, keepdim=True) + m.neg().exp()).reciprocal(),
        lambda x, m: (e := (x - m).exp()) / (e.sum(-1) + (-m[..., 0]).exp())[..., None],
    ],
)
def test_softmax_plus_one_behind_any_shift(f):
    """Softmax-off-by-one as it is written by hand: the maximum is bounded by zero from below."""
    found = [a for a in anchors(lambda x: f(x, x.amax(-1, True).clamp(min=0))) if a.denominator is None]
    assert [str(a.norm) for a in found] == ["softmax(sink=0.0)"]
    assert found[0].scores.op == "placeholder"


def test_another_constant_is_a_sink_of_its_logarithm():
    found = anchors(lambda x: (e := x.exp()) / (2 + e.sum(-1, True)))
    assert [a.norm.sink for a in found] == [pytest.approx(0.6931471805599453)]


@pytest.mark.parametrize("between", [lambda x: x.transpose(1, 2), lambda x: x[:, None], lambda x: x.mT])
def test_the_division_may_stand_behind_views_of_the_result(between):
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))

    def attention(q, k, v):
        e = (q @ k.mT).exp()
        return between(e @ v) * between(e.sum(-1, keepdim=True)).reciprocal()

    t = traced(attention, (q, k, v))
    found, missed = t.detect()
    assert not missed
    t.rewrite(found)
    torch.testing.assert_close(t.run(q, k, v), attention(q, k, v))
