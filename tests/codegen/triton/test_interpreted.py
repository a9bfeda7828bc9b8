from __future__ import annotations

from pathlib import Path

import pytest

LINES = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize("name", NAMES)
def test_the_emitted_file_passes_its_own_test(name: str, interpreted) -> None:
    row = interpreted[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    assert row["text"].count("\n") == 5  # four cases and the verdict


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_equals_the_executed_spec_in_fp32_and_fp16(name: str, interpreted) -> None:
    rows = {run: row for run, row in interpreted.items() if run.startswith(f"{name} torch.")}
    assert len(rows) >= 4
    for run, row in rows.items():
        assert row["out"] <= 1, run
        assert row["lse"] <= 1, run
        assert row["strange"], f"{run}: rows that see no key"
        assert row["strange_lse"], f"{run}: log-sum-exp of rows that see no key"


def test_rows_that_see_no_key_were_among_them(interpreted) -> None:
    # NaN, zeros, and a spread over all keys
    for name in ("causal_from_the_end", "packed", "left_padded", "capped_window", "nothing_nearby"):
        assert any(row["hidden_rows"] for run, row in interpreted.items() if run.startswith(f"{name} torch."))


def test_the_self_test_notices_every_broken_kernel(interpreted) -> None:
    broken = {run: row for run, row in interpreted.items() if run.startswith("broken ")}
    assert len(broken) >= 7
    assert [run for run, row in broken.items() if row["code"] == 0] == []
