"""Which attention weights dropout keeps: a pure function of a seed and of batch entry, head, query and key.

The weight of (b, h, i, j) is kept where a random word of 32 bits is at least ``rate * 2**32``, and is then
divided by ``1 - rate``.  The word is one of the four that Philox4x32-10 makes of the key ``seed`` (64 bits)
and the counter ``(j', i', h, b)``, where i' and j' are i and j with bit 3 cleared: word ``2 * (bit 3 of i) +
(bit 3 of j)``.  So (i, j), (i, j + 8), (i + 8, j) and (i + 8, j + 8) share a counter and no word; a thread of
a GPU often has all four.  No number overflows below 2**32 queries or keys, and no length, stride, tile or
architecture enters: whoever knows the seed can draw the same again.  Another seed is another stream; two
layers and two steps each need their own.
Source: Parallel random numbers: as easy as 1, 2, 3 (Salmon et al., SC 2011), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnc.errors import UnsupportedError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
BIT = 8
"""The bit of a query's and of a key's number that chooses the word, and not the counter."""

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four 32-bit words, as int64 tensors that broadcast."""


def threshold(rate: float) -> int:
    """Return the least 32-bit word whose weight is kept: 0 to 2**32.

    Raises:
        ValueError: the rate is no probability.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout: expected a rate from 0 to 1, found {rate}")
    return math.ceil(rate * 2**32)


def growth(rate: float) -> float:
    """Return the factor of a kept weight; 0 where none is kept."""
    return 1.0 / (1.0 - rate) if rate < 1.0 else 0.0


def philox(seed: Tensor, counter: Words) -> Words:
    """Return four random words per counter, by Philox4x32-10; the seed is int64 and broadcasts.

    Products of words wrap in int64, which has their 64 bits all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & WORD, _high(a) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & WORD


def check_seed(seed: Tensor | None, rate: float) -> Tensor:
    """Return the seed of a call with dropout, if it is one.

    Raises:
        UnsupportedError: there is none.
        ValueError: it is not one int64 number.
    """
    if seed is None:
        raise UnsupportedError(
            f"attention with dropout: expected a seed for the rate {rate}, found none\n"
            "  try: attnc::attend(.., seed=torch.randint(2**63 - 1, (1,), device=q.device))"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"attention with dropout: expected a seed of one int64 number, found {seed.dtype}"
            f" {list(seed.shape)}"
        )
    return seed


def keep(seed: Tensor, rate: float, shape: Sequence[int]) -> Tensor:
    """Return which weights are kept, bool ``[B, H, Sq, Sk]``, on the seed's device.

    ``seed`` is one int64 number.

    Raises:
        ValueError: the rate is no probability.
    """
    batch, heads, sq, sk = shape

    def count(n: int) -> Tensor:
        return torch.arange(n, device=seed.device)

    def without_bit(n: int) -> Tensor:
        return (count(-(-n // (2 * BIT)))[:, None] * (2 * BIT) + count(BIT)).flatten()

    rows, cols = without_bit(sq), without_bit(sk)
    head, entry = count(heads)[:, None, None], count(batch)[:, None, None, None]
    words = philox(seed.reshape(()), (cols, rows[:, None], head, entry))
    drawn = torch.stack([w.expand(batch, heads, len(rows), len(cols)) >= threshold(rate) for w in words])
    tiles = drawn.view(2, 2, batch, heads, len(rows) // BIT, BIT, len(cols) // BIT, BIT)
    whole = tiles.permute(2, 3, 4, 0, 5, 6, 1, 7).reshape(batch, heads, 2 * len(rows), 2 * len(cols))
    return whole[:, :, :sq, :sk]


def factors(seed: Tensor | None, rate: float, weights: Tensor) -> Tensor:
    """Return what dropout multiplies weights ``[B, H, Sq, Sk]`` with, in their dtype: 0, or 1 / (1 - rate).

    Raises:
        UnsupportedError: there is no seed.
        ValueError: the seed is not one int64 number, or the rate is no probability.
    """
    kept = keep(check_seed(seed, rate), rate, weights.shape)
    return kept.to(weights.dtype) * growth(rate)
