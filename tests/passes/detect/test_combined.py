"""Weights that are added or gated before the values are as many attentions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnc
from attnc.ir import Softmax
from attnc.masks import CAUSAL
from tests.rewriting import Forward, rounding, traced

B, H, S, T, D, E = 2, 3, 7, 5, 8, 6


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = randn(B, H, S, D, seed=1), randn(B, H, T, D, seed=2), randn(B, H, T, E, seed=3)
HEADS, ROWS, KEYS = randn(H, seed=4), randn(B, H, S, seed=5), randn(B, 1, 1, T, seed=6)
LAM = randn(seed=7)


def halves(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (q[..., i * 4 : i * 4 + 4] @ k[..., i * 4 : i * 4 + 4].mT / 2 for i in (0, 1))
    return a.softmax(-1), b.softmax(-1)


def number(q, k, v):
    a, b = halves(q, k)
    return (a - 0.5 * b) @ v


def scalar(q, k, v, lam):
    a, b = halves(q, k)
    return (a - lam * b) @ v


def per_head(q, k, v, lam):
    a, b = halves(q, k)
    return (a - lam[:, None, None] * b) @ v


def per_row(q, k, v, lam):
    a, b = halves(q, k)
    return torch.einsum("bhst,bhte->bshe", a - b * lam[..., None], v)


def viewed_pair(q, k, v, lam):
    """As the paper's own code: both softmaxes are one, over an axis of two."""
    w = torch.stack([q[..., :4] @ k[..., :4].mT, q[..., 4:] @ k[..., 4:].mT], 2).softmax(-1)
    return (w[:, :, 0] - lam * w[:, :, 1]) @ v


def paired_heads(q, k, v, lam):
    q, k = (x.reshape(B, H, -1, 2, 4).permute(0, 1, 3, 2, 4) for x in (q, k))
    w = (q @ k.mT / 2).softmax(-1)
    return (w[:, :, 0] - lam * w[:, :, 1]) @ v


def neighbors(q, k, v, lam):
    q, k = (x.reshape(B, H, -1, 2, 4).transpose(2, 3).flatten(1, 2) for x in (q, k))
    w = (q @ k.mT / 2).softmax(-1).view(B, H, 2, S, T)
    return (w[:, :, 0] - lam * w[:, :, 1]) @ v


def chunked(q, k, v, lam):
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    a, b = (q1 @ k1.mT).softmax(-1), (q2 @ k2.mT).softmax(-1)
    return torch.add(a, -(b * lam)) @ v


def masked(q, k, v, lam):
    hide = torch.ones(S, T, dtype=torch.bool).triu(1)
    a, b = (q[..., i::2] @ k[..., i::2].mT for i in (0, 1))
    a, b = (x.masked_fill(hide, -math.inf).softmax(-1) for x in (a, b))
    return (a - lam * b) @ v


def gate_per_head(q, k, v, gate):
    return ((q @ k.mT / 3).softmax(-1) * gate.sigmoid()[:, None, None]) @ v


def gate_per_row(q, k, v, gate):
    return (gate.sigmoid()[..., None] * (q @ k.mT / 3).softmax(-1)) @ v


def scaled_weights(q, k, v):
    return ((q @ k.mT / 3).softmax(-1) * 0.25 / 3) @ v


CASES = {
    number: ((Q, K, V), 2),
    scalar: ((Q, K, V, LAM), 2),
    per_head: ((Q, K, V, HEADS), 2),
    per_row: ((Q, K, V, ROWS), 2),
    paired_heads: ((Q, K, V, LAM), 2),
    neighbors: ((Q, K, V, LAM), 2),
    chunked: ((Q, K, V, LAM), 2),
    masked: ((Q, K, V, LAM), 2),
    gate_per_head: ((Q, K, V, HEADS), 1),
    gate_per_row: ((Q, K, V, ROWS), 1),
    scaled_weights: ((Q, K, V), 1),
}


