"""The nouns of the compiler: what a site computes, where it was found or why not, how it will run.

An ``AttentionSpec`` describes attention over the user's graph; it is not a second graph. It runs: ``spec(q,
k, v, captured)`` is the oracle of every backend. Its text (``str(spec)``) parses back through
``attnc.printer.parse``. All tensors a spec names are in canonical layout: q ``[B, H, Sq, Dqk]``, k ``[B, Hkv,
Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``, scores ``[B, H, Sq, Sk]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from attnc.masks import FULL, Full, Grid, Mask

Dim = int | str
"""A size: a number, or the name of a symbolic size such as ``s77``."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a spec reads.

    ``axes`` names its axes in canonical order, ``shape`` has one size per axis.

    q is ``bhqd``, k ``bhkd``, v ``bhke``; a validity row is ``bk``; biases and dense masks are ``bhqk``;
    sinks are ``h``.
    """

    name: str
    axes: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        dims, dtype = ",".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return f"{self.name}={self.axes}[{dims}]:{dtype}"


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

    An additive mask that has no closed form is one.
    """

    operand: str
    sign: Literal[1, -1] = 1

    @property
    def operands(self) -> tuple[str, ...]:
        """The tensor added."""
        return (self.operand,)

    def apply(self, scores: torch.Tensor, captured: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return ``scores + sign * bias``."""
        return scores + self.sign * captured[self.operand].to(scores.dtype)

    def __str__(self) -> str:
        return f"bias({'-' if self.sign < 0 else ''}{self.operand})"


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


Step = Scale | Softcap | Bias | Gain
EmptyRow = Literal["nan", "uniform", "zero"]


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


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """WHAT is computed. Says nothing about how it was spelled or how it will run.

    ``group_size`` is the number of query heads per key/value head. ``captured`` lists the run-time tensors
    that scores, mask and normalizer read, in the order in which a call passes them.
    """

    q: Operand
    k: Operand
    v: Operand
    group_size: int
    scores: tuple[Step, ...] = ()
    mask: Mask = FULL
    fill: Fill = Fill()
    norm: Normalizer = Softmax()
    captured: tuple[Operand, ...] = ()
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """The product of the scale steps that come before any other step."""
        out = 1.0
        for step in self.scores:
            if not isinstance(step, Scale):
                break
            out *= step.factor
        return out

    def lengths(self) -> tuple[int | None, int | None]:
        """Return (Sq, Sk) in tokens, None where symbolic."""
        sq, sk = self.q.shape[2], self.k.shape[2]
        return (sq if isinstance(sq, int) else None), (sk if isinstance(sk, int) else None)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: tuple[torch.Tensor, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the spec: q ``[B, H, Sq, Dqk]``, k ``[B, Hkv, Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``.

        All sizes may differ from the traced ones.

        Returns the output ``[B, H, Sq, Dv]`` in q's dtype and the log-sum-exp ``[B, H, Sq]`` (natural log;
        fp32, or fp64 for fp64 inputs).

        Raises:
            ValueError: the number of captured tensors is not the spec's.
        """
        if len(captured) != len(self.captured):
            raise ValueError(f"{self}: expected {len(self.captured)} captured tensors, found {len(captured)}")
        named = {o.name: t for o, t in zip(self.captured, captured, strict=True)}
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        g = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(g, 1) if g > 1 else x for x in (k, v))
        s = q.to(work) @ k.to(work).transpose(-2, -1)
        for step in self.scores:
            s = step.apply(s, named)
        if not isinstance(self.mask, Full):
            s = self.fill.apply(
                s, self.mask.keep(Grid(q.shape[2], k.shape[2], q.device, named, *q.shape[:2]))
            )
        weights, lse = self.norm.apply(s, named)
        if self.dropout:
            weights = torch.dropout(weights, self.dropout, True)
        return (weights @ v.to(work)).to(q.dtype), lse

    def __str__(self) -> str:
        parts = [
            "attn",
            str(self.q),
            str(self.k),
            str(self.v),
            f"group={self.group_size}",
            *map(str, self.scores),
        ]
        parts.append(f"mask={self.mask}")
        if not isinstance(self.mask, Full):
            parts.append(str(self.fill))
        parts.append(str(self.norm))
        if self.dropout:
            parts.append(f"dropout({self.dropout!r})")
        return " ".join([*parts, *(f"with {o}" for o in self.captured)])


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the user's program: a stable id, the module's path, its class and source line."""

    id: str
    module: str
    source: str


@dataclass(frozen=True, slots=True)
class Match:
    """WHERE a spec was found. ``region`` may be erased once ``output`` is replaced.

    Nodes are named, in the working copy.
    """

    spec: AttentionSpec
    site: Site
    region: frozenset[str]
    output: str
    trail: tuple[str, ...] = ()
    escapes: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Miss:
    """WHY a likely region was left alone.

    ``code`` is stable and kebab-case (``attnc.codes`` says what helps), ``node`` the blocking node in the
    working copy, ``why`` a sentence a user can act on. ``causes`` are the misses of others, such as kernels,
    that led to this one.
    """

    code: str
    node: str
    why: str
    causes: tuple[Miss, ...] = ()


Contract = Literal["SAME", "BOUNDED"]


@dataclass(frozen=True, slots=True)
class Plan:
    """HOW one match will run."""

    match: Match
    form: str
    backend: str
    contract: Contract
    spec: AttentionSpec
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An emitted artefact.

    ``source`` is complete and runs on its own; ``key`` digests spec, form, parameters, versions.
    """

    name: str
    source: str
    key: str
