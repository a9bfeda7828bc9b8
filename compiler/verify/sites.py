"""Check rewritten sites against the original sub-graph, and rewritten models against the original model.

The SAME rule.  The oracle is the original region in fp64.  A rewritten site passes if its largest error is at
most twice the original's own error in the model's dtype plus one rounding unit at the largest value, and if
it is NaN or infinite exactly where the original is.  Gradients, of the output times fixed random numbers,
follow the same rule with one tolerance for all gradients of a site: some are zero in theory (that of a key
bias) and hold nothing but noise.  Nothing is asked where the original's own gradient is not finite.

Known noise.  The original's own error is one sample, and can be small by luck: over a single key softmax is
exact, and its gradient cancels to nothing, which no other order of summation reproduces; and a fused backward
recomputes the weights from scores and log-sum-exp, which the original keeps.  Before a site fails, the error
is therefore estimated a second way, by rounding the fp64 run at random as a fused kernel would round
(``attnc.rounding``), and the larger of the two counts as the original's own.

Variants.  Besides the recorded values: random ones, queries times 16, rows whose mask hides every key, ragged
masks.  Where the original raises on a variant, or overflows under the large queries, the variant says nothing
and is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnc import logs
from attnc.region import Dataflow, Region
from attnc.verify.model import check_model, cropped_inputs
from attnc.verify.record import (
    Values,
    fill_random,
    is_known,
    own_randomness,
    record,
    record_values,
    traced_tensor,
)
from attnc.verify.rule import Trial, Verdict

__all__ = ["Check", "SiteToCheck", "check_model", "check_sites", "cropped_inputs", "record"]

log = logs.artifact("check")

Progress = Callable[[str, float], None]

_LARGE = 16.0
_HIDES = -(2.0**13)
"""An additive mask whose values go below this hides keys; the mildest fill in use is -1e4."""


@dataclass(frozen=True, slots=True)
class SiteToCheck:
    """One rewritten site.

    Attributes:
        id: its name in reports.
        old_output: the node of the original graph that the site computes.
        new_output: the node of the rewritten graph that took its place.
        boundary: nodes of both graphs from which both compute it: sources of q, k, v, biases and masks.
        mask_leaves: those of ``boundary`` that masks are made from: bool, int, or additive floats.
        query: those of ``boundary`` that q is made from.
        stands: names in the rewritten graph of those of ``boundary`` that other sites compute there.
        bounded: the site need only be close: its error on the recorded values is measured, not judged.
    """

    id: str
    old_output: str
    new_output: str
    boundary: tuple[str, ...]
    mask_leaves: tuple[str, ...]
    query: tuple[str, ...]
    bounded: bool = False
    stands: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """What came of one site: its worst variant.

    ``error`` and ``tolerance`` are largest absolute differences from the fp64 oracle, in the output's units;
    infinite where nothing could be compared, or nothing is asked.  ``gradients`` is the largest ratio of
    error to tolerance among the gradients of all variants, None where none was asked for.
    """

    id: str
    ok: bool
    error: float
    tolerance: float
    variant: str
    reason: str
    gradients: float | None = None


def check_sites(
    original: fx.Graph,
    rewritten: fx.Graph,
    sites: Sequence[SiteToCheck],
    placeholders: Mapping[str, Any] | None,
    *,
    gradients: bool,
    progress: Progress | None = None,
    constants: Collection[str] = (),
    seed: int = 0,
) -> list[Check]:
    """Check each site on recorded and adversarial values; return one Check per site, in order.

    ``placeholders`` are example values of the graph's inputs by name; where they are unknown, random ones
    stand in.  ``constants`` names the inputs that are weights and buffers: a mask made from them alone is
    never varied.  A site equal to an earlier one, node for node, is checked on its own recorded values only.
    ``progress`` is called with ("verify", fraction) before each site.

    Raises:
        ValueError: a site names nodes that a graph does not have, or an output that no boundary reaches.
        VerifyError: a size of an unknown input is not known.
    """
    old, new = Dataflow(original), Dataflow(rewritten)
    regions = [
        (
            Region(original, s.old_output, s.boundary, old),
            Region(
                rewritten,
                s.new_output,
                [b for b in s.boundary if b in s.stands or _same(b, old, new)],
                new,
                s.stands,
            ),
        )
        for s in sites
    ]
    values, later = _site_values(old, new, sites, regions, placeholders, seed)
    real = _all_given(old, values, placeholders or {})
    facts = _Facts.of(old, placeholders, constants, real)
    passed: set[str] = set()
    checks = []
    for i, (site, (before, after)) in enumerate(zip(sites, regions, strict=True)):
        if progress is not None:
            progress("verify", i / len(sites))
        given = {b: values[b] for b in site.boundary if b in values}
        needs = {n: values[n] for n in before.needs}, {n: later[n] for n in after.needs}
        job = _Job(site, before, after, given, needs, facts, gradients and not site.bounded, seed)
        key = job.key()
        check = job.run(repeated=key in passed)
        log.debug("%s", check)
        if check.ok:
            passed.add(key)
        checks.append(check)
    return checks


def _same(name: str, old: Dataflow, new: Dataflow) -> bool:
    """Say whether a boundary node of the old graph lives in the new one; its name may be another's."""
    a, b = old.node(name), new.nodes.get(name)
    return b is not None and (a.op, a.target) == (b.op, b.target)


