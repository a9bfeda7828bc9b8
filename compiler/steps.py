"""What is done to a score before the normalizer: score mods, and what stands at hidden positions.

Each step runs in eager torch on scores ``[B, H, Sq, Sk]`` and prints as a word that ``attnc.printer`` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from attnc import pointwise as P


class ScoreMod(Protocol):
    """One step on the scores ``[B, H, Sq, Sk]``, between the contraction and the mask."""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of captured tensors that the step reads."""
        ...

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the edited scores, same shape."""
        ...


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply every score by ``factor``."""

    factor: float

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return ``factor * scores``."""
        return scores * self.factor

    def __str__(self) -> str:
        return f"scale({self.factor!r})"


@dataclass(frozen=True, slots=True)
class Softcap:
    """Bound every score to ``(-cap, cap)`` by ``cap * tanh(scores / cap)``; ``cap`` > 0, in score units.

    Source: Gemma 2 report, section 2 (arXiv:2408.00118).
    """

    cap: float

    @property
    def operands(self) -> tuple[str, ...]:
        """None."""
        return ()

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the capped scores."""
        return self.cap * torch.tanh(scores / self.cap)

    def __str__(self) -> str:
        return f"softcap({self.cap!r})"


@dataclass(frozen=True, slots=True)
class Bias:
    """Add ``sign`` times a captured tensor that broadcasts to ``[B, H, Sq, Sk]``.

    An additive mask that has no closed form is one. ``form`` says what the tensor is, such as ``alibi`` or
    ``relative``, '' if that is not known; it changes nothing that is computed.
    """

    operand: str
    sign: Literal[1, -1] = 1
    form: str = ""

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensor added."""
        return (self.operand,)

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return ``scores + sign * bias``."""
        return scores + self.sign * captured[self.operand].to(scores.dtype)

    def __str__(self) -> str:
        return f"bias({'-' if self.sign < 0 else ''}{self.operand}{':' if self.form else ''}{self.form})"


@dataclass(frozen=True, slots=True)
class Gain:
    """Multiply by a captured tensor that broadcasts to ``[B, H, Sq, Sk]``.

    A learned temperature, per head or per query, is one.
    """

    operand: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The factor."""
        return (self.operand,)

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return ``scores * gain``."""
        return scores * captured[self.operand].to(scores.dtype)

    def __str__(self) -> str:
        return f"gain({self.operand})"


@dataclass(frozen=True, slots=True)
class Pointwise:
    """Replace every score by an elementwise expression over it, its position and captured tensors.

    ``expr`` is what ``attnc.pointwise.parse_term`` reads: ``s`` is the score, ``q``, ``k``, ``h``, ``b`` its
    position, other names are captured tensors that broadcast to ``[B, H, Sq, Sk]``.  Floats among those are
    brought to the scores' dtype.
    Source: Flex Attention (arXiv:2412.05496), section 3, ``score_mod``.
    """

    expr: str

    @property
    def term(self) -> P.Call | str | float:
        """The expression as a tree."""
        return P.parse_term(self.expr)

    @property
    def operands(self) -> tuple[str, ...]:
        """The captured tensors that the expression reads."""
        return tuple(n for n in P.names(self.term) if n not in P.RESERVED)

    def values(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what each name of the expression stands for."""
        out = {P.SCORE: scores}
        for name in P.names(self.term):
            if name in P.POSITIONS:
                axis = "bhqk".index(name)
                at = torch.arange(scores.shape[axis], device=scores.device, dtype=scores.dtype)
                out[name] = at.view(*(-1 if i == axis else 1 for i in range(4)))
            elif name != P.SCORE:
                t = captured[name]
                out[name] = t if t.dtype == torch.bool else t.to(scores.dtype)
        return out

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the expression's value, in the shape of the scores."""
        return P.evaluate(self.term, self.values(scores, captured)).expand_as(scores)

    def pull_back(
        self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor], grad: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the gradients of the score (by the name ``s``) and of the captured float tensors."""
        return P.pull_back(self.term, self.values(scores, captured), grad)

    def __str__(self) -> str:
        return f"pointwise({self.expr})"


Step = Scale | Softcap | Bias | Gain | Pointwise


@dataclass(frozen=True, slots=True)
class Fill:
    """What stands at hidden positions: ``value``, added to the score or put in its place.

    The value is -inf or a large negative score.

    It decides what a query that sees no key gets: NaN for -inf, a spread over all keys for finite values.
    """

    value: float = -math.inf
    how: Literal["add", "replace"] = "replace"

    def apply(self, scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Return the scores ``[B, H, Sq, Sk]`` with hidden positions filled."""
        value = max(self.value, torch.finfo(scores.dtype).min) if math.isfinite(self.value) else self.value
        if self.how == "replace":
            return scores.masked_fill(~keep, value)
        return scores + torch.zeros((), dtype=scores.dtype, device=scores.device).expand_as(keep).masked_fill(
            ~keep, value
        )

    def __str__(self) -> str:
        return f"fill({self.how},{self.value!r})"


HIDE = Fill()
"""Hidden scores are replaced by -inf."""
