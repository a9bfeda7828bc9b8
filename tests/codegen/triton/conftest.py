"""The corpus of specs, and one run of all emitted kernels under Triton's interpreter per session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnc.codegen.triton import launch
from attnc.ir import AttentionSpec
from attnc.printer import parse

HERE = Path(__file__).parent


RUNS = {"interpreted", "some", "decoded", "paged", "rows", "more_rows"}
"""Fixtures that run emitted kernels under the interpreter."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests that share one run of the interpreter in one process, so that it runs once."""
    used = RUNS & set(getattr(item, "fixturenames", ()))
    if used:
        item.add_marker(pytest.mark.xdist_group("interpreted" if "interpreted" in used else item.path.stem))


@pytest.fixture(autouse=True)
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep emitted kernels out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnc" / "kernels"


@pytest.fixture(autouse=True)
def _warned_anew() -> None:
    """Let what is logged once per process be logged once per test."""
    launch._warn.cache_clear()


@pytest.fixture(scope="session")
def corpus() -> dict[str, AttentionSpec]:
    lines = (HERE / "corpus.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(" ") for line in lines if not line.startswith("#"))
    return {name: parse(text) for name, _, text in pairs}


Rows = dict[str, dict[str, object]]
"""What a script under the interpreter found, by name of the run."""


@pytest.fixture(scope="session")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rows]:
    """Return a function that runs a script of this folder under Triton's interpreter."""
    return lambda script, *arguments: _interpret(tmp_path_factory.mktemp("kernels"), script, *arguments)


@pytest.fixture(scope="session")
def interpreted(interpret: Callable[..., Rows]) -> Rows:
    """Return what interpret.py found."""
    return interpret("interpret.py")


def _interpret(cache: Path, script: str, *arguments: str) -> Rows:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["run"]: row for row in rows}
