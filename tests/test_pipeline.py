"""What the stages after capture cost as models get deeper, in calls: the clock says little in tests."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc import parse_forms, polynomial
from attnc.capture.types import Captured
from attnc.capture.whole import capture_export
from attnc.passes.rewrite.apply import Rewriter
from attnc.pipeline import Options, run
from attnc.verify import sites as checks

WIDTH, HEADS = 16, 2
DEPTHS = (4, 8, 12)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # [B, H, S, D]
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + bias, -1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Equal layers under one causal mask."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        for layer in self.layers:
            x = layer(x, bias)
        return x


@cache
def captured(layers: int) -> Captured:
    return capture_export(Stack(layers), (torch.randn(2, 7, WIDTH),), dynamic_shapes=None)


def count_calls(f: Callable[[], object]) -> int:
    """Count the calls of Python and built-in functions that ``f`` makes."""
    calls = 0

    def note(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return calls


def forget() -> None:
    for known in vars(polynomial).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


def rewrite(layers: int, **options: bool) -> None:
    outcome = run(captured(layers), Options(parse_forms("fused"), cost_model=False, **options))
    assert outcome.rewritten == layers


@pytest.mark.parametrize("options", [{"verify": False}, {"verify": True, "gradients": True}], ids=str)
def test_the_last_layers_cost_no_more_than_the_first(options):
    rewrite(DEPTHS[0], **options)  # first use
    calls = []
    for layers in DEPTHS:
        captured(layers)
        forget()
        calls.append(count_calls(partial(rewrite, layers, **options)))
    steps = [b - a for a, b in pairwise(calls)]
    # The same work for the same number of layers; a scan of the graph per site makes the second step 1.05.
    assert steps[1] <= 1.02 * steps[0], f"{calls} calls for {DEPTHS} layers"


def test_of_equal_layers_one_is_checked_in_all_variants(monkeypatch):
    full = checks._Job.run
    known: list[bool] = []

    def noted(job: checks._Job, repeated: bool) -> checks.Check:
        known.append(repeated)
        return full(job, repeated)

    monkeypatch.setattr(checks._Job, "run", noted)
    rewrite(12, verify=True, gradients=True)
    assert known == [False, *[True] * 11]


class Twice(nn.Module):
    """An attention whose queries, or values, are another's output."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT * 0.5).softmax(-1) @ v
        q, v = (out, v) if self.role == "q" else (q, out)
        return (q @ k.mT * 0.25).softmax(-1) @ v


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("role", ["q", "v"])
def test_a_site_that_reads_the_output_of_another_is_checked_on_it(role, wrong, monkeypatch):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, 6, 8, generator=g) for _ in range(3))
    program = capture_export(Twice(role), (q, k, v), dynamic_shapes=None)
    apply = Rewriter.apply

    def without_scale(self, found, spec, stamp):
        late = wrong and spec.scale == 0.25
        return apply(self, found, replace(spec, scores=()) if late else spec, stamp)

    monkeypatch.setattr(Rewriter, "apply", without_scale)
    outcome = run(program, Options(parse_forms("fused"), cost_model=False))
    assert [r.status for r in outcome.records] == ["rewritten", "kept" if wrong else "rewritten"]
    assert outcome.records[1].code == ("failed-verification" if wrong else "")


def test_each_normalizer_of_a_merged_site_has_a_record():
    class Loop(nn.Module):
        def forward(self, q, k, v):
            heads = [(q[:, i] @ k[:, i].mT).softmax(-1) @ v[:, i] for i in range(3)]
            return torch.stack(heads, 1)

    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    fast = attnc.optimize(Loop().eval(), (q, k, v), cost_model=False)
    records = fast.report.sites
    assert [r.status for r in records] == ["rewritten"] * 3
    assert len({r.id for r in records}) == 3
    assert [r.reason.startswith(f"one site with {records[0].id}") for r in records] == [False, True, True]
    torch.testing.assert_close(fast(q, k, v), Loop()(q, k, v))
