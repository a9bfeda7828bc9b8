"""Run a function in a forked process of its own, with a time limit that also ends what never returns."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

GRACE = 5
"""Seconds between the exception at the time limit and the end of the process."""


def isolated(f: Callable[[], dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return what ``f`` returns in a process of its own, with ``wall_s``; its output is thrown away.

    At ``limit`` seconds it gets a ``TimeoutError``, a little later it is killed.  A process that ends without
    a result gives ``{"status": "died", "why": "time limit" | "crash"}``.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        pid = os.fork()
        if pid == 0:
            _child(f, limit, answer)
        over = not _ended(pid, start + limit + GRACE)
        if over:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        try:
            out: dict[str, Any] = json.loads(answer.read_text())
        except (OSError, ValueError):
            out = {"status": "died", "why": "time limit" if over else "crash"}
    return {**out, "wall_s": round(time.monotonic() - start, 1)}


def _child(f: Callable[[], dict[str, Any]], limit: int, answer: Path) -> NoReturn:
    def late(*_: object) -> NoReturn:
        raise TimeoutError("time limit")

    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.signal(signal.SIGALRM, late)
        signal.alarm(limit)
        answer.write_text(json.dumps(f()))
        code = 0
    finally:
        os._exit(code)  # no clean-up of what the parent owns


def _ended(pid: int, deadline: float) -> bool:
    """Wait for the process; say whether it ended before the deadline."""
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return True
        time.sleep(0.02)
    return False
