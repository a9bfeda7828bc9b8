"""The survey of emitted kernels: what is one computation, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "attn q=bhqd[{b},8,s,{d}]:float32 k=bhkd[{b},8,t,{d}]:float32 v=bhke[{b},8,t,{d}]:float32 group=1"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def site(spec: str, code: str = "", reason: str = "") -> dict[str, Any]:
    return {"spec": spec, "code": code, "reason": reason}


def plain(b: object, d: int) -> str:
    return f"{TEXT.format(b=b, d=d)} scale(0.5) mask=none softmax"


ROWS = [
    {"name": "a", "sites": [site(plain("s1", 16)), site(plain(2, 16))]},
    {"name": "b", "sites": [site(plain("s7", 16)), site(plain(2, 16).replace("float32", "float64"))]},
    {"name": "c", "sites": [site("", "talking-heads", "heads are mixed"), site(plain(1, 900))]},
    {"name": "d", "status": "died", "why": "crash"},
]


def test_sites_that_differ_in_sizes_no_kernel_depends_on_are_one_computation() -> None:
    import emitted

    made = emitted.computations(ROWS)
    assert [(r["emitted"], r["sites"], r["models"]) for r in made] == [
        (True, 3, ["a", "b"]),
        (False, 1, ["b"]),
        (False, 1, ["c"]),
    ]
    assert sorted(r["code"] for r in made if not r["emitted"]) == ["triton-dtype", "triton-head-size"]
    assert all("expected" in r["why"] for r in made if not r["emitted"])


def test_totals_count_sites_computations_and_misses_by_code() -> None:
    import emitted

    made, unread = emitted.computations(ROWS), emitted.without_spec(ROWS)
    totals = emitted.totals(ROWS, made, unread)
    assert totals == {
        "models": 4,
        "models_that_raised": 1,
        "sites_with_a_spec": 5,
        "sites_with_a_kernel": 3,
        "computations": 3,
        "computations_with_a_kernel": 1,
        "misses": {
            "triton-dtype": {"computations": 1, "sites": 1},
            "triton-head-size": {"computations": 1, "sites": 1},
        },
        "sites_without_a_spec": 1,
    }
    assert unread == [{"code": "talking-heads", "sites": 1, "examples": ["c: heads are mixed"]}]


def test_a_file_that_fails_its_own_test_is_told(tmp_path: Path) -> None:
    import emitted

    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("print('passed: all')\n")
    bad.write_text("import sys\nprint('FAILED: a row')\nsys.exit(1)\n")
    assert emitted._own_test(good) == "passed"
    assert emitted._own_test(bad) == "FAILED: a row"


def test_the_committed_results_leave_no_spec_without_a_kernel_that_passes_its_test() -> None:
    import emitted

    totals = json.loads(emitted.RESULTS.read_text(encoding="utf-8"))["totals"]
    assert totals["computations"] >= 50
    assert totals["computations_with_a_kernel"] == totals["computations"]
    assert totals["self_tests"] == {"passed": totals["computations"], "run": totals["computations"]}
