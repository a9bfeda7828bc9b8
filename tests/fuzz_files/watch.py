"""See what a block of code does outside of itself: files opened, processes started, sockets made."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
)
WRITES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)
_seen: list[list[tuple[str, str]]] = []
_hooked: list[bool] = []


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _seen and (event == "open" or event in STARTS or event in WRITES):
        name = args[0] if args and isinstance(args[0], str | bytes | os.PathLike) else ""
        mode = "write " if event == "open" and _writes(args) else ""
        for seen in _seen:
            seen.append((mode + event, os.fsdecode(name)))


def _writes(args: tuple[object, ...]) -> bool:
    flags = args[2] if len(args) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Give the list of events (what, path) that the block adds to; Python keeps the hook for good."""
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    seen: list[tuple[str, str]] = []
    _seen.append(seen)
    try:
        yield seen
    finally:
        _seen.remove(seen)


def trespasses(seen: list[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """Return what is not the mere reading of a file in ``folder`` or of Python's own modules."""
    inside = os.path.realpath(folder)
    own = (
        *(os.path.realpath(p) for p in sys.path if p),
        os.path.realpath(sys.prefix),
        sys.base_prefix,
    )

    def allowed(event: str, name: str) -> bool:
        place = os.path.realpath(name) if name else ""
        return event == "open" and (not name or place.startswith((inside + os.sep, *own)))

    return [(event, name) for event, name in seen if not allowed(event, name)]
