"""The cost model: counts, the table and its cache with a faked timer, and one real measurement."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attnc import cost

SHAPE = {"b": 2, "h": 8, "hk": 2, "sq": 100, "sk": 300, "dqk": 64, "dv": 32}
MACHINE = cost.Ceilings("slide rule", flops=1e3, bytes=1e2, exps=1e1, source="test")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    cost._table.cache_clear()
    cost._ceilings.cache_clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the timer: fused attention ties at 256 tokens, and its gain grows as the length."""
    seen: list[int] = []

    def timer(dtype: torch.dtype, tokens: int, masked: bool, once: bool) -> tuple[float, float, float]:
        seen.append(tokens)
        gain = tokens / 256 * (2 if masked else 1)
        return gain * 1e-6, 1e-6, gain

    monkeypatch.setattr(cost, "_time_pair", timer)
    return seen


def test_counts_of_a_fused_site() -> None:
    c = cost.site_cost(**SHAPE, dtype=torch.bfloat16, fused=True, machine=MACHINE)
    pairs = 2 * 8 * 100 * 300
    assert c.flops == 2 * pairs * 96
    assert c.bytes == 2 * (2 * 8 * 100 * 96 + 2 * 2 * 300 * 96)  # q and out, k and v
    assert c.seconds == max(c.flops / 1e3, c.bytes / 1e2, pairs / 1e1)


def test_live_share_is_for_fused_forms_only() -> None:
    how = {**SHAPE, "dtype": torch.float32, "machine": MACHINE, "masked": True}
    full, half = (cost.site_cost(**how, fused=True, live=x) for x in (1.0, 0.5))
    assert half.flops == full.flops / 2
    assert full.bytes - half.bytes == 100 * 300 * 4 / 2  # half of the mask
    eager = [cost.site_cost(**how, fused=False, live=x) for x in (1.0, 0.5)]
    assert eager[0] == eager[1]


def test_eager_stores_the_scores_after_every_step() -> None:
    plain, masked = (
        cost.site_cost(**SHAPE, dtype=torch.float32, fused=False, machine=MACHINE, masked=m)
        for m in (False, True)
    )
    fused = cost.site_cost(**SHAPE, dtype=torch.float32, fused=True, machine=MACHINE)
    scores = 4 * 2 * 8 * 100 * 300
    assert plain.flops == fused.flops
    assert plain.bytes - fused.bytes == 6 * scores
    assert masked.bytes - plain.bytes == 2 * scores + 4 * 100 * 300
    assert plain.seconds > fused.seconds


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("masked", "expected"), [(False, 256), (True, 128)])
def test_crossover_is_where_the_gain_passes_one(masked: bool, expected: int) -> None:
    assert cost.crossover(torch.bfloat16, 1, masked=masked) == expected
    # a quarter of the heads: the same number of scores at twice the length
    assert cost.crossover(torch.bfloat16, 1, masked=masked, heads=cost.HEADS // 4) == 2 * expected


@pytest.mark.usefixtures("runs")
def test_gain_follows_the_number_of_scores() -> None:
    gain = cost.predict_gain(torch.float32, b=1, h=cost.HEADS, sq=512, sk=512, threads=1)
    assert gain == pytest.approx(2)
    between = cost.predict_gain(torch.float32, b=1, h=cost.HEADS, sq=360, sk=360, threads=1)
    assert between == pytest.approx(360 / 256)  # a line between logarithms passes through every power law
    same = [
        cost.predict_gain(torch.float32, b=b, h=h, sq=q, sk=k, threads=1)
        for b, h, q, k in ((4, 2, 99, 7), (1, 8, 7, 99))
    ]
    assert same[0] == same[1] < 1
    assert cost.predict_gain(torch.float32, b=1, h=1, sq=1, sk=1, threads=1) == pytest.approx(16 / 256)
    assert cost.predict_gain(torch.float32, b=9, h=9, sq=9000, sk=9000, threads=1) == pytest.approx(
        2048 / 256
    )
    window = cost.predict_gain(torch.float32, b=1, h=cost.HEADS, sq=512, sk=512, threads=1, live=0.25)
    assert window == pytest.approx(8)


def points(*gains: float) -> tuple[cost.Point, ...]:
    return tuple(cost.Point(8 * 4**i, g, g, g, 1.0) for i, g in enumerate(gains))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((2.0, 1.5, 3.0), cost.ALWAYS),
        (
            (2.0, 0.5, 2.0),
            3,
        ),  # wins when tiny, loses, wins: half of the way from 2 to 4 tokens, in logarithms
        ((2.0, 0.9, 0.5), cost.NEVER),
        ((0.25, 0.5), 4),  # the line goes on beyond the last point
        ((0.5,), cost.NEVER),
    ],
)
def test_crossover_of_a_table(
    monkeypatch: pytest.MonkeyPatch, gains: tuple[float, ...], expected: int
) -> None:
    monkeypatch.setattr(cost, "table", lambda dtype, threads: points(*gains))
    assert cost.crossover(torch.bfloat16) == expected


