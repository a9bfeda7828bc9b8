"""List the tiles of a score matrix that are not hidden as FlexAttention wants them: mixed ones, full ones.

Source: Flex Attention (arXiv:2412.05496), section 4.2 (block masks, full and partial).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnc.mask_tiles import FULL, MIXED, SKIP, classify
from attnc.masks import Mask


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
        tiles = _with_own_key(mask, sq, sk, block) if own_key else classify(mask, sq, sk, (block, block))
        tiles = pad(tiles, (0, max(0, least - tiles.shape[1]), 0, max(0, least - tiles.shape[0])), value=SKIP)
        lists = BlockLists(*_listed(tiles == MIXED), *_listed(tiles == FULL))
        return BlockLists(*(x.to(device) for x in lists))


def _with_own_key(mask: Mask, sq: int, sk: int, block: int) -> Tensor:
    """Class the tiles of ``sk + 1`` keys of which the last is always visible."""
    tiles = classify(mask, sq, sk, (block, block))
    if sk % block == 0:
        return torch.cat([tiles, torch.full_like(tiles[:, :1], FULL)], 1)
    return torch.cat([tiles[:, :-1], tiles[:, -1:].clamp(min=MIXED)], 1)


def _listed(live: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts and numbers of the live tiles of each row."""
    counts = live.sum(-1, dtype=torch.int32)
    rows, columns = live.nonzero(as_tuple=True)
    place = live.cumsum(-1, dtype=torch.int32)[rows, columns].long() - 1
    numbers = torch.zeros(live.shape, dtype=torch.int32)
    numbers[rows, place] = columns.int()
    return counts[None, None].contiguous(), numbers[None, None].contiguous()
