"""Keys and values in pieces under one softmax are attention over the pieces put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.rewriting import rounding, traced

B, H, S, D = 2, 3, 7, 4
LENGTHS = (5, 2, 6)


def inputs() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64)  # noqa: E731
    q = draw(B, H, S, D)
    pairs = [draw(B, H, n, D) for n in LENGTHS for _ in range(2)]
    return q, *pairs, draw(B, 1, 1, LENGTHS[1])


def scores(q: Tensor, *kvs: Tensor) -> Tensor:
    k1, _, k2, _, k3, _, bias = kvs
    parts = [q @ k1.mT * 0.5, q @ k2.mT * 0.5 + bias, torch.einsum("bhqd,bhkd->bhqk", q, k3) * 0.5]
    return torch.cat(parts, -1)


def in_order(q: Tensor, *kvs: Tensor) -> Tensor:
    w = scores(q, *kvs).softmax(-1)
    a, b = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    return w[..., a:b] @ kvs[3] + (w[..., b:] @ kvs[5] + w[..., :a] @ kvs[1])


def split(q: Tensor, *kvs: Tensor) -> Tensor:
    w1, w2, w3 = scores(q, *kvs).softmax(-1).split(LENGTHS, -1)
    return w1 @ kvs[1] + w2 @ kvs[3] + w3 @ kvs[5]


@pytest.mark.parametrize("f", [in_order, split])
def test_pieces_are_one_site(f):
    args = inputs()
    expected = f(*args)
    t = traced(f, args)
    found, missed = t.detect()
    assert not missed
    (site,) = found
    assert site.match.spec.k.shape == (B, H, sum(LENGTHS), D)
    assert site.match.spec.captured[0].shape == (B, 1, 1, sum(LENGTHS))
    t.rewrite(found)
    assert not any("softmax" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, D + sum(LENGTHS)))


def test_a_piece_that_a_whole_batch_shares_is_expanded():
    def f(q: Tensor, *kvs: Tensor) -> Tensor:
        w = torch.cat([q @ kvs[0].mT, q @ kvs[2][:1].mT], -1).softmax(-1)
        return w[..., : LENGTHS[0]] @ kvs[1] + w[..., LENGTHS[0] :] @ kvs[3][:1]

    args = inputs()
    expected = f(*args)
    t = traced(f, args)
    found, _ = t.detect()
    assert [x.match.spec.k.shape[:3] for x in found] == [(B, H, LENGTHS[0] + LENGTHS[1])]
    t.rewrite(found)
    torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, D + sum(LENGTHS)))


def test_what_does_not_add_up_is_refused():
    def gap(q: Tensor, *kvs: Tensor) -> Tensor:
        w1, _, w3 = scores(q, *kvs).softmax(-1).split(LENGTHS, -1)
        return w1 @ kvs[1] + w3 @ kvs[5]

    def twice(q: Tensor, *kvs: Tensor) -> Tensor:
        w1, w2, w3 = scores(q, *kvs).softmax(-1).split(LENGTHS, -1)
        return w1 @ kvs[1] + w2 @ kvs[3] + w3 @ kvs[5] + w1 @ kvs[1].sin()

    def difference(q: Tensor, *kvs: Tensor) -> Tensor:
        w1, w2, w3 = scores(q, *kvs).softmax(-1).split(LENGTHS, -1)
        return w1 @ kvs[1] + w2 @ kvs[3] - w3 @ kvs[5]

    def two_queries(q: Tensor, *kvs: Tensor) -> Tensor:
        w = torch.cat([q @ kvs[0].mT, q.cos() @ kvs[2].mT], -1).softmax(-1)
        return w[..., : LENGTHS[0]] @ kvs[1] + w[..., LENGTHS[0] :] @ kvs[3]

    def two_scales(q: Tensor, *kvs: Tensor) -> Tensor:
        w = torch.cat([q @ kvs[0].mT, q @ kvs[2].mT * 0.5], -1).softmax(-1)
        return w[..., : LENGTHS[0]] @ kvs[1] + w[..., LENGTHS[0] :] @ kvs[3]

    refused = {
        f.__name__: traced(f, inputs()).detect() for f in (gap, twice, difference, two_queries, two_scales)
    }
    assert {n: len(found) for n, (found, _) in refused.items()} == dict.fromkeys(refused, 0)
    assert {n: missed[0][0].code for n, (_, missed) in refused.items()} == {
        "gap": "several-value-contractions",
        "twice": "several-value-contractions",
        "difference": "several-value-contractions",
        "two_queries": "pieces-differ",
        "two_scales": "pieces-differ",
    }
