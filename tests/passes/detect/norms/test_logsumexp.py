"""Anchors spelled with a log-sum-exp: of the same row, with a sink beside it, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.passes.detect.norms import logsumexp
from tests.rewriting import only_spec, rounding, traced

X = torch.randn(2, 3, 4, 4)
Z = torch.randn(3, 1, 1)


def found(f, *args: Tensor):
    return logsumexp.find(traced(f, args or (X,)).work)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
        lambda x: (x - x.logsumexp(-1)[..., None]).exp(),
        lambda x: (x - x.logsumexp(-1).unsqueeze(-1).expand_as(x)).exp(),
    ],
)
@pytest.mark.parametrize("keys", [4, 1])
def test_the_log_sum_of_the_row_makes_a_softmax(f, keys):
    (anchor,) = found(f, X[..., :keys])
    assert anchor.dim == 3
    assert anchor.scores.op == "placeholder"
    assert (str(anchor.norm), anchor.sink) == ("softmax", None)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x - x.logsumexp(-1).unsqueeze(-2)).exp(),
        lambda x: (x - (2 * x).logsumexp(-1, keepdim=True)).exp(),
        lambda x: (x - x.logsumexp((-1, -2), keepdim=True)).exp(),
        lambda x: (x.logsumexp(-1, keepdim=True) - x).exp(),
        lambda x: (x - x.logsumexp(-1, keepdim=True).flip(-2)).exp(),
        lambda x: torch.sub(x, x.logsumexp(-1, keepdim=True), alpha=2).exp(),
    ],
)
def test_any_other_log_sum_does_not(f):
    assert not found(f)


@pytest.mark.parametrize(
    "f",
    [
        lambda x, z: (x - torch.logaddexp(x.logsumexp(-1, keepdim=True), z)).exp(),
        lambda x, z: (x - torch.logaddexp(z, x.logsumexp(-1, keepdim=True))).exp(),
        lambda x, z: (x - torch.logaddexp(x.logsumexp(-1), z[..., 0])[..., None]).exp(),
    ],
)
def test_a_logit_beside_the_log_sum_is_a_sink(f):
    def attention(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return f(q @ k.mT * 0.5, z) @ v

    args = (*(torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3)), Z.double())
    t = traced(attention, args)
    spec = only_spec(t)
    assert str(spec.norm) == "softmax(sink=c0)"
    wanted = attention(*args)
    t.rewrite(t.detect()[0])
    assert not any("logaddexp" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*args), wanted, rtol=0, atol=rounding(args, 9))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x - torch.logaddexp(x.logsumexp(-1, keepdim=True), x * 0.5)).exp(),
        lambda x: (x - torch.logaddexp(x.logsumexp(-2, keepdim=True), x[..., :1])).exp(),
        lambda x: (x - torch.logaddexp((2 * x).logsumexp(-1, keepdim=True), x[..., :1])).exp(),
    ],
)
def test_a_logit_that_varies_along_the_row_is_none(f):
    assert not found(f)


def test_a_logit_of_a_query_makes_each_query_a_head_of_a_group():
    def attention(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        w = q @ k.mT
        return (w - torch.logaddexp(w.logsumexp(-1, keepdim=True), z)).exp() @ v

    args = (*(torch.randn(2, 3, 5, 4) for _ in range(3)), torch.randn(5, 1))
    expected = attention(*args)
    t = traced(attention, args)
    (site,) = t.detect()[0]
    assert (site.match.spec.q.shape, site.match.spec.group_size) == ((2, 15, 1, 4), 5)
    t.rewrite([site])
    torch.testing.assert_close(t.run(*args), expected)


def by_logsumexp(w: Tensor) -> Tensor:
    return (w - w.logsumexp(-1, keepdim=True)).exp()


def by_sum(w: Tensor) -> Tensor:
    return (e := w.exp()) / e.sum(-1, keepdim=True)


def masked(norm, fill: float, whole: bool):
    def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        hide = ~valid[:, None, None] if whole else ~causal
        return norm((q @ k.mT).masked_fill(hide, fill)) @ v

    return attention


def arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The second batch entry sees no key at all."""
    valid = torch.tensor([[True, True, False, True, False], [False] * 5])
    return (*(torch.randn(2, 3, 5, 4).to(dtype) for _ in range(3)), valid)


@pytest.mark.parametrize(
    ("fill", "whole", "refused"),
    [(-1e9, True, True), (-torch.inf, True, False), (-1e9, False, False)],
)
def test_bare_exponentials_of_finite_fills_alone_are_no_softmax(fill, whole, refused):
    sites, missed = traced(masked(by_sum, fill, whole), arguments(torch.float32)).detect()
    assert [m.code for m, _ in missed] == (["empty-rows-differ"] if refused else [])
    assert len(sites) == (not refused)


@pytest.mark.parametrize(
    ("fill", "whole", "norm"),
    [(-1e9, True, "rounded-softmax"), (-torch.inf, True, "softmax"), (-1e9, False, "softmax")],
)
def test_a_row_of_finite_fills_alone_weighs_by_what_the_log_sum_is_rounded_to(fill, whole, norm):
    """``exp(m - logsumexp(m, .., m))`` is 1 and no share where ``m + log(n)`` rounds to ``m``."""
    f, args = masked(by_logsumexp, fill, whole), arguments(torch.float32)
    expected, t = f(*args), traced(f, args)
    assert str(only_spec(t).norm) == norm
    t.rewrite(t.detect()[0])
    kept = slice(0, 1) if fill == -torch.inf else slice(None)  # a row of -inf alone is NaN
    # Weights of 1 sum five values; fp32 rounds scores of four products, and each of the sums.
    torch.testing.assert_close(t.run(*args)[kept], expected[kept], rtol=1e-5, atol=1e-5)
    if norm == "rounded-softmax":
        torch.testing.assert_close(expected[1], args[2][1].sum(-2, keepdim=True).expand(3, 5, 4))


def test_what_half_precision_rounds_is_not_repeated():
    sites, missed = traced(masked(by_logsumexp, -1e4, True), arguments(torch.bfloat16)).detect()
    assert not sites
    assert [m.code for m, _ in missed] == ["rounded-logsumexp"]
