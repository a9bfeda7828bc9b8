"""Turn a mask into kernel text: the predicate of one tile, and the keys that a tile of queries visits.

For the queries ``first .. last`` of a tile, ``outer`` gives key intervals beyond which the mask hides
everything, and ``inner`` intervals within which it hides nothing (``Mask.classify`` for all tiles at once).
Between them lie the tiles that need the predicate.  A span is one loop over keys, cut into masked, full and
masked parts.

The backward pass also asks the other way about: which queries see a tile of keys.  A ``View`` says which is
asked; in the comments below, tiles are of queries and loops run over keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from attnc import formula
from attnc.codegen.triton.formulas import Kernel
from attnc.codegen.triton.inputs import Input, find
from attnc.codegen.triton.reach import BOUNDS, Reach, reach
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


@dataclass(frozen=True, slots=True)
class View:
    """Which axis is looked along, and the kernel's names.

    ``first`` and ``last`` are the ends of the given tile; ``axis`` is that of the loop, ``at`` the loop's
    variable, ``step`` its tile, ``size`` its length, and ``shift`` what the alignment at the end adds.
    ``whole`` is a condition on the given tile without which its loop needs the mask, '' for none, and
    ``runs_over`` says that a tile past the end of the loop needs none.  ``reach`` bounds what a tile sees by
    ids; without it they are only compared pair by pair.
    """

    axis: Literal["q", "k"]
    first: str
    last: str
    at: str
    step: str
    size: str
    shift: str
    title: str
    whole: str = ""
    runs_over: bool = False
    reach: Reach | None = None


KEYS = View(
    axis="k",
    first="first",
    last="last",
    at="n",
    step="BLOCK_N",
    size="sk",
    shift="sk - sq",
    title="# Some query of this tile may see the keys {lo} .. {hi}{full}.|; all of them see {lo} .. {hi}",
)
"""Keys that the queries ``first .. last`` see; a row past the end reads nothing and is never stored."""
QUERIES = View(
    axis="q",
    first="n",
    last="n_last",
    at="first",
    step="BLOCK_M",
    size="sq",
    shift="sq - sk",
    title="# The queries {lo} .. {hi} may see some key of this tile{full}.|; {lo} .. {hi} see all of them",
    whole="n + BLOCK_N <= sk",
    runs_over=True,
)
"""Queries that see some key of ``n .. n_last``; those past the end are zeros, which weigh nothing."""


def bounded(mask: Mask, view: View = KEYS, name: str = "reach") -> View:
    """Return the view with bounds by the ids that the mask compares, given as ``name``, if there are any."""
    return replace(view, reach=reach(mask, name))


def _merge(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a + b))


def _plus(name: str, *terms: int | str) -> str:
    number = sum(t for t in terms if isinstance(t, int))
    text = " + ".join([name, *(t for t in terms if isinstance(t, str))])
    return text if not number else f"{text} {'+' if number > 0 else '-'} {abs(number)}"


def _band(band: Band, high: str, low: str, view: View) -> Interval:
    """Return the keys between ``low``'s left edge and ``high``'s right edge."""
    left, right = (band.left, band.right) if view.axis == "k" else (band.right, band.left)
    shift: tuple[str, ...] = (view.shift,) if band.align == "end" else ()
    los = () if left is None else (_plus(low, *shift, -left),)
    his = () if right is None else (_plus(high, *shift, right + 1),)
    return Interval(los, his)


def outer(mask: Mask, view: View = KEYS) -> tuple[Interval, ...]:
    """Return intervals that hold every key some query of ``first .. last`` sees."""
    first, last = view.first, view.last
    match mask:
        case Band():
            return (_band(mask, last, first, view),)
        case Range(axis) if axis == view.axis:
            return (_range(mask),)
        case Formula() if view.reach and mask == view.reach.ids:
            return (Interval(BOUNDS[:1], BOUNDS[1:2]),)
        case Formula():
            return (_coarse(mask, first, last, view),)
        case Range(_, lo, hi):
            return (Interval((), (f"tl.where(({first} < {hi}) & ({last} >= {lo}), {view.size}, 0)",)),)
        case And(parts):
            return _all_meets(outer(p, view) for p in parts)
        case Or(parts):
            return tuple(dict.fromkeys(x for p in parts for x in outer(p, view)))
        case Not(part):
            return _complement(inner(part, view))
        case _:
            return (EVERYTHING,)


def inner(mask: Mask, view: View = KEYS) -> tuple[Interval, ...]:
    """Return intervals whose keys every query of ``first .. last`` sees; other such keys may exist."""
    first, last = view.first, view.last
    match mask:
        case Full():
            return (EVERYTHING,)
        case Band():
            return (_band(mask, first, last, view),)
        case Range(axis) if axis == view.axis:
            return (_range(mask),)
        case Formula() if view.reach and mask == view.reach.ids:
            return (Interval(BOUNDS[2:3], BOUNDS[3:]),)
        case Formula():
            found = _coarse(mask, last, first, view)
            return () if found == EVERYTHING else (found,)
        case Range(_, lo, hi):
            return (Interval((), (f"tl.where(({first} >= {lo}) & ({last} < {hi}), {view.size}, 0)",)),)
        case And(parts):
            return _all_meets(inner(p, view) for p in parts)
        case Or(parts):
            return tuple(dict.fromkeys(x for p in parts for x in inner(p, view)))
        case Not(part):
            return _complement(outer(part, view))
        case _:
            return ()


def grows(mask: Mask, view: View = KEYS) -> bool:
    """Say whether later queries see more keys."""
    found = outer(mask, view)
    return any(x.his for x in found) and not any(x.los for x in found)


def _coarse(mask: Formula, early: str, late: str, view: View) -> Interval:
    """Return the keys from the start of ``early``'s chunk to the end of ``late``'s, else all.

    A block looks back at all blocks before it, so that queries which see a key begin with its block.
    """
    found = short(mask.value)
    if found is None or found[0] not in ("chunk", "blocks"):
        return EVERYTHING
    n = found[1][0]
    start, end = f"{early} // {n} * {n}", f"{late} // {n} * {n} + {n}"
    if found[0] == "chunk":
        return Interval((start,), (end,))
    return Interval((), (end,)) if view.axis == "k" else Interval((start,), ())


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


def spans(mask: Mask, fill: Fill, view: View = KEYS) -> tuple[Span, ...]:
    """Return at most two runs over keys, the second to start after the first; none if nothing is seen.

    Everything is visited where a hidden key may weigh something next to a visible one.
    """
    found = outer(mask, view) if may_skip(fill) else (EVERYTHING,)
    full = inner(mask, view)
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


def floor(mask: Mask, fill: Fill, view: View = KEYS) -> float | None:
    """Return the base-2 maximum at or below which a row needs all keys, hidden ones too; None if no row can.

    Such a row saw nothing, or so little that fills weigh something beside it.
    """
    if fill.value == -float("inf") or outer(mask, view) == (EVERYTHING,) or not may_skip(fill):
        return None
    if not may_hide_a_whole_row(mask) and fill.value <= FAR:
        return None
    return hidden(fill) / 2 if fill.how == "add" else hidden(fill) + UNDERFLOW


Call = Callable[[bool], list[str]]
"""Given whether the tile needs the mask, the lines that add it to the running softmax."""
Stretch = tuple[str, str, bool]
"""Where a loop begins and ends, and whether its tiles need the mask."""


def loops(mask: Mask, fill: Fill, call: Call, view: View = KEYS) -> list[str]:
    """Return the lines that visit the keys of a tile: bounds, then one loop for each part of each span."""
    lines: list[str] = []
    for bounds, stretches in stretched(mask, fill, view):
        lines += bounds
        for begin, end, masked in stretches:
            lines += loop(begin, end, call(masked), view=view)
    return lines


def loop(
    begin: str, end: str, body: list[str], steps: str = "range({}, {}, {})", view: View = KEYS
) -> list[str]:
    """Return a loop over tiles of keys."""
    return [f"for {view.at} in {steps.format(begin, end, view.step)}:", *(f"    {line}" for line in body)]


def stretched(mask: Mask, fill: Fill, view: View = KEYS) -> list[tuple[list[str], list[Stretch]]]:
    """Return for each span the lines that name its bounds, and the parts of it: one loop each."""
    parts = [
        _parts(span, view, tag=f"_{at}" if at else "", previous="hi" if at else None)
        for at, span in enumerate(spans(mask, fill, view))
    ]
    if view.reach and parts:
        parts[0] = (view.reach.lines() + parts[0][0], parts[0][1])
    return parts


def missed(mask: Mask, fill: Fill, view: View = KEYS) -> str:
    """Return the condition on the loop's variable under which ``loops`` does not visit its tile."""
    count = len(spans(mask, fill, view))
    ends = ((f"lo{tag}", f"hi{tag}") for tag in ("", "_1")[:count])
    return " & ".join(f"(({view.at} < {lo}) | ({view.at} >= {hi}))" for lo, hi in ends)


