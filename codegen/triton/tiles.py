"""Turn a mask into kernel text: the predicate of one tile, and the keys that a tile of queries visits.

For the queries ``first .. last`` of a tile, ``outer`` gives key intervals beyond which the mask hides
everything, and ``inner`` intervals within which it hides nothing (``Mask.classify`` for all tiles at once).
Between them lie the tiles that need the predicate.  A span is one loop over keys, cut into masked, full and
masked parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnc import formula
from attnc.codegen.triton.formulas import Kernel
from attnc.codegen.triton.inputs import Input, find
from attnc.codegen.triton.steps import UNDERFLOW, hidden
from attnc.errors import UnsupportedError
from attnc.formula_text import short
from attnc.ir import Fill
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range, may_hide_a_whole_row

FAR = -1e9
"""A fill this low hides for good: a visible score would have to be as low to let a hidden one through."""

SHORT = 128
"""Keys: so few sinks are visited with the mask, in one loop."""
LOW = -1000.0
"""A fill this low loses against visible scores as a rule."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Keys ``k`` with ``max(0, *los) <= k < min(sk, *his)``; the bounds are kernel expressions."""

    los: tuple[str, ...] = ()
    his: tuple[str, ...] = ()

    def __and__(self, other: Interval) -> Interval:
        return Interval(_merge(self.los, other.los), _merge(self.his, other.his))


@dataclass(frozen=True, slots=True)
class Span:
    """One run over keys: those some query may see, and those (None: unknown) that every query sees."""

    outer: Interval
    inner: Interval | None


EVERYTHING = Interval()


def _merge(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a + b))


def _plus(name: str, *terms: int | str) -> str:
    number = sum(t for t in terms if isinstance(t, int))
    text = " + ".join([name, *(t for t in terms if isinstance(t, str))])
    return text if not number else f"{text} {'+' if number > 0 else '-'} {abs(number)}"


def _band(band: Band, high: str, low: str) -> Interval:
    """Return the keys between ``low``'s left edge and ``high``'s right edge."""
    shift: tuple[str, ...] = ("sk - sq",) if band.align == "end" else ()
    los = () if band.left is None else (_plus(low, *shift, -band.left),)
    his = () if band.right is None else (_plus(high, *shift, band.right + 1),)
    return Interval(los, his)


def outer(mask: Mask) -> tuple[Interval, ...]:
    """Return intervals that hold every key some query of ``first .. last`` sees."""
    match mask:
        case Band():
            return (_band(mask, "last", "first"),)
        case Range(axis="k"):
            return (_range(mask),)
        case Formula():
            return (_coarse(mask, "first", "last"),)
        case Range():
            return (Interval((), (f"tl.where((first < {mask.hi}) & (last >= {mask.lo}), sk, 0)",)),)
        case And(parts):
            return _all_meets(map(outer, parts))
        case Or(parts):
            return tuple(dict.fromkeys(x for p in parts for x in outer(p)))
        case Not(part):
            return _complement(inner(part))
        case _:
            return (EVERYTHING,)


def inner(mask: Mask) -> tuple[Interval, ...]:
    """Return intervals whose keys every query of ``first .. last`` sees; other such keys may exist."""
    match mask:
        case Full():
            return (EVERYTHING,)
        case Band():
            return (_band(mask, "first", "last"),)
        case Range(axis="k"):
            return (_range(mask),)
        case Formula():
            found = _coarse(mask, "last", "first")
            return () if found == EVERYTHING else (found,)
        case Range():
            return (Interval((), (f"tl.where((first >= {mask.lo}) & (last < {mask.hi}), sk, 0)",)),)
        case And(parts):
            return _all_meets(map(inner, parts))
        case Or(parts):
            return tuple(dict.fromkeys(x for p in parts for x in inner(p)))
        case Not(part):
            return _complement(outer(part))
        case _:
            return ()


def _coarse(mask: Formula, early: str, late: str) -> Interval:
    """Return the keys from the start of ``early``'s chunk to the end of ``late``'s, else all."""
    found = short(mask.value)
    if found is None or found[0] not in ("chunk", "blocks"):
        return EVERYTHING
    n = found[1][0]
    los = (f"{early} // {n} * {n}",) if found[0] == "chunk" else ()
    return Interval(los, (f"{late} // {n} * {n} + {n}",))


def _range(mask: Range) -> Interval:
    return Interval((str(mask.lo),) if mask.lo > 0 else (), (str(mask.hi),))