@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_a_sum_of_weights_is_a_sum_of_attentions(f):
    args, count = CASES[f]
    t = traced(f, args)
    found, missed = t.detect()
    assert len(found) == 1, missed
    assert not missed
    assert len(found[0].terms) == count
    assert not found[0].match.escapes
    if f is masked:
        assert {x.spec.mask for x in found[0].terms} == {CAUSAL}
    t.rewrite(found)
    assert sum(n.target is torch.ops.attnc.attend.default for n in t.graph.nodes) == count
    assert not any("softmax" in str(n.target) for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*args), f(*args), rtol=1e-10, atol=64 * rounding(args, D + T))


def hide(w: Tensor) -> Tensor:
    return torch.ones(w.shape[-2:], dtype=torch.bool).triu(1)


def zeroed_causal(q, k, v):
    w = (q @ k.mT).masked_fill(hide(q @ k.mT), -math.inf).softmax(-1)
    return w.masked_fill(hide(w), 0.0) @ v


def zeroed_rows(q, k, v, keep):
    """As CPM-Ant does: queries that see no key get zeros and not NaN."""
    keep = keep[:, None]
    w = torch.where(keep, q @ k.mT, -math.inf).softmax(-1)
    return torch.where(keep, w, 0.0) @ v


def zeroed_by_fill(q, k, v, keep):
    w = (q @ k.mT).masked_fill(keep[:, None] == False, torch.finfo(q.dtype).min).softmax(-1)  # noqa: E712
    return w.masked_fill(keep[:, None] == False, 0) @ v  # noqa: E712


def zeroed_added(q, k, v, keep):
    w = (
        q @ k.mT + torch.zeros((), dtype=q.dtype).expand(keep.shape).masked_fill(~keep, -math.inf)[:, None]
    ).softmax(-1)
    return w.masked_fill(~keep[:, None], 0) @ v


KEEP = torch.rand(B, S, T, generator=torch.Generator().manual_seed(8)) < 0.6
KEEP[0, 2] = KEEP[1, 0] = False


@pytest.mark.parametrize(
    "f", [zeroed_causal, zeroed_rows, zeroed_by_fill, zeroed_added], ids=lambda f: f.__name__
)
def test_a_mask_after_the_softmax_that_repeats_the_one_before_zeroes_empty_rows(f):
    args = (Q, K, V) if f is zeroed_causal else (Q, K, V, KEEP)
    t = traced(f, args)
    found, missed = t.detect()
    assert len(found) == 1, missed
    assert found[0].match.spec.norm == Softmax(safe=True)
    t.rewrite(found)
    out = t.run(*args)
    assert out.isfinite().all()
    torch.testing.assert_close(out, f(*args), rtol=1e-10, atol=64 * rounding(args, D + T))


def zeroed_elsewhere(q, k, v, keep):
    w = torch.where(keep[:, None], q @ k.mT, -math.inf).softmax(-1)
    return w.masked_fill(hide(w), 0.0) @ v


def zeroed_after_a_mild_fill(q, k, v, keep):
    w = torch.where(keep[:, None], q @ k.mT, -2e4).softmax(-1)
    return torch.where(keep[:, None], w, 0.0) @ v


def zeroed_without_a_mask(q, k, v, keep):
    return torch.where(keep[:, None], (q @ k.mT).softmax(-1), 0.0) @ v


@pytest.mark.parametrize(
    "f", [zeroed_elsewhere, zeroed_after_a_mild_fill, zeroed_without_a_mask], ids=lambda f: f.__name__
)
def test_another_mask_after_the_softmax_is_refused(f):
    found, missed = traced(f, (Q, K, V, KEEP)).detect()
    assert not found
    assert [m.code for m, _ in missed] == ["weights-masked"]


def plus_a_number(q, k, v):
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


def less_a_number(q, k, v, gate):
    return ((q @ k.mT).softmax(-1) * gate[..., None] - 2) @ v


