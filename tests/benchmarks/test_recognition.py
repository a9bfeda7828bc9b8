"""The scoreboard: its sums, its table in three places, and how models are run apart."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def model(**row: Any) -> dict[str, Any]:
    return {"name": "m", "status": "ok", "unfused": 4, "masks": {"causal": 4}, "wall_s": 2.0, **row}


def results() -> dict[str, Any]:
    return json.loads((RESULTS / "recognition.json").read_text())


def test_readme_and_results_show_the_table_of_the_json():
    import scoreboard

    shown = scoreboard.table(results())
    assert scoreboard.shown_in_readme((ROOT / "README.md").read_text()) == shown
    assert (RESULTS / "recognition.md").read_text().endswith(shown)


def test_totals_are_the_sums_of_the_rows():
    import scoreboard

    for tool in results()["tools"].values():
        for part, total in (("spellings", scoreboard.sum_spellings), ("zoo", scoreboard.sum_models)):
            if part in tool:
                assert tool[part]["totals"] == json.loads(json.dumps(total(tool[part]["rows"])))


def test_results_name_no_machine_and_no_path():
    for name in ("recognition.json", "recognition.md", "rewrite_time.json"):
        text = (RESULTS / name).read_text()
        assert os.uname().nodename not in text
        assert "/work" not in text
        assert "/home/" not in text


def test_sites_beyond_those_counted_are_no_gain():
    import scoreboard

    rows = [model(fused=6, by_status={"kept": 1}), model(fused=1, by_status={"kept": 1, "missed": 5})]
    totals = scoreboard.sum_models(rows)
    assert (totals["sites"], totals["rewritten"], totals["named"]) == (8, 5, 3)


def test_a_mask_kind_counts_as_closed_only_where_nothing_stayed_dense():
    import scoreboard

    rows = [model(dense=False), model(dense=True), model()]
    assert scoreboard.sum_models(rows)["masks"] == {"causal": [12, 4]}


def test_models_without_sites_and_models_that_died_are_no_models():
    import scoreboard

    rows = [
        model(unfused=0),
        {"status": "died", "why": "crash", "wall_s": 1.0},
        model(raised="ValueError: x"),
    ]
    totals = scoreboard.sum_models(rows)
    assert (totals["models"], totals["died"], totals["raised"]) == (1, 1, 1)


def test_a_new_part_takes_the_place_of_the_old_one_and_nothing_else():
    from recognition import merge

    old = {"tools": {"inductor": {"title": "a", "zoo": 1, "spellings": 2}, "attnc": {"title": "b"}}}
    new = merge(old, "inductor", {"title": "c", "zoo": 3})
    assert new == {"tools": {"attnc": {"title": "b"}, "inductor": {"title": "c", "zoo": 3, "spellings": 2}}}
    assert list(new["tools"]) == ["attnc", "inductor"]


def test_text_between_the_marks_of_the_readme_is_replaced():
    import scoreboard

    text = f"before\n{scoreboard.BEGIN}\nold\n{scoreboard.END}\nafter\n"
    new = scoreboard.put_into_readme(text, "new\n")
    assert scoreboard.shown_in_readme(new) == "new\n"
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    with pytest.raises(ValueError, match="in the README"):
        scoreboard.put_into_readme("no marks", "new\n")


def test_a_process_that_never_returns_is_ended(monkeypatch):
    import isolated

    def stubborn() -> NoReturn:
        while True:
            with contextlib.suppress(TimeoutError):
                time.sleep(60)

    monkeypatch.setattr(isolated, "GRACE", 1)
    start = time.monotonic()
    row = isolated.isolated(stubborn, 1)
    assert row["status"] == "died"
    assert row["why"] == "time limit"
    assert time.monotonic() - start < 20


def test_a_process_that_crashes_takes_nobody_along():
    from isolated import isolated

    assert isolated(lambda: os._exit(3), 20)["why"] == "crash"
    assert isolated(lambda: {"fused": 2}, 20)["fused"] == 2


def test_kept_rows_are_used_again_unless_the_sources_changed_or_the_time_was_up(tmp_path, monkeypatch):
    import recognition

    monkeypatch.setattr(recognition, "KEPT", tmp_path)
    ran: list[str] = []

    def isolated(work: Any, limit: int) -> dict[str, Any]:
        return {**work(), "wall_s": 0.0}

    def work(job: str) -> dict[str, Any]:
        ran.append(job)
        return {"raised": "TimeoutError: time limit"} if job == "slow" else {"fused": 1}

    monkeypatch.setattr(recognition, "isolated", isolated)
    jobs = ["a", "slow", "b"]
    first = recognition.rows_of("zoo_x", jobs[:2], "one", work, 9, False)
    assert [r["name"] for r in first] == ["a", "slow"]
    recognition.rows_of("zoo_x", jobs, "one", work, 9, False)
    assert ran == ["a", "slow", "slow", "b"]
    recognition.rows_of("zoo_x", ["a"], "two", work, 9, False)
    recognition.rows_of("zoo_x", ["a"], "two", work, 9, True)
    assert ran[4:] == ["a", "a"]


def test_without_a_corpus_the_error_says_what_was_expected(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "recognition.py"), "--corpus", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pass its folder with --corpus DIR" in ended.stderr