def test_gain_beyond_the_table_rises_to_one_at_most() -> None:
    losing = points(0.25, 0.5)
    assert cost._interpolate(losing, 8 * 4**2, False) == pytest.approx(1)
    assert cost._interpolate(losing, 8 * 4**9, False) == pytest.approx(1)
    assert cost._interpolate(points(0.8, 0.5), 8 * 4**9, False) == pytest.approx(0.5)
    assert cost._interpolate(points(1.0, 3.0), 8 * 4**9, False) == pytest.approx(3)


def test_table_is_measured_once_and_kept(runs: list[int]) -> None:
    first = cost.table(torch.float32, 1)
    assert len(runs) == 2 * len(cost.LENGTHS)
    cost.table(torch.float32, 1)
    cost._table.cache_clear()  # as a new process would
    assert cost.table(torch.float32, 1) == first
    assert len(runs) == 2 * len(cost.LENGTHS)
    cost.table(torch.float32, 2)
    cost.table(torch.bfloat16, 1)
    assert len(runs) == 6 * len(cost.LENGTHS)
    assert len(list(cost.cache_dir().iterdir())) == 3  # and no temporary file among them


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', "\xff"])
def test_a_bad_cache_file_is_measured_over(runs: list[int], content: str) -> None:
    first = cost.table(torch.float32, 1)
    (file,) = cost.cache_dir().iterdir()
    file.write_bytes(content.encode("latin-1"))
    cost._table.cache_clear()
    runs.clear()
    assert cost.table(torch.float32, 1) == first
    assert runs
    assert json.loads(file.read_text())["key"]["threads"] == 1


def test_a_table_of_another_machine_or_torch_is_not_used(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cost.table(torch.float32, 1)
    for name, value in (("machine_name", lambda: "abacus"), ("FORMAT", 99)):
        cost._table.cache_clear()
        runs.clear()
        monkeypatch.setattr(cost, name, value)
        cost.table(torch.float32, 1)
        assert runs


def test_a_table_under_the_name_of_another_is_not_used(runs: list[int]) -> None:
    cost.table(torch.float32, 1)
    (mine,) = cost.cache_dir().iterdir()
    cost._path(cost._key("gain", torch.bfloat16, 1), cost.cache_dir()).write_text(mine.read_text())
    runs.clear()
    cost.table(torch.bfloat16, 1)
    assert runs


def test_an_unwritable_cache_costs_a_note_only(
    runs: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(blocked / "cache"))
    with caplog.at_level(logging.INFO, "attnc.lower"):
        assert cost.table(torch.float32, 1)
    assert "cannot be written" in caplog.text
    assert blocked.read_text() == "not a folder"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost.cache_dir() == Path(os.environ["ATTNC_CACHE_DIR"])
    monkeypatch.delenv("ATTNC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cost.cache_dir() == Path("/x/attnc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cost.cache_dir() == Path("/home/someone/.cache/attnc")


def test_measurement_stops_when_its_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, how = [0.0], []

    def timer(dtype: torch.dtype, tokens: int, masked: bool, once: bool) -> tuple[float, float, float]:
        how.append(once)
        pair = 1e-9 * cost.HEADS * tokens**2 * 50  # a slow machine: 0.1 s for a pair at 512 tokens
        now[0] += pair * (1 if once else 3)
        return pair / 2, pair / 2, 1.0

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    measured = cost.measure(torch.float32, timer)
    assert measured[-1].scores == cost.HEADS * 512**2
    assert how == sorted(how)  # the longest lengths are the ones timed once
    assert now[0] <= cost.BUDGET


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with cost._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("ask", [cost.table, cost.crossover, cost.ceilings])
def test_other_dtypes_are_refused(ask) -> None:
    with pytest.raises(ValueError, match=r"expected float32, bfloat16 or float16, found torch\.float64"):
        ask(torch.float64)


def test_a_gpu_is_predicted_from_its_ceilings(runs: list[int]) -> None:
    gain = cost.predict_gain(torch.bfloat16, b=1, h=16, sq=4096, sk=4096, target="cuda:sm_90")
    assert gain > 2
    assert not runs


def test_a_real_measurement_is_short_and_plausible() -> None:
    start = time.perf_counter()
    measured = cost.table(torch.float32, 1)
    seconds = time.perf_counter() - start
    assert len(measured) >= 4
    assert [p.scores for p in measured] == [cost.HEADS * n * n for n in cost.LENGTHS[: len(measured)]]
    assert all(0.02 < g < 50 for p in measured for g in (p.plain, p.masked))
    assert measured[-1].eager_seconds > measured[0].eager_seconds
    assert seconds < 6  # 1.2 on an idle machine; the rest is room for a busy one


def test_real_ceilings() -> None:
    top = cost.ceilings(torch.float32, 1)
    assert top.flops > 1e8
    assert top.bytes > 1e7
    assert top.exps > 1e6
    cost._ceilings.cache_clear()
    assert cost.ceilings(torch.float32, 1) == top  # from disk


def test_nothing_is_measured_at_import(tmp_path: Path) -> None:
    code = "import attnc.cost as c; assert c._table.cache_info().currsize == 0; print('ok')"
    env = {**os.environ, "ATTNC_CACHE_DIR": str(tmp_path / "fresh")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"
    assert not (tmp_path / "fresh").exists()
