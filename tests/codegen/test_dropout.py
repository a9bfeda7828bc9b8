from __future__ import annotations

import math

import pytest
import torch

from attnc.codegen.dropout import factors, growth, keep, philox, threshold
from attnc.errors import UnsupportedError

KNOWN = (
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
)
"""Key, counter and words of Random123's known answers for philox4x32-10."""
SHAPE = (2, 3, 512, 1024)


def seeded(value: int) -> torch.Tensor:
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


def kept(seed: int = 5, rate: float = 0.25, shape=SHAPE) -> torch.Tensor:
    return keep(seeded(seed), rate, shape)


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_philox_has_the_published_answers(key, counter, words: str) -> None:
    found = philox(seeded(key[0] | key[1] << 32), tuple(torch.tensor([c]) for c in counter))
    assert [int(w) for w in found] == [int(w, 16) for w in words.split()]


def word(seed: int, b: int, h: int, i: int, j: int) -> int:
    """Return the word of one weight by Python's integers."""
    c, k = [j & ~8, i & ~8, h, b], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        x, y = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [y >> 32 ^ c[1] ^ k[0], y & 0xFFFFFFFF, x >> 32 ^ c[3] ^ k[1], x & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[(i >> 3 & 1) * 2 + (j >> 3 & 1)]


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 1, 2**64 - 3])
def test_a_weight_is_kept_where_its_own_word_is_large_enough(seed: int) -> None:
    found = kept(seed, 0.4, (2, 3, 21, 37))
    want = [
        [[[word(seed, b, h, i, j) >= 0.4 * 2**32 for j in range(37)] for i in range(21)] for h in range(3)]
        for b in range(2)
    ]
    assert torch.equal(found, torch.tensor(want))


def test_every_weight_has_a_word_of_its_own() -> None:
    words = {word(1, b, h, i, j) for b in range(2) for h in range(2) for i in range(33) for j in range(33)}
    assert len(words) >= 2 * 2 * 33 * 33 - 4  # by chance two of 4356 words are alike with probability 0.2%


def test_no_length_enters() -> None:
    whole = kept(shape=(2, 3, 40, 70))
    for b, h, sq, sk in ((1, 2, 40, 70), (2, 3, 17, 9), (2, 1, 1, 64), (2, 3, 8, 16)):
        assert torch.equal(kept(shape=(b, h, sq, sk)), whole[:b, :h, :sq, :sk])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_is_drawn_for_nothing(shape) -> None:
    assert kept(shape=shape).shape == shape


def test_rate_0_keeps_all_and_rate_1_nothing() -> None:
    assert kept(rate=0.0).all()
    assert not kept(rate=1.0).any()
    assert (threshold(0.5), growth(0.5), growth(1.0)) == (2**31, 2.0, 0.0)
    with pytest.raises(ValueError, match=r"expected a rate from 0 to 1, found -0\.1"):
        threshold(-0.1)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_kept_weights_is_that_of_a_fair_coin(rate: float) -> None:
    found = kept(rate=rate).double()
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(found.mean() - (1 - rate)) < 4.5 * deviation / math.sqrt(found.numel())
    # by rows and by columns too: their sums vary as those of independent draws
    for dim in (2, 3):
        sums, n = found.sum(dim).flatten(), found.shape[dim]
        expected = n * deviation**2
        assert abs(sums.var() / expected - 1) < 5 * math.sqrt(2 / len(sums)) + 1 / n / deviation**2


@pytest.mark.parametrize(
    "step", [(0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 8, 0), (0, 0, 0, 8), (0, 0, 8, 8), (0, 1, 0, 0)]
)
def test_neighbours_are_independent(step) -> None:
    found = kept()
    a = found[tuple(slice(0, n - s) for n, s in zip(SHAPE, step, strict=True))].flatten()
    b = found[tuple(slice(s, None) for s in step)].flatten()
    counts = torch.bincount(2 * a.long() + b.long(), minlength=4).double()
    share = torch.tensor([0.25, 0.75], dtype=torch.float64)
    expected = (share[:, None] * share).flatten() * len(a)
    assert ((counts - expected) ** 2 / expected).sum() < 21.1  # chi-square, 3 degrees: p = 1e-4


def test_heads_batch_entries_and_seeds_are_not_each_others() -> None:
    found = kept()
    planes = [
        *found.flatten(0, 1),
        kept(seed=6)[0, 0],
        kept(seed=5 + 2**32)[0, 0],
        found[0, 0][:, :512].T.repeat(1, 2),
    ]
    for at, a in enumerate(planes):
        for b in planes[:at]:
            agree = (a == b).double().mean() - (0.25**2 + 0.75**2)
            assert abs(agree) < 6 * 0.5 / math.sqrt(a.numel() / 2)


def test_the_mean_over_seeds_is_the_output_without_dropout() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 1, 4, 40, generator=g, dtype=torch.float64).softmax(-1)
    values = torch.randn(40, 3, generator=g, dtype=torch.float64)
    runs = torch.stack([weights * factors(seeded(s), 0.3, weights) @ values for s in range(1000)])
    off = (runs.mean(0) - weights @ values) / (runs.std(0) / math.sqrt(len(runs)))
    assert off.abs().max() < 4


def test_a_call_needs_one_int64_number() -> None:
    weights = torch.ones(1, 1, 2, 2)
    with pytest.raises(UnsupportedError, match=r"expected a seed for the rate 0\.1, found none"):
        factors(None, 0.1, weights)
    with pytest.raises(ValueError, match=r"one int64 number, found torch\.int32 \[1\]"):
        factors(torch.ones(1, dtype=torch.int32), 0.1, weights)
    with pytest.raises(ValueError, match=r"one int64 number, found torch\.int64 \[2\]"):
        factors(torch.ones(2, dtype=torch.int64), 0.1, weights)
