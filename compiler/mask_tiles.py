"""Class the tiles of a score matrix as hidden, mixed or full, for all tiles at once.

Nothing of size Sq x Sk is made: a predicate is classed from the corner positions of the tiles, so a matrix of
65536 x 65536 costs what its 512 x 512 tiles cost.  The answer is that of ``Mask.classify`` for each.
Source: Flex Attention (arXiv:2412.05496), section 4.2 (block masks, full and partial).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.errors import UnsupportedError
from attnc.formula import fold
from attnc.intervals import Intervals
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range

SKIP, MIXED, FULL = 0, 1, 2
"""The classes; in this order a conjunction is the least, a disjunction the greatest, a negation ``2 - x``."""

Interval = tuple[Tensor, Tensor]


def classify(mask: Mask, sq: int, sk: int, tile: tuple[int, int] = (128, 128)) -> Tensor:
    """Return the class of every tile of ``tile`` queries and keys, int8 ``[Qb, Kb]`` of SKIP, MIXED and FULL.

    Tiles at the end hold what is left of the ``sq`` queries and ``sk`` keys.

    Raises:
        UnsupportedError: a predicate that cannot be classed.
    """
    q0, k0 = torch.arange(0, sq, tile[0])[:, None], torch.arange(0, sk, tile[1])[None, :]
    q = (q0, (q0 + tile[0] - 1).clamp(max=sq - 1))
    k = (k0, (k0 + tile[1] - 1).clamp(max=sk - 1))
    return _classes(mask, q, k, sq, sk).expand(q0.shape[0], k0.shape[1])


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
    raise UnsupportedError(f"classify: expected a mask of known kind, found {mask}")


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
