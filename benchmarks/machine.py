"""What a result file says of how it came about: command, day, machine, versions; no names, no paths."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """Return the command, the day, the machine, and the versions of ``packages`` and of Python."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_named, sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {p: import_module(p).__version__ for p in packages},
    }


def _named(argument: str) -> str:
    """Return an argument as it may be shown: of an absolute path, the last part only."""
    return Path(argument).name if argument.startswith("/") else argument
