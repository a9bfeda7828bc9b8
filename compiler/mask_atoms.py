"""What a mask is: atoms over positions and run-time data, and their connectives.

A mask is a tree of frozen atoms. Every atom can be evaluated to a boolean tensor, can class a tile of the
score matrix as ``skip``, ``full`` or ``mixed`` by interval reasoning (never building the ``Sq x Sk`` tensor),
and prints a text that ``attnc.printer`` parses back.  What is no band or range of positions is a ``Formula``.
Positions are token indices: query ``q`` in ``[0, Sq)``, key ``k`` in ``[0, Sk)``.

Source: forms/static_sparse, sections 0 and 22 of the project's design notes (Padding and Dense are run-time
data; chunks, documents, strides, clamped windows and regions are formulas over coordinates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from attnc.expr import Expr
from attnc.formula import Tensors, fold
from attnc.formula import operands as formula_operands
from attnc.formula_text import short, show
from attnc.intervals import Intervals

Tile = Literal["skip", "full", "mixed"]
Align = Literal["start", "end"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where a predicate is evaluated: sizes of the score tensor, and the run-time tensors by name.

    ``captured`` maps an operand's name to its tensor in canonical layout (see the atom's docstring).  ``b``
    and ``h``, numbers of batch entries and heads, matter to formulas over them only.
    """

    sq: int
    sk: int
    device: torch.device
    captured: Mapping[str, torch.Tensor]
    b: int = 1
    h: int = 1


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


@dataclass(frozen=True, slots=True)
class Formula(Mask):
    """Keep what a symbolic predicate over positions keeps: see ``attnc.formula``.

    It may read integer operands ``[B, Sq]``, ``[B, Sk]`` or ``[B]`` at the pair's positions (documents).
    """

    value: Expr

    def keep(self, grid: Grid) -> torch.Tensor:
        """Return the predicate, of size 1 along the axes it does not read."""
        sizes = {"b": grid.b, "h": grid.h, "q": grid.sq, "k": grid.sk}
        found = fold(self.value, Tensors(sizes, grid.device, grid.captured))
        return found if found.dim() == 4 else found.reshape(1, 1, 1, 1)

    def classify(self, q: tuple[int, int], k: tuple[int, int], sq: int, sk: int) -> Tile:
        """Bound the terms over the tile."""
        may, must = fold(self.value, Intervals({"q": q, "k": k, "Sq": (sq, sq), "Sk": (sk, sk)}))
        return "full" if must else "mixed" if may else "skip"

    def describe(self) -> str:
        """Return the short form, without the names of operands; else the formula."""
        found = short(self.value)
        if found is None:
            return show(self.value)
        return found[0] if set(found[1]) == set(self.operands) != set() else show(self.value)

    @property
    def operands(self) -> tuple[str, ...]:
        """The integer tensors that it reads."""
        return formula_operands(self.value)

    def __str__(self) -> str:
        return show(self.value)


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
