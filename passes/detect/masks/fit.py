"""Fit a constant tensor with a closed form: equality with every element, or nothing.

A registered buffer, a lifted constant or what a graph computes from such is compared with a small family: a
constant, a position times a number, a quotient or a remainder of a position, a few steps, and for pairs of
positions bands, chunks, strides and windows that are shifted.  The fit replaces the load inside a derivation,
so masks that are combined with it stay closed.  Source: the project's design notes, section 4 (fit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attnc import expr as E
from attnc.expr import Expr

Fit = Callable[[Sequence[Expr]], Expr]
"""The element at an index: one integer polynomial per axis."""

LARGEST = 1 << 26
"""Elements of the largest tensor that is looked at."""
STEPS = 16
"""The most steps of a piecewise constant row."""


def fit(t: Tensor) -> Fit | None:
    """Return a closed form that equals ``t`` at every index, None if the family has none.

    Numbers are bools, integers, or floats that take few values; NaN has no fit.
    """
    if t.dtype.is_complex or t.is_meta or not 0 < t.numel() <= LARGEST or bool((t != t).any()):
        return None
    t = t.detach()
    axes = [d for d in range(t.dim()) if not _is_constant_along(t, d)]
    core = t[tuple(slice(None) if d in axes else 0 for d in range(t.dim()))]
    found = _fit_core(core)
    if found is None:
        return None
    return lambda index: found([index[d] for d in axes])


def _is_constant_along(t: Tensor, d: int) -> bool:
    return t.shape[d] == 1 or bool((t == t.narrow(d, 0, 1)).all())


def _fit_core(t: Tensor) -> Fit | None:
    """Fit a tensor that varies along each of its axes."""
    if t.dim() == 0:
        value = _literal(t)
        return lambda index: value
    if t.dim() == 1:
        return _row(t)
    numbers = t.to(torch.uint8) if t.dtype == torch.bool else t
    least, most = (x.to(t.dtype) for x in (numbers.min(), numbers.max()))
    if bool(((t == least) | (t == most)).all()):
        low, high = _literal(least), _literal(most)
        keep = _pairs(t == most) if t.dim() == 2 else _windows(t == most)
        negated = None if keep is not None or t.dim() > 2 else _pairs(t == least)
        if keep is not None:
            return lambda index: E.where(keep(index), high, low)
        if negated is not None:
            return lambda index: E.where(negated(index), low, high)
    return _affine(t)


def _literal(v: Tensor) -> Expr:
    x = v.item()
    if isinstance(x, bool):
        return E.TRUE if x else E.FALSE
    return E.integer(x) if isinstance(x, int) else E.real(x)


def _whole(t: Tensor) -> Tensor | None:
    """Return numbers as int64, None if some are no integers."""
    if t.dtype == torch.bool or not t.dtype.is_floating_point:
        return t.to(torch.int64)
    whole = bool((t == t.round()).all()) and bool((t.abs() < 2**24).all())
    return t.to(torch.int64) if whole else None


# ---------------------------------------------------------------- one axis


def _row(t: Tensor) -> Fit | None:
    x = _whole(t)
    if x is not None and t.dtype != torch.bool:
        number = _line(x) or _digits(x)
        if number is not None:
            return number
    return _few_steps(t)


def _line(x: Tensor) -> Fit | None:
    """Fit ``a + c * i``."""
    steps = x.diff()
    if not bool((steps == steps[0]).all()):
        return None
    a, c = int(x[0]), int(steps[0])
    return lambda index: E.add(E.integer(a), E.mul(E.integer(c), index[0]))


def _digits(x: Tensor) -> Fit | None:
    """Fit ``a + c * ((i // s) % m)``, a digit of the position."""
    i = torch.arange(len(x), device=x.device)
    change = x.diff().nonzero()
    s = int(change[0]) + 1
    a, c = int(x[0]), int(x[s] - x[0])
    back = (x[::s] == a).nonzero()
    m = int(back[1]) if len(back) > 1 else len(x) // s + 1
    if not bool((x == a + c * ((i // s) % m)).all()):
        return None
    number, block, period = E.integer(c), E.integer(s), E.integer(m)
    wraps = m * s < len(x)

    def at(index: Sequence[Expr]) -> Expr:
        q = E.floordiv(index[0], block)
        return E.add(E.integer(a), E.mul(number, E.mod(q, period) if wraps else q))

    return at


def _few_steps(t: Tensor) -> Fit | None:
    """Fit a row of few pieces, each constant."""
    change = ((t[1:] != t[:-1]).nonzero().flatten() + 1).tolist()
    pieces = len(change) + 1
    if pieces > STEPS or (pieces > 4 and 2 * pieces > len(t)):
        return None  # a list of all values says nothing
    values = [_literal(t[i]) for i in [0, *change]]

    def at(index: Sequence[Expr]) -> Expr:
        out = values[-1]
        for end, value in reversed(list(zip(change, values[:-1], strict=True))):
            out = E.where(E.le0(E.sub(index[0], E.integer(end - 1))), value, out)
        return out

    return at


def _affine(t: Tensor) -> Fit | None:
    """Fit ``a + sum of c_d * i_d``, as tables of relative positions are."""
    x = _whole(t)
    if x is None or t.dtype == torch.bool:
        return None
    origin = x[(0,) * x.dim()]
    steps = [int(x.select(d, 1)[(0,) * (x.dim() - 1)] - origin) for d in range(x.dim())]
    made = origin
    for d, c in enumerate(steps):
        made = made + c * torch.arange(x.shape[d], device=x.device).view(
            [-1 if i == d else 1 for i in range(x.dim())]
        )
    if not torch.equal(made, x):
        return None
    return lambda index: E.add(
        E.integer(int(origin)), *(E.mul(E.integer(c), i) for c, i in zip(steps, index, strict=True))
    )


# ---------------------------------------------------------------- pairs of positions


def _pairs(keep: Tensor) -> Fit | None:
    """Fit a relation of two positions, bool ``[Q, K]`` with both values in it."""
    for found in (_band(keep), _stride(keep), _chunks(keep), _blocks(keep)):
        if found is not None:
            return found
    lower = _band_of(keep)
    if lower is None:
        return None
    band, inside = lower
    both = keep | keep.T if keep.shape[0] == keep.shape[1] else None
    rest = None if both is None or not torch.equal(both & inside, keep) else _stride(both) or _chunks(both)
    return None if rest is None else lambda index: E.and_(band(index), rest(index))


def _distances(keep: Tensor) -> Tensor:
    q, k = (torch.arange(n, device=keep.device) for n in keep.shape)
    return q[:, None] - k[None, :]


def _band(keep: Tensor) -> Fit | None:
    found = _band_of(keep)
    return found[0] if found is not None and torch.equal(found[1], keep) else None


def _band_of(keep: Tensor) -> tuple[Fit, Tensor] | None:
    """Return the narrowest band that holds all pairs kept, and its tensor; ends at the border are open."""
    d = _distances(keep)
    seen = d[keep]
    low, high = int(seen.min()), int(seen.max())
    least, most = 1 - keep.shape[1], keep.shape[0] - 1
    inside = (d >= low) & (d <= high)

    def at(index: Sequence[Expr]) -> Expr:
        here = E.sub(index[0], index[1])
        left = E.TRUE if high == most else E.le0(E.sub(here, E.integer(high)))
        return E.and_(left, E.TRUE if low == least else E.le0(E.sub(E.integer(low), here)))

    return at, inside


def _stride(keep: Tensor) -> Fit | None:
    """Fit "the distance is r modulo n"."""
    row = keep[0].nonzero().flatten()
    if len(row) < 2:
        return None
    n = int(row[1] - row[0])
    r = int(-row[0]) % n
    if n < 2 or not torch.equal(_distances(keep) % n == r, keep):
        return None
    return lambda index: E.eq0(E.sub(E.mod(E.sub(index[0], index[1]), E.integer(n)), E.integer(r)))


def _chunks(keep: Tensor) -> Fit | None:
    """Fit "both positions lie in one piece" of few or equal pieces."""
    if keep.shape[0] != keep.shape[1] or not bool(keep.diagonal().all()):
        return None
    first = keep.to(torch.uint8).argmax(1)
    if not torch.equal(first[:, None] == first[None, :], keep):
        return None
    label = (first.diff() != 0).to(torch.int64).cumsum(0)
    label = torch.cat([label.new_zeros(1), label])
    if not torch.equal(label[:, None] == label[None, :], keep):
        return None
    row = _row(label)
    return None if row is None else lambda index: E.eq0(E.sub(row([index[0]]), row([index[1]])))


def _blocks(keep: Tensor) -> Fit | None:
    """Fit "the key's block does not come after the query's"."""
    n = int(keep[0].sum())
    q, k = (torch.arange(m, device=keep.device) for m in keep.shape)
    if n < 2 or not torch.equal(k[None, :] // n <= q[:, None] // n, keep):
        return None
    size = E.integer(n)
    return lambda index: E.le0(E.sub(E.floordiv(index[1], size), E.floordiv(index[0], size)))


# ---------------------------------------------------------------- shifted windows


def _windows(keep: Tensor) -> Fit | None:
    """Fit the mask of shifted windows, bool ``[windows, P * P, P * P]``.

    Only windows of the last row and column hold two regions per axis; tokens see their own.  Source: Liu and
    others, Swin Transformer (arXiv:2103.14030), section 3.2 (cyclic shift and masking).
    """
    if keep.dim() != 3 or keep.shape[1] != keep.shape[2]:
        return None
    side = round(keep.shape[1] ** 0.5)
    if side * side != keep.shape[1]:
        return None
    for rows, columns in _divisors(keep.shape[0]):
        found = _regions(keep, rows, columns, side)
        if found is not None:
            return found
    return None


def _divisors(n: int) -> Iterator[tuple[int, int]]:
    pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    yield from sorted(pairs, key=lambda p: abs(p[0] - p[1]))


def _regions(keep: Tensor, rows: int, columns: int, side: int) -> Fit | None:
    i = torch.arange(side * side, device=keep.device)
    w = torch.arange(keep.shape[0], device=keep.device)
    last = keep[-1]
    edges = []
    for position, stride in ((i // side, side), (i % side, 1)):
        line = last[0, ::stride][:side] if stride > 1 else last[0, :side]
        edge = int(line.sum())
        edges.append((position, edge))
    made = torch.ones_like(keep)
    for (position, edge), window, count in ((edges[0], w // columns, rows), (edges[1], w % columns, columns)):
        part = position >= edge
        same = part[:, None] == part[None, :]
        made &= (window < count - 1)[:, None, None] | same[None]
    if not torch.equal(made, keep):
        return None
    (_, top), (_, left) = edges

    def at(index: Sequence[Expr]) -> Expr:
        window, q, k = index
        n, p = E.integer(columns), E.integer(side)
        y = _split(E.floordiv(window, n), rows, E.floordiv(q, p), E.floordiv(k, p), top)
        return E.and_(y, _split(E.mod(window, n), columns, E.mod(q, p), E.mod(k, p), left))

    return at


def _split(window: Expr, count: int, q: Expr, k: Expr, edge: int) -> Expr:
    """Return "the last window's two regions hold both or one", true in all other windows."""
    before = [E.le0(E.sub(x, E.integer(edge - 1))) for x in (q, k)]
    both = E.and_(*before)
    none = E.and_(*map(E.not_, before))
    return E.or_(E.le0(E.sub(window, E.integer(count - 2))), both, none)
