"""Lift a derived condition to a predicate: bands and ranges from comparisons, the rest from loads.

The condition is a tree of ``p <= 0``, ``p == 0``, loads and connectives over canonical positions. A
comparison of ``q - k`` with a constant (or with a constant plus ``Sk - Sq``) is a band; of ``k`` or ``q``
alone a range. What reads tensors at (b, k) only is padding; whatever is left is dense, and is kept as it is:
nothing is assumed about it. Source: the project's detection notes, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnc import expr as E
from attnc import masks as M
from attnc.expr import Expr


@dataclass(frozen=True, slots=True)
class Lifted:
    """A predicate, and for each operand that it names the condition to compute and its axes.

    Axes are ``bk``, ``bq`` or ``bhqk``.
    """

    mask: M.Mask
    operands: tuple[tuple[str, str, Expr], ...]


@dataclass(frozen=True, slots=True)
class Positions:
    """Canonical positions as polynomials: ``q`` and ``k`` with their lengths, and the atoms of each role."""

    q: Expr
    k: Expr
    sq: Expr
    sk: Expr
    roles: tuple[tuple[Expr, ...], ...]


def lift(keep: Expr, at: Positions, first_name: int) -> Lifted:
    """Return the predicate of ``keep``; operands are named ``c<first_name>`` and on."""
    operands: list[tuple[str, str, Expr]] = []

    def name(axes: str, value: Expr) -> str:
        for n, a, v in operands:
            if a == axes and v == value:
                return n
        operands.append((f"c{first_name + len(operands)}", axes, value))
        return operands[-1][0]

    def go(c: Expr) -> M.Mask:
        if c == E.TRUE:
            return M.Full()
        closed = _closed(c, at)
        if closed is not None:
            return closed
        if c.op == "and":
            return _gathered(c.args[0], M.both)
        if c.op == "or":
            return _gathered(c.args[0], M.either)
        if c.op == "not" and c.args[0].op in ("and", "or"):
            return M.Not(go(c.args[0]))
        axes = _axes_read(c, at)
        return (
            M.Padding(name(axes, c), "k" if axes == "bk" else "q")
            if axes in ("bk", "bq")
            else M.Dense(name("bhqk", c))
        )

    def _gathered(parts: Sequence[Expr], join: object) -> M.Mask:
        """Lift parts one by one; those that end as data on the same axes become one operand."""
        done: list[M.Mask] = []
        data: dict[str, list[Expr]] = {}
        for p in parts:
            closed = _closed(p, at)
            if closed is not None:
                done.append(closed)
            elif p.op in ("and", "or") and any(_closed(x, at) is not None for x in p.args[0]):
                done.append(go(p))
            else:
                data.setdefault(_axes_read(p, at), []).append(p)
        combine = E.and_ if join is M.both else E.or_
        for ps in data.values():
            whole = combine(*ps)
            axes = _axes_read(whole, at)
            done.append(
                M.Padding(name(axes, whole), "k" if axes == "bk" else "q")
                if axes in ("bk", "bq")
                else M.Dense(name("bhqk", whole))
            )
        return join(*done)  # type: ignore[operator, no-any-return]

    mask = _aligned(go(keep), at)
    read = [o for o in operands if o[0] in mask.operands]
    names = {o[0]: f"c{first_name + i}" for i, o in enumerate(read)}
    return Lifted(_renamed(mask, names), tuple((names[n], axes, value) for n, axes, value in read))


def _renamed(mask: M.Mask, names: Mapping[str, str]) -> M.Mask:
    """Give the operands of a mask new names."""
    if isinstance(mask, M.And | M.Or):
        return type(mask)(tuple(_renamed(p, names) for p in mask.parts))
    if isinstance(mask, M.Not):
        return M.Not(_renamed(mask.part, names))
    if isinstance(mask, M.Padding | M.Dense):
        return replace(mask, operand=names[mask.operand])
    return mask


def _aligned(mask: M.Mask, at: Positions) -> M.Mask:
    """Write a band that ends at the last key for the last query as aligned there, where lengths are fixed."""
    gap = E.as_int(E.sub(at.sk, at.sq))
    if isinstance(mask, M.And | M.Or):
        return type(mask)(tuple(_aligned(p, at) for p in mask.parts))
    if isinstance(mask, M.Not):
        return M.Not(_aligned(mask.part, at))
    if isinstance(mask, M.Band) and mask.align == "start" and gap and mask.right == gap:
        return M.Band(None if mask.left is None else mask.left + gap, 0, "end")
    return mask


def _axes_read(c: Expr, at: Positions) -> str:
    """Return which axes a condition depends on: ``bk``, ``bq`` or ``bhqk``."""
    b, h, q, k = (set(r) for r in at.roles[:4])
    used = set(E.indices(c))
    if used & h or (used & q and used & k) or not used <= b | q | k:
        return "bhqk"
    return "bq" if used & q else "bk"


def _closed(c: Expr, at: Positions) -> M.Mask | None:
    """Return a comparison as a band or a range, a connective of such as a tree.

    None if data is read or the form is unknown.
    """
    if c == E.TRUE:
        return M.Full()
    if c.op in ("and", "or"):
        parts = [_closed(p, at) for p in c.args[0]]
        if any(p is None for p in parts):
            return None
        known = [p for p in parts if p is not None]
        return M.both(*known) if c.op == "and" else _either(known)
    if c.op == "not":
        part = _closed(c.args[0], at)
        return None if part is None else M.Not(part)
    if c.op == "le0":
        return _compare(c.args[0], at)
    if c.op == "eq0":
        low, high = _compare(c.args[0], at), _compare(E.neg(c.args[0]), at)
        return M.both(low, high) if low is not None and high is not None else None
    return None


def _either(parts: list[M.Mask]) -> M.Mask:
    return M.either(*parts)


def _compare(p: Expr, at: Positions) -> M.Mask | None:
    """Return the predicate ``p <= 0`` for ``p`` = (k - q or q - k or k or q or -k or -q) + constant."""
    gap = E.sub(at.sk, at.sq)
    for sign, base in ((1, E.sub(at.k, at.q)), (-1, E.sub(at.q, at.k))):
        rest = E.sub(p, base)
        n = E.as_int(rest)
        if n is not None:
            return M.Band(None, -n) if sign > 0 else M.Band(-n, None)
        n = E.as_int(E.add(rest, gap) if sign > 0 else E.sub(rest, gap))
        if n is not None:
            return M.Band(None, -n, "end") if sign > 0 else M.Band(-n, None, "end")
    for axis, x in (("k", at.k), ("q", at.q)):
        n = E.as_int(E.sub(p, x))
        if n is not None and -n + 1 >= 0:
            return M.Range("k" if axis == "k" else "q", 0, -n + 1)
        n = E.as_int(E.add(p, x))
        if n is not None:
            return M.Not(M.Range("k" if axis == "k" else "q", 0, n)) if n > 0 else M.Full()
    return None
