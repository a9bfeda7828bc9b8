"""Masks as predicates: which keys a query may see, as a small algebra over positions.

A mask is a tree of frozen atoms. Every atom can be evaluated to a boolean tensor, can class a tile of the
score matrix as ``skip``, ``full`` or ``mixed`` by interval reasoning (never building the ``Sq x Sk`` tensor),
and prints a text that ``attnc.printer`` parses back. Positions are token indices: query ``q`` in ``[0, Sq)``,
key ``k`` in ``[0, Sk)``.

Source: forms/static_sparse, sections 0 and 22 of the project's design notes (predicates Band and Range;
Padding and Dense are run-time data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Tile = Literal["skip", "full", "mixed"]
Align = Literal["start", "end"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where a predicate is evaluated: sizes of the score tensor, and the run-time tensors by name.

    ``captured`` maps an operand's name to its tensor in canonical layout (see the atom's docstring).
    """

    sq: int
    sk: int
    device: torch.device
    captured: Mapping[str, torch.Tensor]


class Mask:
    """A boolean relation on (batch, head, query, key).  Subclasses are frozen and hashable."""

    __slots__ = ()

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return a bool tensor that broadcasts to ``[B, H, Sq, Sk]``; True means visible."""
        raise NotImplementedError

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Class the tile of queries ``q[0]..q[1]`` and keys ``k[0]..k[1]`` (both ends included)."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return the closed form as shown in reports: operands by role, not by name."""
        return str(self)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the run-time tensors that the predicate reads, in order of first use."""
        return ()


@dataclass(frozen=True, slots=True)
class Full(Mask):
    """Every key is visible."""

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return ``[1, 1, 1, 1]`` ones."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=grid.device)

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Return full."""
        return "full"

    def __str__(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class Band(Mask):
    """Keep pairs with ``-right <= p - k <= left``, where ``p`` is the query's position; None is unbounded.

    ``left`` counts keys before the query (so a causal window of W keys, itself included, is ``left=W-1,
    right=0``), in tokens; causal is ``Band(None, 0)``. ``align="start"`` puts query 0 at key 0 (``p = q``);
    ``align="end"`` puts the last query at the last key (``p = q + Sk - Sq``), as decoding with a cache does.
    """

    left: int | None
    right: int | None
    align: Align = "start"

    def shift(self, sq: int, sk: int) -> int:
        """Return what is added to a query index to get its position on the key axis."""
        return sk - sq if self.align == "end" else 0

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return ``[1, 1, Sq, Sk]``."""
        q = torch.arange(grid.sq, device=grid.device)[:, None] + self.shift(grid.sq, grid.sk)
        d = q - torch.arange(grid.sk, device=grid.device)[None, :]
        ok = torch.ones_like(d, dtype=torch.bool)
        if self.left is not None:
            ok &= d <= self.left
        if self.right is not None:
            ok &= d >= -self.right
        return ok[None, None]

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Compare the tile's least and greatest distance with the band."""
        shift = self.shift(sq, sk)
        least, most = q[0] + shift - k[1], q[1] + shift - k[0]
        low = -self.right if self.right is not None else least
        high = self.left if self.left is not None else most
        if most < low or least > high:
            return "skip"
        return "full" if least >= low and most <= high else "mixed"

    def __str__(self) -> str:
        end = self.align == "end"
        if self.left is None and self.right == 0:
            return "causal(end)" if end else "causal"
        text = ",".join(f"{n}={v}" for n, v in (("left", self.left), ("right", self.right)) if v is not None)
        return f"window({text}{',align=end' if end else ''})"


@dataclass(frozen=True, slots=True)
class Range(Mask):
    """Keep keys with ``lo <= k < hi`` (``axis="k"``), or queries (``axis="q"``).

    Attention sinks are ``Range("k", 0, S)``.
    """

    axis: Literal["q", "k"]
    lo: int
    hi: int

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return ``[1, 1, 1, Sk]`` or ``[1, 1, Sq, 1]``."""
        x = torch.arange(grid.sk if self.axis == "k" else grid.sq, device=grid.device)
        ok = (x >= self.lo) & (x < self.hi)
        return ok.view(1, 1, 1, -1) if self.axis == "k" else ok.view(1, 1, -1, 1)

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Compare the tile's interval on the axis with the range."""
        a, b = k if self.axis == "k" else q
        if b < self.lo or a >= self.hi:
            return "skip"
        return "full" if a >= self.lo and b < self.hi else "mixed"

    def __str__(self) -> str:
        return f"range({self.axis},{self.lo},{self.hi})"


@dataclass(frozen=True, slots=True)
class Padding(Mask):
    """Keep what a run-time validity row keeps.

    ``operand`` is bool ``[B, Sk]`` (``axis="k"``) or ``[B, Sq]`` (``"q"``).
    """

    operand: str
    axis: Literal["q", "k"] = "k"

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return ``[B, 1, 1, Sk]`` or ``[B, 1, Sq, 1]``."""
        row = grid.captured[self.operand]
        return row[:, None, None, :] if self.axis == "k" else row[:, None, :, None]

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Return mixed: the values are known at run time only."""
        return "mixed"

    def describe(self) -> str:
        """Name the axis."""
        return f"padding({'key' if self.axis == 'k' else 'query'})"

    @property
    def operands(self) -> tuple[str, ...]:
        """The validity row."""
        return (self.operand,)

    def __str__(self) -> str:
        return f"padding({'key' if self.axis == 'k' else 'query'},{self.operand})"


@dataclass(frozen=True, slots=True)
class Dense(Mask):
    """Keep what a bool tensor keeps: ``operand`` broadcasts to ``[B, H, Sq, Sk]``.

    Nothing was proved about it.
    """

    operand: str

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return the operand."""
        return grid.captured[self.operand]

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Return mixed: the values are known at run time only."""
        return "mixed"

    def describe(self) -> str:
        """Return the word alone."""
        return "dense"

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.operand,)

    def __str__(self) -> str:
        return f"dense({self.operand})"


