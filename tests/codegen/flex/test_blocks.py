from __future__ import annotations

import random
import time

import pytest
import torch

from attnc.codegen.flex.blocks import FULL, MIXED, SKIP, block_lists, classify
from attnc.errors import UnsupportedError
from attnc.masks import CAUSAL, And, Band, Dense, Full, Grid, Mask, Not, Or, Padding, Range, both

WORDS = {"skip": SKIP, "mixed": MIXED, "full": FULL}


def draw(rng: random.Random, depth: int = 2) -> Mask:
    """Draw a predicate of positions, empty bands and ranges included."""
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        left, right = (rng.choice([None, rng.randrange(-40, 200)]) for _ in range(2))
        return Band(left, right, rng.choice(["start", "end"]))
    if kind == 1:
        lo = rng.randrange(-5, 150)
        return Range(rng.choice(["q", "k"]), lo, lo + rng.randrange(120))
    if kind == 2:
        return rng.choice([Full(), CAUSAL])
    if kind == 3:
        return Not(draw(rng, depth - 1))
    return rng.choice([And, Or])(tuple(draw(rng, depth - 1) for _ in range(rng.randrange(1, 4))))


def tiles(mask: Mask, sq: int, sk: int, block: int) -> list[list[int]]:
    """Class tile by tile with the mask's own method."""
    ends = lambda i, n: (i, min(i + block, n) - 1)  # noqa: E731
    return [
        [WORDS[mask.classify(ends(i, sq), ends(j, sk), sq, sk)] for j in range(0, sk, block)]
        for i in range(0, sq, block)
    ]


@pytest.mark.parametrize("seed", range(60))
def test_classes_are_those_of_each_tile_and_true_of_the_dense_mask(seed):
    rng = random.Random(seed)
    mask, block = draw(rng), rng.choice([16, 32, 64])
    sq, sk = rng.randrange(1, 230), rng.randrange(1, 230)
    found = classify(mask, sq, sk, block)
    assert found.tolist() == tiles(mask, sq, sk, block), str(mask)
    keep = mask.keep(Grid(sq, sk, torch.device("cpu"), {})).expand(1, 1, sq, sk)[0, 0]
    for i, row in enumerate(found.tolist()):
        for j, kind in enumerate(row):
            tile = keep[i * block : (i + 1) * block, j * block : (j + 1) * block]
            assert kind != FULL or bool(tile.all()), f"{mask}: tile {i},{j} is not full"
            assert kind != SKIP or not bool(tile.any()), f"{mask}: tile {i},{j} is not empty"


@pytest.mark.parametrize(
    "mask", [CAUSAL, Band(70, 0), Band(30, 10, "end"), Band(None, -3), Range("k", 5, 64)]
)
@pytest.mark.parametrize(("sq", "sk"), [(200, 200), (130, 257), (257, 64)])
def test_one_band_or_range_is_classed_exactly(mask, sq, sk):
    keep = mask.keep(Grid(sq, sk, torch.device("cpu"), {})).expand(1, 1, sq, sk)[0, 0]
    for i, row in enumerate(classify(mask, sq, sk, 32).tolist()):
        for j, kind in enumerate(row):
            tile = keep[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
            exact = FULL if bool(tile.all()) else MIXED if bool(tile.any()) else SKIP
            assert kind == exact, f"{mask}: tile {i},{j}"


@pytest.mark.parametrize("seed", range(20))
def test_lists_hold_the_live_tiles_in_order(seed):
    rng = random.Random(seed)
    mask, sq, sk = draw(rng), rng.randrange(1, 300), rng.randrange(1, 300)
    kinds = classify(mask, sq, sk, 32)
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
    plain, more = classify(mask, 100, sk, 64), block_lists(mask, 100, sk, 64, own_key=True)
    assert more.kv_indices.shape[-1] == sk // 64 + 1
    last = sk // 64
    for i in range(2):
        mixed = more.kv_indices[0, 0, i, : more.kv_num_blocks[0, 0, i]].tolist()
        full = more.full_kv_indices[0, 0, i, : more.full_kv_num_blocks[0, 0, i]].tolist()
        assert last in (full if sk % 64 == 0 else mixed)
        others = [j for j, kind in enumerate(plain[i].tolist()) if kind == MIXED]
        assert sorted({*others, *mixed}) == sorted(mixed)


def test_data_is_never_skipped_and_never_full():
    kinds = classify(both(Padding("keep"), Band(100, 0)), 256, 256, 64)
    assert kinds.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    assert bool((classify(Or((Dense("d"), Range("k", 0, 64))), 128, 128, 64) == torch.tensor([2, 1])).all())


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
