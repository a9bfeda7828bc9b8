"""The text of a program as it is written: lines, indentation, inputs, and sizes by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("b", "h", "n", "s", "t", "d", "e")
"""Batch, key heads, query heads per key head, queries, keys, features of keys, features of values."""
Sizes = dict[str, int]

SIZES: dict[str, tuple[int, ...]] = {  # without n
    "distinct": (2, 3, 5, 11, 8, 13),
    "square": (2, 3, 5, 5, 4, 4),
    "equal": (4, 4, 4, 4, 4, 4),
    "short": (2, 3, 7, 5, 4, 4),
    "decode": (2, 3, 1, 6, 4, 8),
    "one_key": (2, 3, 4, 1, 2, 4),
    "lone": (1, 1, 3, 3, 2, 2),
}


def sizes_of(kind: str, group: int) -> Sizes:
    """Return the sizes by name; where all are equal the query heads are as many, too."""
    b, h, s, t, d, e = SIZES[kind]
    if kind == "equal" and group == 2:
        h = 2
    return dict(zip(NAMES, (b, h, group, s, t, d, e), strict=True))


@dataclass(frozen=True)
class Input:
    """A tensor the program takes: its name, its sizes as text, and what it holds."""

    name: str
    shape: tuple[str, ...]
    kind: str = "normal"

    def draw(self, z: Sizes, g: torch.Generator, how: str) -> Tensor:
        """Return a tensor of the kind; ``how`` is usual, wide (large values) or hidden (rows of no keys)."""
        shape = [int(eval(n, {}, dict(z))) for n in self.shape]
        if self.kind in ("normal", "bias"):
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            if self.kind == "bias" and how == "hidden":
                x = x.masked_fill(x < -0.5, -torch.inf)
            return x * 3 if how == "wide" else x
        if self.kind == "factor":
            return torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        if self.kind == "ids":
            return torch.randint(0, 2, shape, generator=g)
        if self.kind == "lengths":
            x = torch.randint(1, z["t"] + 1, shape, generator=g)
            return torch.where(torch.arange(len(x)) % 2 == 0, 0, x) if how == "hidden" else x
        keep = torch.rand(shape, generator=g) < 0.6
        keep[..., 0] |= how == "usual"
        if how == "hidden":
            keep[::2] = False
        return keep.to({"bool": torch.bool, "floats": torch.float64, "integers": torch.int64}[self.kind])


@dataclass
class Writer:
    """Collects the text: ``head`` stands above the function, ``lines`` in it."""

    z: Sizes
    inputs: list[Input] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    indent: int = 1

    def __call__(self, *lines: str) -> None:
        self.lines += ["    " * self.indent + line for line in lines]

    @contextmanager
    def block(self, opening: str) -> Iterator[None]:
        """Indent what is written inside."""
        self(opening)
        self.indent += 1
        yield
        self.indent -= 1

    def take(self, name: str, *shape: str, kind: str = "normal") -> str:
        """Add an input unless it is there; return its name."""
        wanted = Input(name, shape, kind)
        have = {i.name: i for i in self.inputs}
        assert have.get(name, wanted) == wanted, name
        if name not in have:
            self.inputs.append(wanted)
        return name
