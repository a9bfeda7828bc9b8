"""The SAME rule on one set of values: run the original, the oracle and the rewritten region, and compare.

See ``attnc.verify`` for the rule and its reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnc import logs
from attnc.region import Region, widen
from attnc.rounding import Rounding

log = logs.get("verify")

FACTOR = 2.0
"""How many times the original's own error a rewritten site may have."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One variant's outcome; ``gradients`` is the ratio of error to tolerance, None where not asked for."""

    variant: str
    ok: bool
    error: float = math.inf
    tolerance: float = 0.0
    reason: str = ""
    gradients: float | None = None

    @property
    def ratio(self) -> float:
        """How much of the tolerance is used, by outputs or gradients."""
        return max(_ratio(self.error, self.tolerance), self.gradients or 0.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """The two regions of one site, and one set of values, of the boundary and of what else each reads.

    ``wrt`` names the inputs whose gradients are compared, ``masks`` those that hold no rounding errors.  With
    ``judged`` False the error is measured and no tolerance asked for.
    """

    variant: str
    old: Region
    new: Region
    values: Mapping[str, Any]
    needs: tuple[Mapping[str, Any], Mapping[str, Any]]
    wrt: tuple[str, ...]
    masks: frozenset[str]
    seed: int
    judged: bool = True

    def verdict(self, *, base: bool, overflow_counts: bool = True) -> Verdict | None:
        """Return the outcome, or None where the original gives nothing to compare with.

        ``base`` says that the original must run on these values; without ``overflow_counts``, values on which
        the original is not finite where fp64 is are passed over.
        """
        try:
            before = _evaluate(self.old, {**self.needs[0], **self.values}, self.wrt)
        except Exception as error:  # a region holds the user's code, which may raise anything
            log.info("%s: the original raises on %s: %s", self.old.output, self.variant, line(error))
            return self._failed(f"the original cannot be run by itself: {line(error)}") if base else None
        try:
            exact = _evaluate(self.old, {**self.needs[0], **self.values}, self.wrt, exact=True)
        except Exception as error:  # as above
            return self._failed(f"the original cannot be run in fp64: {line(error)}")
        if not overflow_counts and not torch.equal(_kinds(before.out), _kinds(exact.out)):
            return None
        try:
            after = _evaluate(self.new, {**self.needs[1], **self.values}, self.wrt)
        except Exception as error:  # whatever a backend raises is the reason to put the site back
            return self._failed(f"the rewritten site raises {line(error)}")
        return self._compared(before, exact, after)

    def _compared(self, before: _Run, exact: _Run, after: _Run) -> Verdict:
        old, new = before.out.detach(), after.out.detach()
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return self._failed(f"expected {_show(old)}, found {_show(new)}")
        kinds = _kinds(old)
        astray = int((kinds != _kinds(new)).sum())
        if astray:
            return self._failed(
                f"NaN or infinite at other places than the original: {astray} of {old.numel()} values"
            )
        noise = lambda: [self._rounded(_unit(old)).out.detach()]  # noqa: E731
        error, tolerance = _measure([old], [exact.out.detach()], [new], noise if self.judged else None)
        if not self.judged:
            return Verdict(self.variant, True, error, math.inf)
        if error > tolerance:
            reason = f"error {error:.1e} > {tolerance:.1e} ({str(old.dtype).removeprefix('torch.')})"
            return Verdict(self.variant, False, error, tolerance, reason)
        ratio, why = self._gradients(before, exact, after) if before.leaves else (None, "")
        return Verdict(self.variant, not why, error, tolerance, why, ratio)

    def _gradients(self, before: _Run, exact: _Run, after: _Run) -> tuple[float | None, str]:
        """Return the ratio of error to tolerance over all gradients, and why they fail, if they do."""
        weights = self._weights(before.out)
        try:
            old = before.gradients(weights)
        except Exception as error:  # the user's graph may have no backward; then there is nothing to keep
            log.info("%s: the original has no gradient: %s", self.old.output, line(error))
            return None, ""
        try:
            true = exact.gradients(weights)
        except Exception as error:  # as above, but without an oracle nothing can be shown
            return math.inf, f"the backward of the original cannot be run in fp64: {line(error)}"
        try:
            new = after.gradients(weights)
        except Exception as error:  # whatever a backend raises is the reason to put the site back
            return math.inf, f"the backward of the rewritten site raises {line(error)}"
        found = [new[n] if n in new else torch.zeros_like(g) for n, g in old.items()]
        noise = lambda: [*self._rounded(_unit(before.out)).gradients(weights).values()]  # noqa: E731
        gap, tolerance = _measure([*old.values()], [*true.values()], found, noise)
        reason = f"gradients: error {gap:.1e} > {tolerance:.1e}" if gap > tolerance else ""
        return _ratio(gap, tolerance), reason

    def _weights(self, out: torch.Tensor) -> torch.Tensor:
        """Return random factors for the outputs, 0 where the original is not finite."""
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        return weights.masked_fill(~out.detach().isfinite(), 0.0)

    def _rounded(self, eps: float) -> _Run:
        rounding = Rounding(eps, torch.Generator().manual_seed(self.seed), self.masks)
        return _evaluate(self.old, {**self.needs[0], **self.values}, self.wrt, exact=True, rounding=rounding)

    def _failed(self, reason: str) -> Verdict:
        return Verdict(self.variant, False, reason=reason)


@dataclass(frozen=True, slots=True)
class _Run:
    """An output, and the leaves with respect to which it can be differentiated."""

    out: torch.Tensor
    leaves: dict[str, torch.Tensor]

    def gradients(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the gradient of ``sum(out * weights)`` per leaf, zeros for a leaf that does not matter."""
        if not self.leaves:
            return {}
        leaves = [*self.leaves.values()]
        grads = torch.autograd.grad(self.out, leaves, weights.to(self.out.dtype), allow_unused=True)
        return {
            n: torch.zeros_like(x) if g is None else g.detach()
            for (n, x), g in zip(self.leaves.items(), grads, strict=True)
        }