def _merged(parts: tuple[Mask, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for p in parts for name in p.operands))


@dataclass(frozen=True, slots=True)
class And(Mask):
    """Keep what every part keeps.  Build it with ``both`` to keep trees flat and free of ``Full``."""

    parts: tuple[Mask, ...]

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return the conjunction."""
        out = self.parts[0].keep(grid)
        for p in self.parts[1:]:
            out = out & p.keep(grid)
        return out

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Skip if any part skips, full if all are full."""
        tiles = {p.classify(q, k, sq, sk) for p in self.parts}
        return "skip" if "skip" in tiles else "full" if tiles == {"full"} else "mixed"

    def describe(self) -> str:
        """Join the parts."""
        return " & ".join(f"({p.describe()})" if isinstance(p, Or) else p.describe() for p in self.parts)

    @property
    def operands(self) -> tuple[str, ...]:
        """Those of the parts."""
        return _merged(self.parts)

    def __str__(self) -> str:
        return "(" + " & ".join(str(p) for p in self.parts) + ")"


@dataclass(frozen=True, slots=True)
class Or(Mask):
    """Keep what any part keeps.  Build it with ``either``."""

    parts: tuple[Mask, ...]

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return the disjunction."""
        out = self.parts[0].keep(grid)
        for p in self.parts[1:]:
            out = out | p.keep(grid)
        return out

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Full if any part is full, skip if all skip."""
        tiles = {p.classify(q, k, sq, sk) for p in self.parts}
        return "full" if "full" in tiles else "skip" if tiles == {"skip"} else "mixed"

    def describe(self) -> str:
        """Join the parts."""
        return " | ".join(p.describe() for p in self.parts)

    @property
    def operands(self) -> tuple[str, ...]:
        """Those of the parts."""
        return _merged(self.parts)

    def __str__(self) -> str:
        return "(" + " | ".join(str(p) for p in self.parts) + ")"


