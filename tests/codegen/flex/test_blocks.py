from __future__ import annotations

import time

import pytest
import torch

from attnc.codegen.flex.blocks import block_lists
from attnc.errors import UnsupportedError
from attnc.mask_tiles import FULL, MIXED, classify
from attnc.masks import CAUSAL, And, Band, Full, Mask, Not, Or, Range

MASKS = (
    CAUSAL,
    Full(),
    Band(70, 0),
    Band(None, -300),
    And((CAUSAL, Or((Band(40, 0), Range("k", 0, 40))))),
    Not(Band(50, 50, "end")),
)


@pytest.mark.parametrize(("sq", "sk"), [(1, 200), (200, 200), (257, 64)])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_lists_hold_the_live_tiles_in_order(mask, sq, sk):
    kinds = classify(mask, sq, sk, (32, 32))
    lists = block_lists(mask, sq, sk, 32)
    assert {x.dtype for x in lists} == {torch.int32}
    for kind, counts, numbers in ((MIXED, *lists[:2]), (FULL, *lists[2:])):
        assert counts.shape == (1, 1, len(kinds))
        assert numbers.shape == (1, 1, *kinds.shape)
        for row, n, listed in zip(kinds, counts[0, 0], numbers[0, 0], strict=True):
            assert listed[:n].tolist() == (row == kind).nonzero().flatten().tolist()
            assert not listed[n:].any()


@pytest.mark.parametrize("sk", [64, 65, 100, 127, 128])
def test_a_key_of_its_own_is_seen_by_every_row(sk):
    mask = Band(5, 0)
    plain, more = classify(mask, 100, sk, (64, 64)), block_lists(mask, 100, sk, 64, own_key=True)
    assert more.kv_indices.shape[-1] == sk // 64 + 1
    last = sk // 64
    for i in range(2):
        mixed = more.kv_indices[0, 0, i, : more.kv_num_blocks[0, 0, i]].tolist()
        full = more.full_kv_indices[0, 0, i, : more.full_kv_num_blocks[0, 0, i]].tolist()
        assert last in (full if sk % 64 == 0 else mixed)
        others = [j for j, kind in enumerate(plain[i].tolist()) if kind == MIXED]
        assert sorted({*others, *mixed}) == sorted(mixed)


def test_a_long_band_costs_milliseconds():
    times = []
    for _ in range(3):
        block_lists.cache_clear()
        start = time.perf_counter()
        lists = block_lists(Band(4095, 0), 65536, 65536)
        times.append(time.perf_counter() - start)
    assert int(lists.kv_num_blocks.sum() + lists.full_kv_num_blocks.sum()) == sum(
        min(i, 32) + 1 for i in range(512)
    )
    assert min(times) < 0.2  # 262,144 tiles one by one in Python take over a second


def test_lists_can_be_larger_than_the_matrix():
    small, large = block_lists(CAUSAL, 100, 30, 64), block_lists(CAUSAL, 100, 30, 64, least=3)
    assert large.kv_indices.shape == (1, 1, 3, 3)
    for a, b in zip(small, large, strict=True):
        assert torch.equal(b[:, :, :2, :1] if a.dim() == 4 else b[:, :, :2], a)
        assert int(b.sum()) == int(a.sum())


def test_equal_questions_share_their_answer():
    assert block_lists(Band(9, 0), 100, 100) is block_lists(Band(9, 0), 100, 100)


def test_what_cannot_be_classed_is_named():
    class Odd(Mask):
        def __str__(self) -> str:
            return "odd"

    with pytest.raises(UnsupportedError, match="found odd"):
        block_lists(Odd(), 10, 10)
    with pytest.raises(ValueError, match="positive lengths and block, found 0, 10, 128"):
        block_lists(Full(), 0, 10)
