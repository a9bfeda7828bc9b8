"""From scores ``[B, H, Sq, Sk]`` to weights: softmax with its variants, and unnormalized weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Softmax:
    """Normalize over the keys, ``exp(s) / (sum exp(s) + exp(sink))``.

    ``sink`` names a captured tensor ``[H]`` of logits that enter the denominator only, or is a number (0.0 is
    softmax-plus-one), or None. ``upcast`` says that the model computes scores-to-weights in fp32 whatever its
    dtype. ``safe`` gives rows that see no key zeros in place of NaN.
    """

    sink: str | float | None = None
    upcast: bool = False
    safe: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        """The sink tensor, if it is one."""
        return (self.sink,) if isinstance(self.sink, str) else ()

    def apply(
        self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights ``[B, H, Sq, Sk]`` and each row's log-sum-exp ``[B, H, Sq]``.

        Both are in the scores' dtype.
        """
        lse = torch.logsumexp(scores, -1)
        if self.sink is not None:
            if isinstance(self.sink, str):
                sink = captured[self.sink].to(scores.dtype).view(1, -1, 1)
            else:
                sink = torch.full((1, 1, 1), self.sink, dtype=scores.dtype, device=scores.device)
            lse = torch.logaddexp(lse, sink.expand_as(lse))
            return torch.exp(scores - lse[..., None]), lse
        weights = torch.softmax(scores, -1)
        if self.safe:
            weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
        return weights, lse

    def __str__(self) -> str:
        sink = (
            ()
            if self.sink is None
            else (f"sink={self.sink!r}" if isinstance(self.sink, float) else f"sink={self.sink}",)
        )
        words = (*sink, *(("upcast",) if self.upcast else ()), *(("safe",) if self.safe else ()))
        return f"softmax({','.join(words)})" if words else "softmax"


Normalizer = Softmax
SOFTMAX = Softmax()
"""Plain softmax."""