def _ends(span: Span, view: View, *, tag: str, previous: str | None) -> list[str]:
    """Return the lines that set where a run begins, at the start of a tile, and where it ends."""
    los, step = span.outer.los, view.step
    begin = f"tl.maximum({fold('tl.maximum', los)}, 0) // {step} * {step}" if los else "0"
    if previous:
        begin = f"tl.maximum({begin}, tl.cdiv({previous}, {step}) * {step})"
    return [f"lo{tag} = {begin}", f"hi{tag} = {fold('tl.minimum', (*span.outer.his, view.size))}"]


def _parts(span: Span, view: View, *, tag: str, previous: str | None) -> tuple[list[str], list[Stretch]]:
    lo, hi, full_lo, full_hi = (f"{name}{tag}" for name in ("lo", "hi", "full_lo", "full_hi"))
    step, (title, middle) = view.step, view.title.split("|")
    lines = _ends(span, view, tag=tag, previous=previous)
    if span.inner is None:
        return [title.format(lo=lo, hi=hi, full=""), *lines], [(lo, hi, True)]
    start = lo
    if span.inner.los:
        lines.append(f"{full_lo} = tl.cdiv({fold('tl.maximum', span.inner.los)}, {step}) * {step}")
        lines.append(f"{full_lo} = tl.maximum(tl.minimum({full_lo}, tl.cdiv({hi}, {step}) * {step}), {lo})")
        start = full_lo
    if view.whole:
        lines.append(f"{full_lo} = tl.where({view.whole}, {start}, tl.cdiv({hi}, {step}) * {step})")
        start = full_lo
    stretches = [(lo, start, True)] if start != lo else []
    if view.runs_over and not span.inner.his:
        stretches.append((start, hi, False))
        full = middle.format(lo=start, hi=hi)
        return [title.format(lo=lo, hi=hi, full=full), *lines], stretches
    end = fold("tl.minimum", (*span.inner.his, hi))
    lines.append(f"{full_hi} = tl.maximum({end} // {step} * {step}, {start})")
    stretches += [(start, full_hi, False), (full_hi, hi, True)]
    full = middle.format(lo=start, hi=full_hi)
    return [title.format(lo=lo, hi=hi, full=full), *lines], stretches


def shares(mask: Mask, fill: Fill) -> tuple[list[str], list[str]]:
    """Return the lines that set the ends of each run over keys, and the number of tiles in each as text."""
    lines: list[str] = []
    counts: list[str] = []
    for at, span in enumerate(spans(mask, fill)):
        tag = f"_{at}" if at else ""
        lines += _ends(span, KEYS, tag=tag, previous="hi" if at else None)
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
