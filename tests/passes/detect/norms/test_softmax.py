"""Anchors that are softmax ops: which axis, what is normalized, and what is not part of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.ir import Softmax
from attnc.passes.detect.norms import softmax
from attnc.passes.detect.norms.anchor import Anchor
from tests.rewriting import traced

X = torch.randn(2, 3, 4, 5)


def anchors(f) -> list[Anchor]:
    return softmax.find(traced(f, (X,)).work)


def only(f) -> Anchor:
    found = anchors(f)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dim", [0, 1, 3, -1, -2])
def test_axis_and_input(dim):
    anchor = only(lambda x: (x * 2).softmax(dim) + 1)
    assert anchor.dim == dim % 4
    assert anchor.scores.target is torch.ops.aten.mul.Tensor
    assert str(anchor.norm) == "softmax"
    assert anchor.denominator is None


def test_exp_of_log_softmax():
    anchor = only(lambda x: F.log_softmax(x, -1).exp())
    assert anchor.weights.target is torch.ops.aten.exp.default
    assert len(anchor.inner) == 2


def test_log_softmax_alone_is_no_anchor():
    assert not anchors(lambda x: F.log_softmax(x, -1))


def test_safe_softmax_gives_zeros_to_empty_rows():
    assert only(lambda x: torch.ops.aten._safe_softmax.default(x, -1)).norm.safe


def test_upcast():
    half = X.bfloat16()
    found = softmax.find(traced(lambda x: F.softmax(x, -1, dtype=torch.float32), (half,)).work)
    assert found[0].norm.upcast
    assert not only(lambda x: F.softmax(x, -1, dtype=torch.float32)).norm.upcast


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x - x.amax(-1, keepdim=True)).softmax(-1),
        lambda x: (x - x.max(-1, keepdim=True).values).softmax(-1),
        lambda x: (x - x.amax(-1)[..., None]).softmax(-1),
        lambda x: (x - x.amax((-1, -2), keepdim=True).detach()).softmax(-1),
        lambda x: (x - x.amax(-1, keepdim=True).expand(2, 3, 4, 5)).softmax(-1),
    ],
)
def test_a_maximum_that_is_the_same_along_the_row_is_left_out(f):
    assert only(f).scores.op == "placeholder"


def column(x: Tensor) -> Tensor:
    return x - x.amax(-2, keepdim=True)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: column(x).softmax(-1),
        lambda x: (x - x.amax(-1, keepdim=True)).softmax(-2),
        lambda x: (x[..., :4] - x[..., :4].amax(-1).unsqueeze(-2)).softmax(-1),
        lambda x: torch.sub(x, x.amax(-1, keepdim=True), alpha=2).softmax(-1),
        lambda x: (x.amax(-1, keepdim=True) - x).softmax(-1),
        lambda x: (x - x.mean(-1, keepdim=True)).softmax(-1),
        lambda x: (x - (x + 1).amax(-1, keepdim=True)).softmax(-1),
    ],
)
def test_what_is_no_maximum_of_the_row_stays(f):
    assert only(f).scores.target in (torch.ops.aten.sub.Tensor, torch.ops.aten.rsub.Scalar)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: torch.where((x == -math.inf).all(-1, keepdim=True), torch.zeros_like(w), w),
        lambda x, w: torch.where(~(x != -math.inf).any(-1, True), torch.full_like(w, 0), w),
        lambda x, w: torch.where(
            (x == -math.inf).logical_not().any(-1, keepdim=True).logical_not(), torch.zeros_like(w), w
        ),
        lambda x, w: torch.where((x != -math.inf).any(-1, True), w, torch.zeros_like(w)),
        lambda x, w: torch.where(
            (x == -math.inf).logical_not().any(-1, keepdim=True), w, torch.zeros_like(w)
        ),
    ],
)
def test_rows_that_see_nothing_are_zeroed(f):
    """The tail of scaled_dot_product_attention when it is decomposed."""
    found = softmax.find(traced(lambda x: f(x, x.softmax(-1)), (X,)).work)
    assert [a.norm for a in found] == [Softmax(safe=True)]
    assert found[0].weights.target is torch.ops.aten.where.self


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: torch.where((x == -math.inf).any(-1, keepdim=True), torch.zeros_like(w), w),
        lambda x, w: torch.where((x == -math.inf).all(-2, keepdim=True), torch.zeros_like(w), w),
        lambda x, w: torch.where((x == -math.inf).all(-1, keepdim=True), w, torch.zeros_like(w)),
        lambda x, w: torch.where((x == math.inf).all(-1, keepdim=True), torch.zeros_like(w), w),
        lambda x, w: torch.where((x == -math.inf).all(-1, keepdim=True), torch.ones_like(w), w),
    ],
)
def test_other_choices_after_the_softmax_are_not_its_tail(f):
    found = softmax.find(traced(lambda x: f(x, x.softmax(-1)), (X,)).work)
    assert [a.norm for a in found] == [Softmax()]


@pytest.mark.parametrize(
    ("f", "safe"),
    [
        (lambda w: w.nan_to_num(), True),
        (lambda w: torch.nan_to_num(w, 0.0), True),
        (lambda w: w.nan_to_num(nan=0.0, posinf=1.0), True),
        (lambda w: w.nan_to_num(0.5), False),
        (lambda w: w.exp().nan_to_num(), False),
    ],
)
def test_nan_made_zero_is_a_safe_softmax(f, safe):
    found = softmax.find(traced(lambda x: f(x.softmax(-1)), (X,)).work)
    assert [a.norm for a in found] == [Softmax(safe=safe)]
    assert ("nan_to_num" in str(found[0].weights.target)) == safe


def test_nan_that_a_step_on_the_scores_makes_is_not_that_of_an_empty_row():
    """An infinite bias times zero is NaN, which ``nan_to_num`` hides and a softmax of the spec would not."""

    def attention(q, k, v, bias, gain):
        return ((q @ k.mT + bias) * gain).softmax(-1).nan_to_num(0.0) @ v

    args = (*(torch.randn(2, 3, 5, 4) for _ in range(3)), torch.randn(5, 5), torch.ones(5, 5))
    sites, missed = traced(attention, args).detect()
    assert not sites
    assert [m.code for m, _ in missed] == ["nan-made-zero"]
    safe = traced(lambda q, k, v, bias, gain: attention(q, k, v, bias, 2.0), args).detect()[0]
    assert [f.match.spec.norm for f in safe] == [Softmax(safe=True)]
