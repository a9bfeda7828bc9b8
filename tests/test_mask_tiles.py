from __future__ import annotations

import random

import pytest
import torch

from attnc.mask_tiles import FULL, MIXED, SKIP, classify
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


def one_by_one(mask: Mask, sq: int, sk: int, tile: tuple[int, int]) -> list[list[int]]:
    """Class tile by tile with the mask's own method."""
    q = [(i, min(i + tile[0], sq) - 1) for i in range(0, sq, tile[0])]
    k = [(j, min(j + tile[1], sk) - 1) for j in range(0, sk, tile[1])]
    return [[WORDS[mask.classify(a, b, sq, sk)] for b in k] for a in q]


@pytest.mark.parametrize("seed", range(60))
def test_classes_are_those_of_each_tile_and_true_of_the_dense_mask(seed):
    rng = random.Random(seed)
    mask, size = draw(rng), (rng.choice([16, 32, 64]), rng.choice([16, 32, 64]))
    sq, sk = rng.randrange(1, 230), rng.randrange(1, 230)
    found = classify(mask, sq, sk, size)
    assert found.tolist() == one_by_one(mask, sq, sk, size), str(mask)
    keep = mask.keep(Grid(sq, sk, torch.device("cpu"), {})).expand(1, 1, sq, sk)[0, 0]
    for i, row in enumerate(found.tolist()):
        for j, kind in enumerate(row):
            tile = keep[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            assert kind != FULL or bool(tile.all()), f"{mask}: tile {i},{j} is not full"
            assert kind != SKIP or not bool(tile.any()), f"{mask}: tile {i},{j} is not empty"


@pytest.mark.parametrize(
    "mask", [CAUSAL, Band(70, 0), Band(30, 10, "end"), Band(None, -3), Range("k", 5, 64)]
)
@pytest.mark.parametrize(("sq", "sk"), [(200, 200), (130, 257), (257, 64)])
def test_one_band_or_range_is_classed_exactly(mask, sq, sk):
    keep = mask.keep(Grid(sq, sk, torch.device("cpu"), {})).expand(1, 1, sq, sk)[0, 0]
    for i, row in enumerate(classify(mask, sq, sk, (32, 32)).tolist()):
        for j, kind in enumerate(row):
            tile = keep[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
            exact = FULL if bool(tile.all()) else MIXED if bool(tile.any()) else SKIP
            assert kind == exact, f"{mask}: tile {i},{j}"


def test_data_is_never_skipped_and_never_full():
    kinds = classify(both(Padding("keep"), Band(100, 0)), 256, 256, (64, 64))
    assert kinds.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    mask = Or((Dense("d"), Range("k", 0, 64)))
    assert bool((classify(mask, 128, 128, (64, 64)) == torch.tensor([2, 1])).all())