def _site_values(
    old: Dataflow,
    new: Dataflow,
    sites: Sequence[SiteToCheck],
    regions: Sequence[tuple[Region, Region]],
    placeholders: Mapping[str, Any] | None,
    seed: int,
) -> tuple[Values, Values]:
    """Return what the old regions read and all boundaries, and what the new regions read besides, by name."""
    boundary = {n for pair in regions for r in pair for n in r.inputs}
    needed = boundary | {n for before, _ in regions for n in before.needs}
    masks = {m for s in sites for m in s.mask_leaves}
    values = record_values(old, placeholders, needed, boundary - masks, seed)
    # Other nodes of the two graphs may have one name and differ: lowering takes up names that it has freed.
    shared = {**(placeholders or {}), **{n: values[n] for n in boundary if _same(n, old, new)}}
    shared |= {name: values[n] for s in sites for n, name in s.stands.items() if n in values}
    later = record_values(new, shared, {n for _, after in regions for n in after.needs}, (), seed)
    return _usable(values), _usable(later)


def _usable(values: Values) -> Values:
    """Copy what was made in inference mode, which autograd refuses."""
    with torch.inference_mode(False):
        return {
            n: v.clone() if isinstance(v, torch.Tensor) and v.is_inference() else v for n, v in values.items()
        }


