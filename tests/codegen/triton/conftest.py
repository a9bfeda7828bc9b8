"""The corpus of specs, and one run of all emitted kernels under Triton's interpreter per session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnc.ir import AttentionSpec
from attnc.printer import parse

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep emitted kernels out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnc" / "kernels"


@pytest.fixture(scope="session")
def corpus() -> dict[str, AttentionSpec]:
    lines = (HERE / "corpus.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(" ") for line in lines if not line.startswith("#"))
    return {name: parse(text) for name, _, text in pairs}


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Return what interpret.py found, by name of the run."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("kernels")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpret.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["run"]: row for row in rows}
