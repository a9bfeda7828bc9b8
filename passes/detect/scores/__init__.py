"""Score peelers: one file per step between the contraction and the normalizer, tried in this order."""

from __future__ import annotations

from collections.abc import Callable

from attnc.ir import Miss
from attnc.passes.detect.env import Env, Peeled
from attnc.passes.detect.scores import additive, fill, pointwise, scale, softcap, views
from attnc.passes.detect.views import At

Peeler = Callable[[At, Env], Peeled | Miss | None]

SCORE_PEELERS: tuple[Peeler, ...] = (
    views.peel,
    softcap.peel,
    scale.peel,
    additive.peel,
    fill.peel,
    pointwise.peel,
)
