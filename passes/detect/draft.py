"""The spec of a site while it is being written, and how a condition that fails ends the writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch

from attnc.ir import Miss, Operand, Step
from attnc.passes.detect.env import Env, RawMask
from attnc.passes.detect.found import Computed
from attnc.passes.detect.layout import Recipe, size_of
from attnc.passes.detect.roles import Atoms, Roles
from attnc.passes.detect.sites import Skeleton
from attnc.sizes import show_dim


class Refusal(Exception):
    """A condition of the description failed; carries the Miss. Raised and caught inside this package only."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.why)
        self.miss = miss


@dataclass
class Draft:
    """The spec while it is being written."""

    skeleton: Skeleton
    roles: Roles
    env: Env
    steps: list[Step] = field(default_factory=list)
    mask: RawMask | None = None
    shift: float = 0.0
    zeroes: bool = False
    captured: list[Operand] = field(default_factory=list)
    recipes: dict[str, Recipe | Computed] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)

    def refuse(self, code: str, why: str) -> NoReturn:
        """Give up on the site."""
        raise Refusal(Miss(code, self.skeleton.scores.node.name, why))

    def grid(self) -> tuple[Atoms, Atoms, Atoms, Atoms]:
        """Return the atoms of the score axes b, h, q, k."""
        r = self.roles
        return r.batch, r.heads, r.query, r.key

    def capture(
        self,
        axes: str,
        roles: tuple[Atoms, ...],
        recipe: Recipe | Computed,
        dtype: torch.dtype,
        kept: tuple[bool, ...],
    ) -> str:
        """Add a captured operand and return its name; ``kept`` says which roles are not of size 1."""
        name = f"c{len(self.captured)}"
        dims = tuple(show_dim(size_of(r)) if k else 1 for r, k in zip(roles, kept, strict=True))
        self.captured.append(Operand(name, axes, dims, dtype))
        self.recipes[name] = recipe
        return name