def affine(q, k, v, alpha):
    """Affine-scaled attention: a number per query and head is added that makes rows sum to 0.6."""
    beta = (0.6 - alpha) / T
    return (alpha[..., None] * (q @ k.mT).softmax(-1) + beta[..., None]) @ v


def affine_per_head(q, k, v, alpha):
    alpha = alpha[:, None, None]
    return ((q @ k.mT).softmax(-1) * alpha + alpha.exp()) @ v


def affine_times(q, k, v, alpha):
    return (0.5 * ((q @ k.mT).softmax(-1) + alpha[..., None])) @ v


def affine_causal(q, k, v, alpha):
    """Hidden keys weigh as much as the others beside the softmax, since nothing hides them again."""
    w = (q @ k.mT).masked_fill(torch.ones(S, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    return torch.einsum("bhst,bhte->bshe", w - alpha[..., None], v)


def affine_grouped(q, k, v, alpha):
    q, k, v = q[:, :2], k[:, :1], v[:, :1]
    w = (q @ k.mT).softmax(-1)
    return (w + alpha[:, :2, :, None]) @ v


FLAT = {
    plus_a_number: (Q, K, V),
    less_a_number: (Q, K, V, ROWS),
    affine: (Q, K, V, ROWS),
    affine_per_head: (Q, K, V, HEADS),
    affine_times: (Q, K, V, ROWS),
    affine_causal: (Q, K, V, ROWS),
    affine_grouped: (Q, K, V, ROWS),
}


@pytest.mark.parametrize("f", FLAT, ids=lambda f: f.__name__)
def test_what_is_added_to_weights_alike_for_all_keys_multiplies_the_sum_of_the_values(f):
    args = FLAT[f]
    t = traced(f, args)
    (found,), missed = t.detect()
    assert not missed
    assert (len(found.terms), len(found.flats)) == (1, 1)
    assert not found.match.escapes
    t.rewrite([found])
    assert not any("softmax" in str(n.target) for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*args), f(*args), rtol=1e-10, atol=64 * rounding(args, D + T))


def affine_hidden_again(q, k, v, alpha):
    hidden = torch.ones(S, T, dtype=torch.bool).triu(1)
    w = (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) + alpha[..., None]
    return w.masked_fill(hidden, 0.0) @ v


def plus_other_scores(q, k, v):
    return ((q @ k.mT).softmax(-1) + (q @ k.mT).mean(-1, keepdim=True) + q @ k.mT) @ v


def gated_by_key(q, k, v, gate):
    return ((q @ k.mT).softmax(-1) * gate) @ v


def plus_a_tensor(q, k, v, more):
    return ((q @ k.mT).softmax(-1) + more) @ v


def product(q, k, v):
    a, b = halves(q, k)
    return (a * b) @ v


def divided_by_weights(q, k, v):
    a, b = halves(q, k)
    return (a / b) @ v


def other_axis(q, k, v):
    a = q[..., :4] @ k[..., :4].mT
    return (a.softmax(-1) - a.softmax(-2)) @ v


NEAR = {
    gated_by_key: (Q, K, V, KEYS),
    affine_hidden_again: (Q, K, V, ROWS),
    plus_other_scores: (Q, K, V),
    plus_a_tensor: (Q, K, V, KEYS),
    product: (Q, K, V),
    divided_by_weights: (Q, K, V),
    other_axis: (Q, K, V),
}


@pytest.mark.parametrize("f", NEAR, ids=lambda f: f.__name__)
def test_what_is_no_such_sum_is_refused(f):
    found, missed = traced(f, NEAR[f]).detect()
    assert not found
    assert missed


def test_a_differential_site_is_checked_and_rewritten_by_the_compiler():
    args = tuple(x.float() for x in (Q, K, V, LAM))
    fast = attnc.optimize(Forward(scalar), args, cost_model=False)
    site = fast.report.sites[0]
    assert (site.status, site.reason) == ("rewritten", None) or site.status == "rewritten"
    assert site.error <= site.tolerance
    torch.testing.assert_close(fast(*args), scalar(*args), rtol=1e-5, atol=1e-5)