def _evaluate(
    region: Region,
    values: Mapping[str, Any],
    wrt: Sequence[str],
    *,
    exact: bool = False,
    rounding: Rounding | None = None,
) -> _Run:
    given, leaves = dict(values), {}
    for name in wrt:
        if name in region.inputs:
            x = given[name].detach()
            leaves[name] = given[name] = (widen(x) if exact else x).detach().requires_grad_()
    with torch.set_grad_enabled(bool(wrt)):
        out = region.run(given, dtype=torch.float64 if exact else None, rounding=rounding)
    return _Run(out, leaves)


def _measure(
    originals: Sequence[torch.Tensor],
    exacts: Sequence[torch.Tensor],
    news: Sequence[torch.Tensor],
    noise: Callable[[], list[torch.Tensor]] | None,
) -> tuple[float, float]:
    """Return (error, tolerance) over the values where the originals are finite.

    Where fp64 is not finite though the original is, the original is its own reference.  ``noise`` gives a
    second estimate of the original's own error, asked for only where the first would fail the new values.
    """
    keeps = [o.isfinite() for o in originals]
    references = [
        torch.where(e.isfinite(), e, o.double())[k] for o, e, k in zip(originals, exacts, keeps, strict=True)
    ]
    own = _largest(references, [o[k] for o, k in zip(originals, keeps, strict=True)])
    error = _largest(references, [n[k] for n, k in zip(news, keeps, strict=True)])
    eps = max(_unit(o) for o in originals)
    unit = eps * _largest(references, [torch.zeros_like(r) for r in references])
    if noise is not None and error > FACTOR * own + unit:
        rounded = [n[k] for n, k in zip(noise(), keeps, strict=True)]
        estimate = _largest(references, rounded)
        own = max(own, estimate) if math.isfinite(estimate) else own
    return error, FACTOR * own + unit


def _largest(references: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> float:
    """Return the largest absolute difference, infinite if a value is not finite."""
    out = 0.0
    for r, v in zip(references, values, strict=True):
        if r.numel():
            gap = float((v.double() - r).abs().max())
            out = max(out, gap if math.isfinite(gap) else math.inf)
    return out


def _ratio(error: float, tolerance: float) -> float:
    return error / tolerance if tolerance else (math.inf if error else 0.0)


def _unit(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _kinds(x: torch.Tensor) -> torch.Tensor:
    """Return 0 for finite values, 1 for NaN, 2 and 3 for the infinities."""
    x = x.detach()
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def _show(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def line(error: BaseException) -> str:
    """Return an error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
