"""Run seeds in child processes and say what became of each; a crash is a failure of the seed then open."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz_files.mutate import mutated
from tests.fuzz_files.seeds import make_folder, seeds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one broken file: opened, refused with the project's error, or failed, and why."""

    seed: int
    how: str
    verdict: str
    why: str
    seconds: float = 0.0
    peak: int = 0


def outcomes(first: int, last: int, module: str = "tests.fuzz_files.child") -> Iterator[Outcome]:
    """Give what became of the seeds, in order; after a crash a new process goes on behind it.

    Raises:
        RuntimeError: a child died before it began a seed, so the fault is not in a file.
    """
    while first < last:
        begun: int | None = None
        for line, error in _lines(first, last, module):
            if line is None:
                if begun is None:
                    raise RuntimeError(f"the child process did not start: {error}")
                yield Outcome(begun, mutated(begun, seeds())[1], "failed", f"the process died: {error}")
                first = begun + 1
                break
            if "begun" in line:
                begun = line["begun"]
            else:
                yield Outcome(**line)
        else:
            return


def _lines(first: int, last: int, module: str) -> Iterator[tuple[dict[str, object] | None, str]]:
    """Give what a child prints; at last (None, reason) where it died."""
    with tempfile.TemporaryDirectory() as parent:
        folder = make_folder(Path(parent))
        command = [sys.executable, "-m", module, str(first), str(last), str(folder)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                yield json.loads(line), ""
            code = child.wait()
            if code:
                errors.seek(0)
                yield None, f"exit code {code}; {errors.read()[-1000:]}"


def keep(outcome: Outcome, folder: Path) -> Path:
    """Write the file of a failure to ``folder`` for a look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed-{outcome.seed}.onnx"
    path.write_bytes(mutated(outcome.seed, seeds())[0])
    return path
