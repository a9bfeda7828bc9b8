"""Masks as predicates: which keys a query may see, as a small algebra over positions.

The door to two files: ``attnc.mask_atoms`` (what a mask is) and ``attnc.mask_joins`` (joining them, and
whether one may hide a whole row).
"""

from attnc.mask_atoms import (
    CAUSAL,
    FULL,
    Align,
    And,
    Band,
    Dense,
    Formula,
    Full,
    Grid,
    Mask,
    Not,
    Or,
    Padding,
    Range,
    Tile,
)
from attnc.mask_joins import both, condition, either, integers, may_hide_a_whole_row, rename

__all__ = [
    "CAUSAL",
    "FULL",
    "Align",
    "And",
    "Band",
    "Dense",
    "Formula",
    "Full",
    "Grid",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Range",
    "Tile",
    "both",
    "condition",
    "either",
    "integers",
    "may_hide_a_whole_row",
    "rename",
]
