"""Run every script in examples/, each in a folder of its own so that what it writes stays out of the tree.

Slow: `make demo` runs the same script, and continuous integration runs that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SECONDS = 400


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path, tmp_path):
    # A long example offers --quick, which shows the same things on less.
    quick = ["--quick"] if "--quick" in path.read_text(encoding="utf-8") else []
    done = subprocess.run(
        [sys.executable, str(path), *quick],
        cwd=tmp_path,
        env=os.environ | {"ATTNC_LOGS": "", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{path.name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.strip(), f"{path.name} shows nothing"


def test_there_are_examples():
    assert EXAMPLES, "examples/ is empty"
