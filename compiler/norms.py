"""From scores ``[B, H, Sq, Sk]`` to weights: softmax with its variants, and unnormalized weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnc import pointwise as P


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


@dataclass(frozen=True, slots=True)
class SignedSoftmax:
    """Normalize magnitudes over the keys and keep signs, ``sign(s) * softmax(|s|)``.

    A score of -inf is hidden: its weight is zero and it adds nothing to the sum.
    Source: Cog Attention (arXiv:2411.07176), section 3.
    """

    sink: ClassVar[None] = None
    safe: ClassVar[bool] = False

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    def apply(
        self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights ``[B, H, Sq, Sk]`` and the log-sum-exp of the magnitudes ``[B, H, Sq]``."""
        size = self._magnitudes(scores)
        return scores.sign() * torch.softmax(size, -1), torch.logsumexp(size, -1)

    def pull_back(
        self, scores: torch.Tensor, grad: torch.Tensor, lse_grad: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient of the scores from those of the weights and of the log-sum-exp."""
        sign, p = scores.sign(), torch.softmax(self._magnitudes(scores), -1)
        inner = sign * grad
        row = -(p * inner).sum(-1) if lse_grad is None else lse_grad - (p * inner).sum(-1)
        return sign * p * (inner + row[..., None])

    @staticmethod
    def _magnitudes(scores: torch.Tensor) -> torch.Tensor:
        return scores.abs().masked_fill(scores == -math.inf, -math.inf)

    def __str__(self) -> str:
        return "signed-softmax"


@dataclass(frozen=True, slots=True)
class RoundedSoftmax:
    """Weigh by ``exp(s - logsumexp(s))`` as it is computed, the log-sum-exp rounded to the scores' dtype.

    It is the softmax but for rows of huge scores: where ``m + log(n)`` rounds to ``m``, as for n keys that a
    large finite fill hides, every weight is 1 and not 1/n.
    """

    sink: ClassVar[None] = None
    safe: ClassVar[bool] = False

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    def apply(
        self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights ``[B, H, Sq, Sk]`` and the log-sum-exp ``[B, H, Sq]``."""
        lse = torch.logsumexp(scores, -1)
        return torch.exp(scores - lse[..., None]), lse

    def pull_back(
        self, scores: torch.Tensor, grad: torch.Tensor, lse_grad: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient of the scores from those of the weights and of the log-sum-exp."""
        w, _ = self.apply(scores, {})
        row = -(w * grad).sum(-1) if lse_grad is None else lse_grad - (w * grad).sum(-1)
        return w * (grad + row[..., None])

    def __str__(self) -> str:
        return "rounded-softmax"


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Weigh every value by a function of its own score; nothing is normalized.

    ``expr`` is an expression of ``s`` (see ``attnc.pointwise``): ``sigmoid(s)``, ``(square(relu(s))/128.0)``.
    Source: Sigmoid self-attention (arXiv:2409.04431), section 3; Replacing softmax with ReLU
    (arXiv:2309.08586).
    """

    expr: str
    sink: ClassVar[None] = None
    safe: ClassVar[bool] = False

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def hides(self) -> bool:
        """Whether a score of -inf gets a weight of zero."""
        return self.weight(-math.inf) == 0.0

    def weight(self, score: float) -> float:
        """Return the weight of one score."""
        s = torch.tensor(score, dtype=torch.float64)
        return float(P.evaluate(P.parse_term(self.expr), {P.SCORE: s}))

    def apply(
        self,
        scores: torch.Tensor,
        captured: Mapping[str, torch.Tensor],
        listed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights ``[B, H, Sq, Sk]`` and zeros ``[B, H, Sq]``: no row is divided by its sum.

        ``listed``, bool, broadcasts to the scores: weights are zero where it is False.
        """
        weights = P.evaluate(P.parse_term(self.expr), {P.SCORE: scores})
        weights = weights if listed is None else weights.masked_fill(~listed, 0.0)
        return weights, scores.new_zeros(scores.shape[:-1])

    def pull_back(
        self, scores: torch.Tensor, grad: torch.Tensor, lse_grad: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient of the scores from that of the weights."""
        return P.pull_back(P.parse_term(self.expr), {P.SCORE: scores}, grad)[P.SCORE]

    def __str__(self) -> str:
        return f"elementwise({self.expr})"


@dataclass(frozen=True, slots=True)
class Normalized:
    """Weigh by a function of each score, divided by the row's sum, ``f(s) / max(sum f(s) + added, least)``.

    ``expr`` is an expression of ``s`` as in ``Elementwise``; that of the Taylor softmax is ``1 + s + s^2/2``.
    Nothing is exponentiated, so the logarithm of the row's divisor takes the log-sum-exp's place.
    Source: Softmax alternatives of the spherical loss family (arXiv:1511.05042), section 3.
    """

    expr: str
    added: float = 0.0
    least: float = -math.inf
    sink: ClassVar[None] = None
    safe: ClassVar[bool] = False

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def hides(self) -> bool:
        """Whether a score of -inf gets a weight of zero."""
        return self.weight(-math.inf) == 0.0

    def weight(self, score: float) -> float:
        """Return the weight of one score before the division."""
        return Elementwise(self.expr).weight(score)

    def apply(
        self,
        scores: torch.Tensor,
        captured: Mapping[str, torch.Tensor],
        listed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights ``[B, H, Sq, Sk]`` and the logarithm of each row's divisor ``[B, H, Sq]``.

        ``listed`` as in ``Elementwise``; what it leaves out is not in the sum.
        """
        f, total = self._parts(scores, listed)
        return f / total, total[..., 0].log()

    def pull_back(
        self, scores: torch.Tensor, grad: torch.Tensor, lse_grad: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient of the scores from those of the weights and of the divisor's logarithm."""
        f, total = self._parts(scores)
        row = -(f / total * grad).sum(-1, keepdim=True)
        row = row if lse_grad is None else row + lse_grad[..., None]
        row = torch.where(f.sum(-1, keepdim=True) + self.added < self.least, 0.0, row)
        return Elementwise(self.expr).pull_back(scores, (grad + row) / total, None)

    def _parts(
        self, scores: torch.Tensor, listed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values of the function and each row's divisor ``[B, H, Sq, 1]``."""
        f, _ = Elementwise(self.expr).apply(scores, {}, listed)
        return f, (f.sum(-1, keepdim=True) + self.added).clamp(min=self.least)

    def __str__(self) -> str:
        added = f",added={self.added!r}" if self.added else ""
        least = f",least={self.least!r}" if self.least != -math.inf else ""
        return f"normalized({self.expr}{added}{least})"


Normalizer = Softmax | SignedSoftmax | RoundedSoftmax | Elementwise | Normalized
SOFTMAX = Softmax()
"""Plain softmax."""
