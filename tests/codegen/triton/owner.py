"""Run emitted files as their owner would: each in a process of its own, by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def assert_passes(file: Path) -> None:
    """Run the file's own test; on a machine without a GPU the file asks for the interpreter by itself."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert any(line.startswith(f"passed: {file.stem}_") for line in done.stdout.splitlines()), done.stdout
