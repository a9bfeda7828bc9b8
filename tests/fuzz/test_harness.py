"""The generator itself: it is caught lying, it covers its axes, its programs and scripts run."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tests.rewriting
from attnc.ir import AttentionSpec
from attnc.masks import FULL
from attnc.passes.detect import detect
from tests.fuzz.axes import AXES, Spelling, drawn, settled
from tests.fuzz.check import Outcome, check
from tests.fuzz.near_misses import NEAR_MISSES
from tests.fuzz.program import rendered
from tests.fuzz.script import save
from tests.fuzz.shrink import shrunk, weight
from tests.fuzz.tally import Tally

Break = Callable[[AttentionSpec], AttentionSpec]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Break], None]:
    """Give a function that makes detection report other specs than it found."""

    def patch(change: Break) -> None:
        def lying(*args: Any) -> Any:
            found, missed = detect(*args)
            lies = [replace(f, match=replace(f.match, spec=change(f.match.spec))) for f in found]
            return lies, missed

        monkeypatch.setattr(tests.rewriting, "detect", lying)

    return patch


def first_wrong(seeds: range) -> Outcome:
    """Return the first program of the seeds that comes out wrong."""
    return next(o for seed in seeds if (o := check(drawn(seed, "none"))).verdict == "wrong")


@pytest.mark.parametrize(
    ("change", "axes"),
    [
        (lambda spec: replace(spec, mask=FULL), {"mask"}),
        (lambda spec: replace(spec, scores=()), {"scale", "edit", "bias"}),
    ],
    ids=["mask-dropped", "scores-dropped"],
)
def test_a_broken_detector_is_caught_and_the_program_shrunk(
    broken: Callable[[Break], None], change: Break, axes: set[str]
):
    broken(change)
    o = first_wrong(range(40))
    small = shrunk(o.spelling, lambda x: check(x).verdict == "wrong")
    assert check(small).verdict == "wrong"
    assert weight(small) <= 2, small
    assert {f.name for f, value in small.choices() if value != f.default} & axes
    assert len(rendered(small).text.splitlines()) < 16


def without_mask(*args: Any) -> Any:
    found, missed = detect(*args)
    specs = [replace(f.match.spec, mask=FULL) for f in found]
    lies = [replace(f, match=replace(f.match, spec=s)) for f, s in zip(found, specs, strict=True)]
    return lies, missed


@pytest.mark.parametrize("door", ["static", "exported"])
def test_a_script_stands_alone(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(check(settled(Spelling(mask="causal", trace=door))), tmp_path)
    spec = importlib.util.spec_from_file_location("stand_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stand_alone", module)
    spec.loader.exec_module(module)
    module.main()
    monkeypatch.setattr(module, "detect", without_mask)
    monkeypatch.setattr("attnc.pipeline.detect", without_mask)
    with pytest.raises(AssertionError, match="not close"):
        module.main()


def test_every_value_of_every_axis_is_drawn():
    seen = {(f.name, value) for seed in range(6000) for f, value in drawn(seed).choices()}
    missing = {(n, v) for n, f in AXES.items() for v in f.metadata["values"]} - seen
    assert not missing
    assert len(AXES) >= 20


def test_a_seed_is_one_program():
    assert [rendered(drawn(seed)) for seed in range(20)] == [rendered(drawn(seed)) for seed in range(20)]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_run_and_are_refused_or_the_same(name: str):
    x = drawn(len(name), name)
    plain = settled(Spelling(seed=len(name), near_miss=name, trace=x.trace))
    o = check(plain)
    assert o.verdict in ("same", "untouched"), o.why


def test_plain_attention_is_recognized_and_its_mask_lifted():
    for mask in ("none", "causal", "window", "padding"):
        o = check(settled(Spelling(mask=mask)))
        assert (o.verdict, o.recognized, o.lifted) == ("same", True, True)


def test_the_tally_counts():
    tally = Tally()
    x = Spelling()
    tally.add([Outcome(x, "same", 1, (), True), Outcome(x, "untouched", 0, ("no-scores",))])
    tally.add([Outcome(replace(x, near_miss="softmin"), "wrong", 1, why="differs")])
    assert tally.recognized == (1, 2)
    assert tally.verdicts == Counter(same=1, untouched=1, wrong=1)
    assert [o.why for o in tally.failures] == ["differs"]
    assert "1 of 2 (50.00 %)" in str(tally)
