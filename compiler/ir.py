"""The nouns of the compiler: what a site computes, where it was found or why not, how it will run.

An ``AttentionSpec`` describes attention over the user's graph; it is not a second graph. It runs: ``spec(q,
k, v, captured)`` is the oracle of every backend. Its text (``str(spec)``) parses back through
``attnc.printer.parse``. All tensors a spec names are in canonical layout: q ``[B, H, Sq, Dqk]``, k ``[B, Hkv,
Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``, scores ``[B, H, Sq, Sk]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from attnc.masks import FULL, Full, Grid, Mask
from attnc.norms import SOFTMAX, Elementwise, Normalized, Normalizer, RoundedSoftmax, SignedSoftmax, Softmax
from attnc.steps import HIDE, Bias, Fill, Gain, Pointwise, Scale, ScoreMod, Softcap, Step

__all__ = [
    "AttentionSpec",
    "Bias",
    "Contract",
    "Dim",
    "Elementwise",
    "Fill",
    "Gain",
    "Kernel",
    "Match",
    "Miss",
    "Normalized",
    "Normalizer",
    "Operand",
    "Plan",
    "Pointwise",
    "RoundedSoftmax",
    "Scale",
    "ScoreMod",
    "SignedSoftmax",
    "Site",
    "Softcap",
    "Softmax",
    "Step",
]

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
    fill: Fill = HIDE
    norm: Normalizer = SOFTMAX
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

    def with_head_sizes(self, dqk: int, dv: int) -> AttentionSpec:
        """Return the spec for heads of these sizes, which may be symbolic where the operands are inputs."""
        q, k = (replace(o, shape=(*o.shape[:3], dqk)) for o in (self.q, self.k))
        return replace(self, q=q, k=k, v=replace(self.v, shape=(*self.v.shape[:3], dv)))

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
