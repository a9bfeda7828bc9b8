"""Put a rotation into words: which features pair up, how many turn, and by how many position axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.analyze.operands.rotation import Pair, Rotation
from attnc.passes.analyze.operands.slots import slots, varying

_KINDS = {1: "rope", 2: "rope-2d"}


def wording(r: Rotation) -> str:
    """Return ``rope(half)``, ``rope(interleaved, 64 of 128)``, ``m-rope(half, sections 16+24+24)``."""
    sections = position_axes(r.pairs)
    turning = 2 * len(r.pairs)
    words = [layout(r.pairs)]
    if turning < r.size:
        words.append(f"{turning} of {r.size}")
    if len(sections) > 1:
        words.append(f"sections {'+'.join(map(str, sections))}")
    if r.given:
        words.append("unchecked tables")
    return f"{_KINDS.get(len(sections), 'm-rope')}({', '.join(words)})"


def layout(pairs: Sequence[Pair]) -> str:
    """Name which features pair up, in the tensor that is rotated: half, half in n blocks, interleaved."""
    places = _channels(pairs) or [p.features for p in pairs]
    gaps = {abs(a - b) for a, b in places}
    if len(gaps) != 1:
        return "pairs"
    gap, n = gaps.pop(), len(pairs)
    if gap == n:
        return "half"
    if gap == 1:
        return "interleaved"
    return f"half in {n // gap} blocks" if n % gap == 0 else "pairs"


def _channels(pairs: Sequence[Pair]) -> list[tuple[int, int]] | None:
    """Return each pair's places along the one index that tells the sources apart, None if several do."""
    read = [slots(source) for p in pairs for source in p.sources]
    if len({shape for shape, _ in read}) != 1:
        return None
    rows = [numbers for _, numbers in read]
    columns = varying(rows)
    if len(columns) != 1:
        return None
    at = [int(row[columns[0]]) for row in rows]
    return list(zip(at[::2], at[1::2], strict=True))


def position_axes(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return how many pairs turn by each position axis, in order of the features.

    Angles of one axis differ in their frequency only, which is the constant that takes the most values; what
    else differs (another tensor of positions, another row of it) is another axis.
    """
    keys = _axes([p.angle for p in pairs])
    counts = Counter(keys)
    if min(counts.values()) < 2:
        return (len(pairs),)
    return tuple(counts[k] for k in dict.fromkeys(keys))


def _axes(angles: Sequence[tuple[Expr, ...]]) -> list[tuple[str, tuple[float, ...]]]:
    read = [slots(tuple(map(_scaled, a))) for a in angles]
    by_shape: dict[str, list[tuple[float, ...]]] = {}
    for shape, numbers in read:
        by_shape.setdefault(shape, []).append(numbers)
    telling = {shape: _telling(rows) for shape, rows in by_shape.items()}
    return [(shape, tuple(numbers[i] for i in telling[shape])) for shape, numbers in read]


def _scaled(e: Expr) -> Expr:
    """Return an angle as position times frequency, also where that is the number 1 and was left out."""
    if e.op != "call" or e.args[0] != "mul":
        return E.call("mul", e, E.real(1.0))
    a, b = e.args[1]
    return E.call("mul", b, a) if a.op == "const" else e


def _telling(rows: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the slots that tell axes apart: those that take fewer values than the frequency's."""
    values = {i: len({row[i] for row in rows}) for i in varying(rows)}
    most = max(values.values(), default=0)
    return [i for i, n in values.items() if n < most]
