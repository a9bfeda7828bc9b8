"""Class the tiles of a score matrix as hidden, mixed or full, and list them as FlexAttention wants them.

Nothing of size Sq x Sk is made: a predicate is classed for all tiles at once from their corner positions,
so a matrix of 65536 x 65536 costs what its 512 x 512 tiles cost.  The answer is that of ``Mask.classify``
for each. Source: Flex Attention (arXiv:2412.05496), section 4.2 (block masks, full and partial).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.errors import UnsupportedError
from attnc.formula import fold
from attnc.intervals import Intervals
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range

SKIP, MIXED, FULL = 0, 1, 2
"""The classes; in this order a conjunction is the least, a disjunction the greatest, a negation ``2 - x``."""


class BlockLists(NamedTuple):
    """Which tiles of each row of tiles to run: counts ``[1, 1, Qb]`` and numbers ``[1, 1, Qb, Kb]``, int32.

    Live numbers stand first, in order.  The mixed tiles are those to which the mask is applied, the full
    ones go without.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


@lru_cache(maxsize=64)
def block_lists(
    mask: Mask, sq: int, sk: int, block: int = 128, own_key: bool = False, least: int = 1, device: str = "cpu"
) -> BlockLists:
    """Return the lists for ``sq`` queries and ``sk`` keys in tiles of ``block`` x ``block`` tokens.

    ``own_key`` adds one key behind the others that every query sees (a sink).  ``least`` is the smallest size
    of Qb and Kb; rows and columns of tiles beyond the lengths list nothing.  The tensors are shared: do not
    write to them.

    Raises:
        UnsupportedError: a predicate that cannot be classed.
        ValueError: a length or the block is not positive.
    """
    if min(sq, sk, block) < 1:
        raise ValueError(f"block_lists: expected positive lengths and block, found {sq}, {sk}, {block}")
    with torch.inference_mode(False), torch.no_grad():
        tiles = _with_own_key(mask, sq, sk, block) if own_key else classify(mask, sq, sk, block)
        tiles = pad(tiles, (0, max(0, least - tiles.shape[1]), 0, max(0, least - tiles.shape[0])), value=SKIP)
        lists = BlockLists(*_listed(tiles == MIXED), *_listed(tiles == FULL))
        return BlockLists(*(x.to(device) for x in lists))


def classify(mask: Mask, sq: int, sk: int, block: int = 128) -> Tensor:
    """Return the class of every tile, int8 ``[Qb, Kb]`` of SKIP, MIXED and FULL."""
    q0, k0 = torch.arange(0, sq, block)[:, None], torch.arange(0, sk, block)[None, :]
    q = (q0, (q0 + block - 1).clamp(max=sq - 1))
    k = (k0, (k0 + block - 1).clamp(max=sk - 1))
    return _classes(mask, q, k, sq, sk).expand(q0.shape[0], k0.shape[1])


def _with_own_key(mask: Mask, sq: int, sk: int, block: int) -> Tensor:
    """Class the tiles of ``sk + 1`` keys of which the last is always visible."""
    tiles = classify(mask, sq, sk, block)
    if sk % block == 0:
        return torch.cat([tiles, torch.full_like(tiles[:, :1], FULL)], 1)
    return torch.cat([tiles[:, :-1], tiles[:, -1:].clamp(min=MIXED)], 1)


Interval = tuple[Tensor, Tensor]


def _classes(mask: Mask, q: Interval, k: Interval, sq: int, sk: int) -> Tensor:
    match mask:
        case Full():
            return torch.full((1, 1), FULL, dtype=torch.int8)
        case Padding() | Dense():
            return torch.full((1, 1), MIXED, dtype=torch.int8)
        case Band():
            return _band(mask, q, k, mask.shift(sq, sk))
        case Range(axis, lo, hi):
            first, last = k if axis == "k" else q
            return _ternary((last < lo) | (first >= hi), (first >= lo) & (last < hi))
        case Formula(value):
            may, must = fold(value, Intervals({"q": q, "k": k, "Sq": (sq, sq), "Sk": (sk, sk)}))
            may, must = (torch.as_tensor(x).expand(1, 1) if isinstance(x, bool) else x for x in (may, must))
            return _ternary(~may, must)
        case And(parts) | Or(parts):
            join = torch.minimum if isinstance(mask, And) else torch.maximum
            out = _classes(parts[0], q, k, sq, sk)
            for part in parts[1:]:
                out = join(out, _classes(part, q, k, sq, sk))
            return out
        case Not(part):
            return FULL - _classes(part, q, k, sq, sk)
    raise UnsupportedError(f"block_lists: expected a mask of known kind, found {mask}")


def _band(mask: Band, q: Interval, k: Interval, shift: int) -> Tensor:
    least, most = q[0] + shift - k[1], q[1] + shift - k[0]
    skip = torch.zeros_like(least, dtype=torch.bool)
    full = ~skip
    if mask.right is not None:
        skip, full = skip | (most < -mask.right), full & (least >= -mask.right)
    if mask.left is not None:
        skip, full = skip | (least > mask.left), full & (most <= mask.left)
    return _ternary(skip, full)


def _ternary(skip: Tensor, full: Tensor) -> Tensor:
    """Code two bool tensors; where both hold (an empty band), skip wins, as in ``Mask.classify``."""
    return torch.where(skip, SKIP, torch.where(full, FULL, MIXED)).to(torch.int8)


def _listed(live: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and numbers of the live tiles of each row."""
    counts = live.sum(-1, dtype=torch.int32)
    rows, columns = live.nonzero(as_tuple=True)
    place = live.cumsum(-1, dtype=torch.int32)[rows, columns].long() - 1
    numbers = torch.zeros(live.shape, dtype=torch.int32)
    numbers[rows, place] = columns.int()
    return counts[None, None].contiguous(), numbers[None, None].contiguous()
