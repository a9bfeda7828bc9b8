"""What a site costs at the example's sizes.

FLOPs, bytes, and the gain that the cost model predicts for a rewrite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import sympy
import torch
from torch import fx

from attnc import cost
from attnc.formula import fold
from attnc.intervals import Intervals
from attnc.ir import AttentionSpec, Bias, Dim
from attnc.masks import Dense, Full, Mask, condition

TILE = 64
"""Tokens per side of the tiles that are classed to estimate how much of a mask is alive."""


def hints(graph: fx.Graph) -> dict[str, int]:
    """Return the example's value of every symbolic size that the graph's inputs have."""
    out: dict[str, int] = {}
    for node in graph.nodes:
        val = node.meta.get("val")
        if node.op != "placeholder":
            break
        sizes = val.shape if isinstance(val, torch.Tensor) else (val,)
        for n in sizes:
            if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol and n.node.hint is not None:
                out[str(n.node.expr)] = int(n.node.hint)
    return out


@dataclass(frozen=True, slots=True)
class Sizes:
    """A site's sizes at the example: batch, query heads, key heads, queries, keys, feature sizes."""

    b: int
    h: int
    hk: int
    sq: int
    sk: int
    dqk: int
    dv: int


def sizes(spec: AttentionSpec, known: Mapping[str, int]) -> Sizes:
    """Return the sizes of ``spec`` with symbols replaced by the example's values.

    (an unknown symbol counts as 1).
    """
    q, k, v = (
        tuple(_value(n, tuple(sorted(known.items()))) for n in o.shape) for o in (spec.q, spec.k, spec.v)
    )
    return Sizes(q[0], q[1], k[1], q[2], k[2], q[3], v[3])


def head_sizes(spec: AttentionSpec, known: Mapping[str, int]) -> tuple[int, int] | None:
    """Return the example's head sizes of keys and values where one is symbolic; None if both are fixed.

    None as well where the example does not say.
    """
    free = tuple(sorted(known.items()))
    dqk, dv = (_number(o.shape[3], free) for o in (spec.q, spec.v))
    fixed = all(isinstance(o.shape[3], int) for o in (spec.q, spec.v))
    return None if fixed or dqk is None or dv is None else (dqk, dv)


def _value(n: Dim, known: tuple[tuple[str, int], ...]) -> int:
    number = _number(n, known)
    return 1 if number is None else max(1, number)


@lru_cache(maxsize=4096)
def _number(n: Dim, known: tuple[tuple[str, int], ...]) -> int | None:
    """Return a size at the example, None if it depends on more than what is known."""
    if isinstance(n, int):
        return n
    free = dict(known)
    e = sympy.sympify(n.replace("//", "/"), locals={s: sympy.Symbol(s) for s in free})
    value = e.subs({sympy.Symbol(s): x for s, x in free.items()})
    return int(value) if value.is_number else None


def live(mask: Mask, sq: int, sk: int) -> float:
    """Return the share of score tiles that hold a visible pair; run-time data counts as visible."""
    rows, cols = (range(0, n, TILE) for n in (sq, sk))
    if isinstance(mask, Full) or len(rows) * len(cols) > 1 << 16:
        return 1.0
    first_q, first_k = torch.arange(0, sq, TILE)[:, None], torch.arange(0, sk, TILE)[None, :]
    tile = {
        "q": (first_q, (first_q + TILE - 1).clamp(max=sq - 1)),
        "k": (first_k, (first_k + TILE - 1).clamp(max=sk - 1)),
    }
    may, _ = fold(condition(mask), Intervals({**tile, "Sq": (sq, sq), "Sk": (sk, sk)}))
    return float(torch.as_tensor(may).expand(len(rows), len(cols)).float().mean())


def price(spec: AttentionSpec, known: Mapping[str, int], fused: bool) -> cost.Cost:
    """Count one forward pass of the site at the example's sizes."""
    s = sizes(spec, known)
    masked = bool(spec.mask.operands) or any(isinstance(x, Bias) for x in spec.scores)
    return cost.site_cost(
        **asdict(s),
        dtype=spec.q.dtype,
        fused=fused,
        machine=cost.H200,
        live=live(spec.mask, s.sq, s.sk),
        masked=masked,
    )


def gain(found: AttentionSpec, new: AttentionSpec, known: Mapping[str, int], target: str) -> float | None:
    """Predict the model's own time over the rewritten site's; None for dtypes that are not measured."""
    if new.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    s = sizes(found, known)
    masked = any(isinstance(x, Bias) for x in new.scores) or isinstance(new.mask, Dense)
    share = live(new.mask, s.sq, s.sk) / live(found.mask, s.sq, s.sk) if new.mask != found.mask else 1.0
    return cost.predict_gain(
        new.q.dtype,
        b=s.b,
        h=s.h,
        sq=s.sq,
        sk=s.sk,
        masked=masked,
        live=min(1.0, share),
        target=target.partition(":")[0],
    )
