"""Lift a derived condition to a predicate: closed forms from comparisons, the rest from loads.

The condition is a tree of ``p <= 0``, ``p == 0``, loads and connectives over canonical positions. What is
made of positions is closed (``closed``).  What reads tensors at (b, k) only is padding, comparisons of rows
of integers are formulas; whatever is left is dense, and is kept as it is: nothing is assumed about it.
Source: the project's detection notes, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnc import expr as E
from attnc import masks as M
from attnc.expr import Expr
from attnc.passes.detect.masks.closed import Positions, closed, formula_of_rows

__all__ = ["Lifted", "Positions", "lift"]


@dataclass(frozen=True, slots=True)
class Lifted:
    """A predicate, for each operand that it names the value to compute and its axes, and where it holds.

    ``conditions`` lists what it took from fixed lengths; without any it holds for all lengths.
    Values are conditions with axes ``bk``, ``bq`` or ``bhqk``, or integers with ``bk``, ``bq`` or ``b``.
    """

    mask: M.Mask
    operands: tuple[tuple[str, str, Expr], ...]
    conditions: tuple[str, ...] = ()


def lift(keep: Expr, at: Positions, first_name: int) -> Lifted:
    """Return the predicate of ``keep``; operands are named ``c<first_name>`` and on."""
    work = _Lift(at)
    mask = _ordered(_aligned(work.mask(keep), at))
    read = [o for o in work.operands if o[0] in mask.operands]
    names = {o[0]: f"c{first_name + i}" for i, o in enumerate(read)}
    operands = tuple((names[n], axes, value) for n, axes, value in read)
    return Lifted(M.rename(mask, names), operands, tuple(dict.fromkeys(at.used)))


@dataclass
class _Lift:
    """One condition on its way to a predicate."""

    at: Positions
    operands: list[tuple[str, str, Expr]] = field(default_factory=list)

    def name(self, axes: str, value: Expr) -> str:
        """Return the name of the operand that holds ``value``; equal ones are captured once."""
        for n, a, v in self.operands:
            if a == axes and v == value:
                return n
        self.operands.append((f"t{len(self.operands)}", axes, value))
        return self.operands[-1][0]

    def mask(self, c: Expr) -> M.Mask:
        """Return the predicate of a condition."""
        whole = closed(c, self.at)
        if whole is not None:
            return whole
        if c.op == "and":
            return self._gathered(c.args[0], M.both, E.and_)
        if c.op == "or":
            return self._gathered(c.args[0], M.either, E.or_)
        if c.op == "not" and c.args[0].op in ("and", "or"):
            return M.Not(self.mask(c.args[0]))
        return self._data(c)

    def _gathered(
        self, parts: Sequence[Expr], join: Callable[..., M.Mask], combine: Callable[..., Expr]
    ) -> M.Mask:
        """Lift parts one by one; those that end as data on the same axes become one operand."""
        done: list[M.Mask] = []
        data: dict[str, list[Expr]] = {}
        for p in parts:
            whole = closed(p, self.at)
            axes = self._axes(p)
            if whole is not None:
                done.append(whole)
            elif p.op in ("and", "or") and axes == "bhqk":
                done.append(self.mask(p))
            else:
                rows = axes == "bhqk" or (combine is E.or_ and self._is_prefix(p))
                formula = formula_of_rows(p, self.at, self.name) if rows else None
                if formula is not None:
                    done.append(formula)
                else:
                    data.setdefault(axes, []).append(p)
        return join(*done, *(self._data(combine(*ps)) for ps in data.values()))

    def _data(self, c: Expr) -> M.Mask:
        """Return what reads tensors: rows of validity, formulas over rows, or a dense tensor."""
        axes = self._axes(c)
        if axes != "bhqk":
            return M.Padding(self.name(axes, c), "k" if axes == "bk" else "q")
        formula = formula_of_rows(c, self.at, self.name)
        return formula if formula is not None else M.Dense(self.name("bhqk", c))

    def _is_prefix(self, c: Expr) -> bool:
        """Say whether keys are compared with data that is the same for all of them, as in ``k < p[b]``."""
        batch, key = set(self.at.roles[0]), set(self.at.roles[3])
        read = {i for x in E.loads(c) for i in E.indices(x)}
        return c.op == "le0" and self._axes(c) == "bk" and bool(set(E.indices(c)) & key) and read <= batch

    def _axes(self, c: Expr) -> str:
        """Return which axes a condition depends on: ``bk``, ``bq`` or ``bhqk``."""
        b, h, q, k = (set(r) for r in self.at.roles[:4])
        used = set(E.indices(c))
        if used & h or (used & q and used & k) or not used <= b | q | k:
            return "bhqk"
        return "bq" if used & q else "bk"


_KINDS = (M.Band, M.Range, M.Not, M.Formula, M.Padding, M.Dense, M.And, M.Or)


def _ordered(mask: M.Mask) -> M.Mask:
    """Put the parts of connectives in an order that depends on nothing but their text."""
    if isinstance(mask, M.And | M.Or):
        parts = sorted(map(_ordered, mask.parts), key=lambda p: (_KINDS.index(type(p)), str(p)))
        return type(mask)(tuple(parts))
    return M.Not(_ordered(mask.part)) if isinstance(mask, M.Not) else mask


def _aligned(mask: M.Mask, at: Positions) -> M.Mask:
    """Write a band that ends at the last key for the last query as aligned there, where lengths are fixed."""
    gap = E.as_int(E.sub(at.sk, at.sq))
    if isinstance(mask, M.And | M.Or):
        return type(mask)(tuple(_aligned(p, at) for p in mask.parts))
    if isinstance(mask, M.Not):
        return M.Not(_aligned(mask.part, at))
    if isinstance(mask, M.Band) and mask.align == "start" and gap and mask.right == gap:
        at.used.append(f"Sk - Sq == {gap}")
        return M.Band(None if mask.left is None else mask.left + gap, 0, "end")
    return mask
