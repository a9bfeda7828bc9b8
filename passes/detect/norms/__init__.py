"""Normalizer anchors: where a detection starts.

Each file finds one family; order matters only for reports.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from attnc.passes.detect.norms import exp_sum, logsumexp, signed, softmax
from attnc.passes.detect.norms.anchor import Anchor

Finder = Callable[[fx.Graph], list[Anchor]]

NORM_FINDERS: tuple[Finder, ...] = (softmax.find, logsumexp.find, exp_sum.find, signed.find)