def _all_meets(choices: Iterable[Iterable[Interval]]) -> tuple[Interval, ...]:
    """Return what one of each has in common, each interval once."""
    return tuple(dict.fromkeys(_meet(x) for x in itertools.product(*choices)))


def _meet(parts: tuple[Interval, ...]) -> Interval:
    out = EVERYTHING
    for p in parts:
        out = out & p
    return out


def _complement(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Return what lies outside all of them: below a lower bound or from an upper bound on, of each."""
    sides = [[Interval((), (lo,)) for lo in x.los] + [Interval((hi,), ()) for hi in x.his] for x in intervals]
    return _all_meets(sides)


def spans(mask: Mask, fill: Fill) -> tuple[Span, ...]:
    """Return at most two runs over keys, the second to start after the first; none if nothing is seen.

    Everything is visited where a hidden key may weigh something next to a visible one.
    """
    found = outer(mask) if may_skip(fill) else (EVERYTHING,)
    full = inner(mask)
    early = tuple(x for x in found if not x.los)
    late = tuple(x for x in found if x.los)
    if not found:
        return ()
    if not (early and late) or any(not x.his for x in early):
        return (Span(_hull(found), full[0] if full else None),)
    start = _hull(early)
    short = any(h.isdigit() and int(h) <= SHORT for h in start.his)  # not worth a loop of its own
    return (
        Span(start, None if short else next((x for x in full if not x.los), None)),
        Span(_hull(late), next((x for x in full if x.los), None)),
    )


def _hull(parts: tuple[Interval, ...]) -> Interval:
    """Return one interval that holds all of them."""
    if len(parts) == 1:
        return parts[0]
    los = (
        ()
        if any(not p.los for p in parts)
        else (fold("tl.minimum", [fold("tl.maximum", p.los) for p in parts]),)
    )
    his = (
        ()
        if any(not p.his for p in parts)
        else (fold("tl.maximum", [fold("tl.minimum", p.his) for p in parts]),)
    )
    return Interval(los, his)


def fold(call: str, terms: tuple[str, ...] | list[str]) -> str:
    """Return nested two-argument calls, ``tl.minimum(a, tl.minimum(b, c))``, no deeper than they must be."""
    each = list(dict.fromkeys(terms))
    half = len(each) // 2
    return each[0] if len(each) == 1 else f"{call}({fold(call, each[:half])}, {fold(call, each[half:])})"


def may_skip(fill: Fill) -> bool:
    """Say whether a hidden key can be left out as long as its query sees another.

    A fill put in place of the score can be compared with the running maximum afterwards (``floor``), which
    pays if the fill is low enough to lose as a rule.  A fill added to a score is bounded by nothing, so it
    has to be far.
    """
    return fill.value <= (LOW if fill.how == "replace" else FAR)


def floor(mask: Mask, fill: Fill) -> float | None:
    """Return the base-2 maximum at or below which a row needs all keys, hidden ones too; None if no row can.

    Such a row saw nothing, or so little that fills weigh something beside it.
    """
    if fill.value == -float("inf") or outer(mask) == (EVERYTHING,) or not may_skip(fill):
        return None
    if not may_hide_a_whole_row(mask) and fill.value <= FAR:
        return None
    return hidden(fill) / 2 if fill.how == "add" else hidden(fill) + UNDERFLOW


Call = Callable[[bool], list[str]]
"""Given whether the tile needs the mask, the lines that add it to the running softmax."""


def loops(mask: Mask, fill: Fill, call: Call) -> list[str]:
    """Return the lines that visit the keys of a tile: bounds, then one loop for each part of each span."""
    lines: list[str] = []
    for at, span in enumerate(spans(mask, fill)):
        lines += _span_lines(span, call, tag=f"_{at}" if at else "", previous="hi" if at else None)
    return lines


def loop(begin: str, end: str, body: list[str], steps: str = "range({}, {}, BLOCK_N)") -> list[str]:
    """Return a loop over tiles of keys."""
    return [f"for n in {steps.format(begin, end)}:", *(f"    {line}" for line in body)]


def _span_lines(span: Span, call: Call, *, tag: str, previous: str | None) -> list[str]:
    lo, hi, full_lo, full_hi = (f"{name}{tag}" for name in ("lo", "hi", "full_lo", "full_hi"))
    title = f"# Some query of this tile may see the keys {lo} .. {hi}"
    lines = [f"{title}.", *_ends(span, tag=tag, previous=previous)]
    if span.inner is None:
        return [*lines, *loop(lo, hi, call(True))]
    if span.inner.los:
        lines.append(f"{full_lo} = tl.cdiv({fold('tl.maximum', span.inner.los)}, BLOCK_N) * BLOCK_N")
        lines.append(f"{full_lo} = tl.maximum(tl.minimum({full_lo}, tl.cdiv({hi}, BLOCK_N) * BLOCK_N), {lo})")
    else:
        full_lo = lo
    end = fold("tl.minimum", (*span.inner.his, hi))
    lines[0] = f"{title}; all of them see {full_lo} .. {full_hi}."
    lines.append(f"{full_hi} = tl.maximum({end} // BLOCK_N * BLOCK_N, {full_lo})")
    if span.inner.los:
        lines += loop(lo, full_lo, call(True))
    return [*lines, *loop(full_lo, full_hi, call(False)), *loop(full_hi, hi, call(True))]


def _ends(span: Span, *, tag: str, previous: str | None) -> list[str]:
    """Return the lines that set the first key of a run, where a tile begins, and its end."""
    begin = (
        f"tl.maximum({fold('tl.maximum', span.outer.los)}, 0) // BLOCK_N * BLOCK_N" if span.outer.los else "0"
    )
    if previous:
        begin = f"tl.maximum({begin}, tl.cdiv({previous}, BLOCK_N) * BLOCK_N)"
    return [f"lo{tag} = {begin}", f"hi{tag} = {fold('tl.minimum', (*span.outer.his, 'sk'))}"]


def bounds(mask: Mask, fill: Fill) -> tuple[list[str], list[str]]:
    """Return the lines that set the ends of each run over keys, and the number of tiles in each as text."""
    lines: list[str] = []
    counts: list[str] = []
    for at, span in enumerate(spans(mask, fill)):
        tag = f"_{at}" if at else ""
        lines += _ends(span, tag=tag, previous="hi" if at else None)
        counts.append(f"tl.cdiv(tl.maximum(hi{tag} - lo{tag}, 0), BLOCK_N)")
    return lines, counts


def keep(mask: Mask, inputs: tuple[Input, ...]) -> str:
    """Return the predicate of a tile; ``qi`` is a column of query indices and ``ki`` a row of key indices."""
    return _write(mask, inputs, lambda x: x.name, "tl.where")


def reference_keep(mask: Mask, inputs: tuple[Input, ...]) -> str:
    """Return the predicate in torch, over all of ``[B, H, Sq, Sk]``."""
    views = {"bk": "[:, None, None, :]", "bq": "[:, None, :, None]", "b": "[:, None, None, None]"}
    return _write(mask, inputs, lambda x: x.tensor + views.get(x.layout, ""), "torch.where")


def _write(mask: Mask, inputs: tuple[Input, ...], name: Callable[[Input], str], where: str) -> str:
    match mask:
        case Band(left, right, align):
            p = "qi + (sk - sq)" if align == "end" else "qi"
            left_edge = [] if left is None else [f"ki >= {p}{_offset(-left)}"]
            right_edge = [] if right is None else [f"ki <= {p}{_offset(right)}"]
            return _join("&", [*left_edge, *right_edge] or ["ki >= 0"])
        case Range(axis, lo, hi):
            x = f"{axis}i"
            return _join("&", [*([f"{x} >= {lo}"] if lo > 0 else []), f"{x} < {hi}"])
        case Padding(operand, axis):
            return name(find(inputs, operand, "b" + axis))
        case Dense(operand):
            return name(find(inputs, operand, "bhqk"))
        case And(parts):
            return _join("&", [_write(p, inputs, name, where) for p in parts])
        case Or(parts):
            return _join("|", [_write(p, inputs, name, where) for p in parts])
        case Not(part):
            return f"~({_write(part, inputs, name, where)})"
        case Formula(value):
            return formula.fold(value, Kernel(lambda o, axes: name(find(inputs, o, axes)), where))
        case Full():
            return "ki >= 0"
        case _:
            raise UnsupportedError(f"triton: expected a mask of known kind, found {mask}")


def _offset(n: int) -> str:
    return "" if n == 0 else f" {'+' if n > 0 else '-'} {abs(n)}"


def _join(sign: str, parts: list[str]) -> str:
    return (
        parts[0]
        if len(parts) == 1
        else f" {sign} ".join(f"({p})" if set(p) & set("<>=&|~") else p for p in parts)
    )
