"""Say which rows the backward of a softmax has to look at twice, by their log-sum-exp."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnc.codegen.triton import holes, tiles
from attnc.codegen.triton.inputs import Input
from attnc.codegen.triton.pointwise import number
from attnc.codegen.triton.steps import LOG2E, WEIGHED, hidden, wide_biases
from attnc.ir import AttentionSpec, Bias, Pointwise, SignedSoftmax
from attnc.masks import Full, may_hide_a_whole_row

NEAR = -32.0
"""A fill nearer to zero leaves rows of fills with a log-sum-exp like that of other rows, which fp32 holds."""


@dataclass(frozen=True, slots=True)
class Low:
    """Log-sum-exps so low that a row needs care, in base 2; None where no row can be.

    ``refine``: at or below it fp32 does not hold the log-sum-exp well enough to divide by.  ``spread``: at or
    below it a row may weigh keys that the mask hides.  A signed softmax knows magnitudes only: what is low
    to others is high to it.
    """

    refine: float | None
    spread: float | None


def low(spec: AttentionSpec, inputs: tuple[Input, ...]) -> Low:
    """Return the bounds for the rows of a spec; weights that are no exponentials have none.

    Half a finite fill is far below every score that is no fill, and far above those that are; a fill near
    zero is no case, since fp32 then holds the log-sum-exp.
    """
    if isinstance(spec.norm, WEIGHED):
        return Low(None, None)
    masked, value = not isinstance(spec.mask, Full), spec.fill.value
    signed = isinstance(spec.norm, SignedSoftmax)
    fills = masked and math.isfinite(value) and value <= NEAR
    fills = fills and (may_hide_a_whole_row(spec.mask) or value > tiles.FAR or signed)
    bounds = [hidden(spec.fill) / 2] if fills else []
    skips = masked and tiles.may_skip(holes.visited(spec))
    spread = bounds[0] if fills and skips else None
    unsure = may_hide_a_whole_row(spec.mask) or any(isinstance(s, Bias | Pointwise) for s in spec.scores)
    if skips and value == -math.inf and unsure and not spec.norm.safe and spec.norm.sink is None:
        spread = -math.inf  # NaN everywhere, as in eager torch
    if wide_biases(spec, inputs) or any(isinstance(s, Bias) for s in spec.scores):
        bounds.append(tiles.LOW * LOG2E)
    return Low(max(bounds, default=None), spread)


def spread_test(low: Low) -> dict[str, str] | None:
    """Return how rows are told that weigh hidden keys: see ``shares.spread``."""
    if low.spread is None:
        return None
    bound = number(low.spread)
    return {
        **{"of": "top", "far": "lowest", "fold": "tl.minimum", "start": 'float("inf")'},
        **{"here": f"tl.min(top, 0) <= {bound}", "anywhere": f"tl.min(lowest, 0) <= {bound}"},
    }