@dataclass(frozen=True, slots=True)
class Not(Mask):
    """Keep what the part hides."""

    part: Mask

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return the negation."""
        return ~self.part.keep(grid)

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Swap skip and full."""
        swap: dict[Tile, Tile] = {"skip": "full", "full": "skip", "mixed": "mixed"}
        return swap[self.part.classify(q, k, sq, sk)]

    def describe(self) -> str:
        """Prefix the part."""
        return f"~({self.part.describe()})"

    @property
    def operands(self) -> tuple[str, ...]:
        """Those of the part."""
        return self.part.operands

    def __str__(self) -> str:
        return f"~{self.part}"


CAUSAL = Band(None, 0)
FULL = Full()


def both(*parts: Mask) -> Mask:
    """Return the conjunction of ``parts``, flattened, without repeats and ``Full``.

    Bands of one alignment meet in one.
    """
    flat: list[Mask] = []
    for p in parts:
        flat += p.parts if isinstance(p, And) else [] if isinstance(p, Full) else [p]
    aligns: tuple[Align, Align] = ("start", "end")
    for align in aligns:
        bands = [p for p in flat if isinstance(p, Band) and p.align == align]
        if len(bands) > 1:
            left = min((b.left for b in bands if b.left is not None), default=None)
            right = min((b.right for b in bands if b.right is not None), default=None)
            at = flat.index(bands[0])
            flat = [p for p in flat if p not in bands]
            flat.insert(at, Band(left, right, align))
    flat = list(dict.fromkeys(flat))
    return Full() if not flat else flat[0] if len(flat) == 1 else And(tuple(flat))


def either(*parts: Mask) -> Mask:
    """Return the disjunction of ``parts``, flattened and without repeats; ``Full`` absorbs.

    Bands of one alignment that overlap or touch become one.
    """
    flat: list[Mask] = []
    for p in parts:
        flat += p.parts if isinstance(p, Or) else [p]
    flat = _joined(list(dict.fromkeys(flat)))
    if any(isinstance(p, Full) for p in flat):
        return Full()
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


def _joined(parts: list[Mask]) -> list[Mask]:
    """Join pairs of bands whose union is a band."""
    for i, a in enumerate(parts):
        for j, b in enumerate(parts[:i]):
            if isinstance(a, Band) and isinstance(b, Band) and a.align == b.align and _touch(a, b):
                left = None if a.left is None or b.left is None else max(a.left, b.left)
                right = None if a.right is None or b.right is None else max(a.right, b.right)
                whole: Mask = FULL if left is None and right is None else Band(left, right, a.align)
                return _joined([whole if k == j else p for k, p in enumerate(parts) if k != i])
    return parts


def _touch(a: Band, b: Band) -> bool:
    """Say whether the distances that two bands keep make one interval; empty bands have none."""
    inf = float("inf")
    spans = [(-inf if x.right is None else -x.right, inf if x.left is None else x.left) for x in (a, b)]
    (low, high), (low2, high2) = sorted(spans)
    return low <= high and low2 <= high2 and low2 <= high + 1


def may_hide_a_whole_row(mask: Mask, sq: int | None = None, sk: int | None = None) -> bool:
    """Say whether some query may see no key at all.

    Run-time operands may have any values, and unknown counts as yes.

    ``sq`` and ``sk`` are the lengths in tokens, None when symbolic.
    """
    if isinstance(mask, Full):
        return False
    if isinstance(mask, Range):
        return not (mask.axis == "k" and mask.lo == 0 and mask.hi > 0)
    if isinstance(mask, Band):
        sees_itself = (mask.left is None or mask.left >= 0) and (mask.right is None or mask.right >= 0)
        if mask.align == "end" or mask.left is None:
            # causal from the start always sees key 0; an end-aligned band needs Sk >= Sq
            return not sees_itself or (
                mask.align == "end" and not (sq is not None and sk is not None and sk >= sq)
            )
        return not (sees_itself and sq is not None and sk is not None and sq <= sk + mask.left)
    if isinstance(mask, Or):
        return all(may_hide_a_whole_row(p, sq, sk) for p in mask.parts)
    return True
