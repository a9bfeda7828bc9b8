"""Neighborhood attention on a grid of one, two or three axes, over a dense site.

BOUNDED, without retraining (as GNA reports for video and image transformers); exact where the window fills
the grid.

Per axis of length ``L``, with window ``w``, stride ``s`` and dilation ``d``, positions ``x`` fall into ``d``
groups ``r = x % d`` of ``Lr = ceil((L - r) / d)``; in a group, ``u = x // d``, all queries of a stride group
share the window of their leader:

    leader = min(u // s * s + s // 2, Lr - 1);  start = clamp(leader - w // 2, 0, Lr - w)
    causal: leader = min(u // s * s + s - 1, Lr - 1);  start = max(leader - (w - 1), 0), and keys up to u

At a border the window moves inward: it keeps its ``w`` keys.  A causal one is cut.  Axes are independent.
Sources: Faster Neighborhood Attention (arXiv:2403.04690); Generalized Neighborhood Attention
(arXiv:2504.16922); Dilated Neighborhood Attention (arXiv:2209.15001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from attnc import expr as E
from attnc.errors import RewriteError
from attnc.expr import Expr
from attnc.formula import K, Q
from attnc.ir import AttentionSpec, Contract, Miss
from attnc.masks import Formula, Mask, both
from attnc.passes.rewrite.sparse.patterns import hiding, same_positions, whole


@dataclass(frozen=True, slots=True)
class Neighborhood:
    """Attend to the ``window`` nearest keys along each axis of ``grid``, tokens in raster order.

    ``stride``, ``dilation`` and ``causal`` are one value for all axes or one per axis.  The ``prefix`` tokens
    before the grid (a class token, text) see all and are seen by all.

    Raises:
        RewriteError: no axis or more than three, a window beyond its axis (``window * dilation > length``), a
            stride beyond the window, values per axis that are not as many as the axes, or no whole numbers.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (False,)
    prefix: int = 0
    name: ClassVar[str] = "neighborhood"
    contract: ClassVar[Contract] = "BOUNDED"

    def __post_init__(self) -> None:
        grid = _axes("grid", self.grid)
        if not 1 <= len(grid) <= 3:
            raise RewriteError(f"{self.name}: expected a grid of one to three axes, found {self.grid!r}")
        given = {"grid": grid}
        for name in ("window", "stride", "dilation", "causal"):
            each = _axes(name, getattr(self, name))
            each = each * len(grid) if len(each) == 1 else each
            if len(each) != len(grid):
                raise RewriteError(
                    f"{self.name}: expected {name} as one value or one for each of {len(grid)} axes, "
                    f"found {getattr(self, name)!r}"
                )
            given[name] = each
        for name, each in given.items():
            for x in each:
                if name != "causal":
                    whole(self.name, name, x, 1, "steps" if name != "grid" else "tokens")
                elif not isinstance(x, bool):
                    raise RewriteError(f"{self.name}: expected causal as True or False, found {x!r}")
            object.__setattr__(self, name, each)
        whole(self.name, "prefix", self.prefix, 0)
        for length, window, stride, dilation in zip(
            self.grid, self.window, self.stride, self.dilation, strict=True
        ):
            if window * dilation > length:
                raise RewriteError(
                    f"{self.name}: expected window * dilation of at most the axis of {length} tokens, "
                    f"found {window} * {dilation}"
                )
            if stride > window:
                raise RewriteError(
                    f"{self.name}: expected a stride of at most the window of {window}, found {stride}"
                )

    def applies(self, spec: AttentionSpec) -> Miss | None:
        """Refuse sites whose tokens are not those of the grid and its prefix."""
        tokens = self.prefix + math.prod(self.grid)
        if spec.q.shape[2] != tokens and spec.q.shape[2] == spec.k.shape[2]:
            why = (
                f"the grid {'x'.join(map(str, self.grid))} and a prefix of {self.prefix} are {tokens} tokens"
            )
            return Miss("pattern-tokens", "", f"{why}, the site has {spec.q.shape[2]}")
        return same_positions(spec)

    def mask(self, spec: AttentionSpec) -> Mask:
        """Return the site's mask and the neighborhoods."""
        parts, step = [], math.prod(self.grid)
        for at, length in enumerate(self.grid):
            step //= length
            q, k = (self._coordinate(x, step, length, first=at == 0) for x in (Q, K))
            parts.append(
                _near(q, k, length, self.window[at], self.stride[at], self.dilation[at], self.causal[at])
            )
        near = E.and_(*parts)
        if self.prefix:
            near = E.or_(*(E.le0(E.sub(x, E.integer(self.prefix - 1))) for x in (Q, K)), near)
        return spec.mask if near == E.TRUE else both(spec.mask, Formula(near))

    def rewrite(self, spec: AttentionSpec) -> AttentionSpec:
        """Return the spec with the neighborhoods; queries that see no key (padding) give zeros."""
        return hiding(spec, self.mask(spec))

    def _coordinate(self, x: Expr, step: int, length: int, *, first: bool) -> Expr:
        place = E.floordiv(E.sub(x, E.integer(self.prefix)), E.integer(step))
        return place if first else E.mod(place, E.integer(length))


def _axes(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    return (value,)


def _near(q: Expr, k: Expr, length: int, window: int, stride: int, dilation: int, causal: bool) -> Expr:
    """Return "key ``k`` is in the window of query ``q``" on one axis."""
    if window == length and not causal:
        return E.TRUE
    d = E.integer(dilation)
    group = E.mod(q, d)
    u, c = E.floordiv(q, d), E.floordiv(k, d)
    most = E.floordiv(E.sub(E.integer(length - 1), group), d)  # Lr - 1
    leader = u
    if stride > 1:
        ahead = E.integer(stride - 1 if causal else stride // 2)
        group_start = E.mul(E.floordiv(u, E.integer(stride)), E.integer(stride))
        leader = _least(E.add(group_start, ahead), most)
    if causal:
        start = _greatest(E.sub(leader, E.integer(window - 1)), E.ZERO)
        end = u
    else:
        last = E.sub(most, E.integer(window - 1))  # Lr - w
        start = _least(_greatest(E.sub(leader, E.integer(window // 2)), E.ZERO), last)
        end = E.add(start, E.integer(window - 1))
    inside = (E.le0(E.sub(start, c)), E.le0(E.sub(c, end)))
    same = () if dilation == 1 else (E.eq0(E.sub(E.mod(k, d), group)),)
    return E.and_(*same, *inside)


def _least(a: Expr, b: Expr) -> Expr:
    return E.where(E.le0(E.sub(a, b)), a, b)


def _greatest(a: Expr, b: Expr) -> Expr:
    return E.where(E.le0(E.sub(a, b)), b, a)
