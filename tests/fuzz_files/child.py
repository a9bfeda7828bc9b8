"""Open broken files in a process of its own, so that its parent sees a crash: one line of JSON per seed.

The seed's number is written before its file is opened, so the last one begun is the one that crashed.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path

import onnx_ir as ir

from attnc.codegen.onnx.opening.files import custom_operators, open_model
from attnc.codegen.onnx.opening.wire import MEMORY
from attnc.errors import AttncError, CheckpointError
from attnc.onnx_file import inspect_onnx
from tests.fuzz_files.mutate import mutated
from tests.fuzz_files.seeds import seeds
from tests.fuzz_files.watch import trespasses, watched

SECONDS = 10.0
HELD = 2 << 30
"""Bytes of address space beside what the process starts with: a leak ends in MemoryError, not in swapping."""


def use(path: Path) -> str:
    """Do what a reader does with a file: read all weights, name operators, write it as bytes, inspect it.

    Return why it cannot be inspected, or nothing.
    """
    model = open_model(path)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value.numpy()
    custom_operators(model)
    ir.to_proto(model).SerializeToString()
    try:
        inspect_onnx(path)
    except AttncError as e:
        return str(e)
    return ""


def status(word: str) -> int:
    """Return a line of the process's memory in bytes; 0 where the system has no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith(word)), 0)


def reset_peak() -> None:
    """Make the peak of memory what is held now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def judge(path: Path, size: int) -> dict[str, object]:
    """Open one file; return the verdict, opened, refused or failed, with the reason and what it took."""
    reset_peak()
    before, start = status("VmRSS"), time.monotonic()
    with watched() as seen:
        try:
            verdict, why = "opened", use(path)
        except CheckpointError as e:
            verdict, why = "refused", str(e)
        except BaseException as e:
            verdict, why = "failed", f"{type(e).__name__}: {e}"[:500]
    seconds, peak = time.monotonic() - start, status("VmHWM") - before
    named = why.startswith(f"reading {path}: ") or verdict != "refused"
    if verdict != "failed" and (not named or "\n" in why or len(why) > 1500):
        verdict, why = "failed", f"an unclear message: {why[:500]}"
    if away := trespasses(seen, path.parent):
        verdict, why = "failed", f"it did {away[:3]}"
    if seconds > SECONDS or peak > MEMORY + 2 * size:
        verdict, why = "failed", f"{seconds:.1f} s and {peak >> 20} MiB for {size} bytes"
    return {
        "verdict": verdict,
        "why": why.replace(str(path), "FILE"),
        "seconds": seconds,
        "peak": max(peak, 0),
    }


def main() -> None:
    """Judge the seeds ``first`` to ``last`` in ``folder``: three arguments of the command line."""
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    models, path = seeds(), folder / "m.onnx"
    for data in models:  # everything that is imported on first use is imported now
        path.write_bytes(data)
        use(path)
    limit = status("VmSize") + HELD
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in range(first, last):
        print(json.dumps({"begun": seed}), flush=True)
        data, how = mutated(seed, models)
        path.write_bytes(data)
        print(json.dumps({"seed": seed, "how": how, **judge(path, len(data))}), flush=True)


if __name__ == "__main__":
    main()
