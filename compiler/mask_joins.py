"""Join masks and ask about them: flat conjunctions, disjunctions, and whether a query may see no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attnc import expr as E
from attnc.expr import Expr
from attnc.formula import POSITIONS, SK, SQ, SYMBOLS, K, Q, fold, renamed
from attnc.intervals import FAR, Intervals
from attnc.mask_atoms import FULL, Align, And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range

NOTHING = Not(FULL)
"""No key is visible."""


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
            if left is not None and right is not None and left + right < 0:
                return NOTHING
            flat.insert(at, Band(left, right, align))
    flat = list(dict.fromkeys(flat))
    if NOTHING in flat:
        return NOTHING
    return Full() if not flat else flat[0] if len(flat) == 1 else And(tuple(flat))


def either(*parts: Mask) -> Mask:
    """Return the disjunction of ``parts``, flattened and without repeats; ``Full`` absorbs.

    Bands of one alignment that overlap or touch become one.
    """
    flat: list[Mask] = []
    for p in parts:
        flat += p.parts if isinstance(p, Or) else [p]
    flat = _joined(list(dict.fromkeys(p for p in flat if p != NOTHING))) or [NOTHING]
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


def rename(mask: Mask, names: Mapping[str, str]) -> Mask:
    """Return the mask with other names for its operands."""
    match mask:
        case And(parts) | Or(parts):
            return type(mask)(tuple(rename(p, names) for p in parts))
        case Not(part):
            return Not(rename(part, names))
        case Formula(value):
            return Formula(renamed(value, names)) if mask.operands else mask
        case Padding() | Dense():
            return replace(mask, operand=names[mask.operand])
    return mask


def integers(mask: Mask) -> tuple[str, ...]:
    """Return the names of the operands that hold integers: ids and lengths, which formulas read."""
    match mask:
        case And(parts) | Or(parts):
            return tuple(dict.fromkeys(n for p in parts for n in integers(p)))
        case Not(part):
            return integers(part)
    return mask.operands if isinstance(mask, Formula) else ()


def condition(mask: Mask) -> Expr:
    """Return a mask as one symbolic predicate over positions; padding and dense tensors are bool loads."""
    match mask:
        case Full():
            return E.TRUE
        case Band(left, right, align):
            d = E.sub(E.add(Q, E.sub(SK, SQ)) if align == "end" else Q, K)
            low = E.TRUE if right is None else E.le0(E.sub(E.integer(-right), d))
            return E.and_(low, E.TRUE if left is None else E.le0(E.sub(d, E.integer(left))))
        case Range(axis, lo, hi):
            x = POSITIONS[axis]
            return E.and_(E.le0(E.sub(E.integer(lo), x)), E.le0(E.sub(x, E.integer(hi - 1))))
        case Formula(value):
            return value
        case Padding(operand, axis):
            return E.load(operand, (POSITIONS["b"], POSITIONS[axis]), "bool")
        case Dense(operand):
            return E.load(operand, tuple(POSITIONS.values()), "bool")
        case And(parts):
            return E.and_(*map(condition, parts))
        case Or(parts):
            return E.or_(*map(condition, parts))
        case Not(part):
            return E.not_(condition(part))
    raise AssertionError(f"{mask} is no mask")


def may_hide_a_whole_row(mask: Mask, sq: int | None = None, sk: int | None = None) -> bool:
    """Say whether some query may see no key at all.

    Rows are safe if one key is proved visible to each: the first key to all, the last, or, where lengths are
    known, the query's own position counted from the start or from the end.  Run-time operands may have any
    values, and unknown counts as yes.

    ``sq`` and ``sk`` are the lengths in tokens, None when symbolic.
    """
    whole = condition(mask)
    if sq is None or sk is None:
        return not _all_see(whole, E.ZERO, {"q": (0, FAR), "Sq": (1, FAR), "Sk": (1, FAR)})
    sizes = {"Sq": (sq, sq), "Sk": (sk, sk)}
    last = E.integer(sk - 1)
    paired = {"q": (0, min(sq, sk) - 1), **sizes}  # queries with a key of the same number
    beyond = sq <= sk or _all_see(whole, last, {"q": (sk, sq - 1), **sizes})
    if _all_see(whole, Q, paired) and beyond:
        return False
    keys = [E.ZERO, last, *([E.add(Q, E.integer(sk - sq))] if sk >= sq else [])]
    return not any(_all_see(whole, key, {"q": (0, sq - 1), **sizes}) for key in keys)


def _all_see(whole: Expr, key: Expr, tile: dict[str, tuple[int, int]]) -> bool:
    """Prove that every query of the tile sees the key, which may depend on the query."""
    by = {g: E.integer(tile[n][0]) for n in ("Sq", "Sk") if tile[n][0] == tile[n][1] for g in _symbol(n)}
    here = E.substitute(whole, {**by, **dict.fromkeys(_symbol("k"), key)})
    return here == E.TRUE or bool(fold(here, Intervals(tile))[1])


def _symbol(name: str) -> list[Expr]:
    g = E.only_generator(SYMBOLS[name])
    return [g] if g is not None else []