def _all_given(flow: Dataflow, names: Collection[str], given: Mapping[str, Any]) -> bool:
    """Say whether the named nodes are computed from given inputs alone."""
    behind = flow.behind([flow.nodes[n] for n in names])
    return all(n.name in given and is_known(given[n.name]) for n in behind if n.op == "placeholder")


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class _Facts:
    """What holds for the whole graph: which nodes change with the user's data, which may train."""

    real: bool
    varying: frozenset[str]
    trained: frozenset[str]
    inputs: frozenset[str]

    @classmethod
    def of(
        cls, flow: Dataflow, placeholders: Mapping[str, Any] | None, constants: Collection[str], real: bool
    ) -> _Facts:
        """Read the facts off the inputs of the graph."""
        given = {
            n: (placeholders or {}).get(n.name, traced_tensor(n)) for n in flow.order if n.op == "placeholder"
        }
        users = {
            n
            for n, v in given.items()
            if n.name not in constants
            and isinstance(v, torch.Tensor)
            and not isinstance(v, torch.nn.Parameter)
        }
        trained = {n for n, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        named = [frozenset(n.name for n in flow.depends_on_values(x)) for x in (users, trained)]
        return cls(real, named[0], named[1], frozenset(n.name for n in users))


@dataclass(frozen=True, slots=True)
class _Variant:
    name: str
    values: Values
    gradients: bool = False


@dataclass
class _Job:
    """One site, with the values of its boundary, and of what else its two regions read."""

    site: SiteToCheck
    old: Region
    new: Region
    values: Values
    needs: tuple[Values, Values]
    facts: _Facts
    gradients: bool
    seed: int
    _wrt: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        floats = [n for n in self.old.inputs if _is_float(self.values[n])]
        trained = [n for n in floats if n in self.facts.trained]
        wrt = trained or [n for n in floats if n not in self.site.mask_leaves]
        self._wrt = tuple(wrt) if self.gradients else ()

    def key(self) -> str:
        """Return a text that is equal for sites that compute the same function on inputs of the same kind."""
        names = {}
        for i, n in enumerate(self.site.boundary):
            v = self.values.get(n)
            kind = (v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v
            role = (n in self.site.mask_leaves, n in self.site.query, n in self._wrt, n in self.facts.varying)
            names[n] = f"input {i} {kind} {role}"
        return (
            f"{self.old.key(names)}\n---\n{self.new.key(names)}\n{sorted(names.values())} {self.site.bounded}"
        )

    def run(self, repeated: bool) -> Check:
        """Try the variants up to the first failure, or only the recorded values; return the worst."""
        worst: Verdict | None = None
        ratio: float | None = None
        for variant in self._variants(repeated or self.site.bounded):
            with own_randomness(self.seed), torch.inference_mode(False):
                verdict = self._try(variant)
            if verdict is None:
                log.debug("%s: the original cannot be judged on %s", self.site.id, variant.name)
                continue
            log.debug("%s: %s", self.site.id, verdict)
            if verdict.gradients is not None:
                ratio = max(ratio or 0.0, verdict.gradients)
            if worst is None or not verdict.ok or verdict.ratio > worst.ratio:
                worst = verdict
            if not verdict.ok:
                break
        assert worst is not None, "the recorded values always give a verdict"
        return Check(self.site.id, worst.ok, worst.error, worst.tolerance, worst.variant, worst.reason, ratio)

    def _variants(self, base_only: bool) -> Iterator[_Variant]:
        base = "real" if self.facts.real else "random"
        yield _Variant(base, self.values, True)
        if base_only:
            return
        generator = torch.Generator().manual_seed(self.seed)
        if self.facts.real:
            drawn = {n: _redrawn(self.values[n], generator) for n in self._data()}
            yield _Variant("random", {**self.values, **drawn})
        large = {n: self.values[n] * _LARGE for n in self.site.query if _is_float(self.values.get(n))}
        if large:
            yield _Variant("large-logits", {**self.values, **large})
        yield from self._mask_variants(generator)

    def _data(self) -> list[str]:
        """Return the floating inputs that are no masks."""
        return [
            n for n in self.site.boundary if n not in self.site.mask_leaves and _is_float(self.values.get(n))
        ]

    def _mask_variants(self, generator: torch.Generator) -> Iterator[_Variant]:
        """Yield masks that hide every key of a row, whatever their polarity, and random ones."""
        leaves = {
            n: self.values[n]
            for n in self.site.mask_leaves
            if n in self.facts.varying and isinstance(self.values.get(n), torch.Tensor)
        }
        whole = {n: x for n, x in leaves.items() if not x.is_floating_point() and not x.is_complex()}
        if whole:
            for word, value in (("zeros", 0), ("ones", 1)):
                rows = {n: _with_batch_row(x, value) for n, x in whole.items()}
                yield _Variant(f"empty-row ({word})", {**self.values, **rows}, True)
        for word, floor in (("finfo.min", _HIDES), ("-inf", -math.inf)):
            rows = {
                n: _with_query_row(x, torch.finfo(x.dtype).min if word == "finfo.min" else floor)
                for n, x in leaves.items()
                if x.is_floating_point() and (n in self.facts.inputs or bool((x <= floor).any()))
            }
            if rows:
                yield _Variant(f"empty-row ({word})", {**self.values, **rows}, True)
        if whole:
            ragged = {n: _redrawn(x, generator) for n, x in whole.items()}
            yield _Variant("ragged-mask", {**self.values, **ragged})

    def _try(self, variant: _Variant) -> Verdict | None:
        """Return the outcome on one variant, None where the original gives nothing to compare with."""
        trial = Trial(
            variant.name,
            self.old,
            self.new,
            variant.values,
            self.needs,
            self._wrt if variant.gradients else (),
            frozenset(self.site.mask_leaves),
            self.seed,
            not self.site.bounded,
        )
        return trial.verdict(
            base=variant.values is self.values, overflow_counts=variant.name != "large-logits"
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _redrawn(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random values in the shape and strides of ``x``: normal floats, zeros and ones."""
    out = torch.empty_like(x)
    if x.is_floating_point():
        return fill_random(out, generator)
    return out.copy_(torch.randint(0, 2, x.shape, generator=generator))


def _with_batch_row(x: torch.Tensor, value: int) -> torch.Tensor:
    """Return a copy of ``x`` whose first entry along the first axis is all ``value``."""
    out = x.clone()
    (out[0] if out.ndim > 1 else out).fill_(value)
    return out


def _with_query_row(x: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy of ``x`` whose first row along the last axis is all ``value``."""
    out = x.clone()
    out[(0,) * (out.ndim - 1)].fill_(value)
    return out
