"""Break ONNX files at random and open each: ``python -m tests.fuzz_files -n 20000``, or ``make fuzz-files``.

Prints the counts and the greatest time and memory; for every failure its seed, what was done, and the path of
the file.  The exit code is 1 if a file crashes the process, raises anything but the project's own error,
makes it touch anything but the model's folder, or takes too long or too much memory.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from tests.fuzz_files.batch import Outcome, keep, outcomes

FOLDER = Path("build/fuzz-files")
BATCH = 2000
LONG = 90


def reason(text: str) -> str:
    """Return what a message says without the names in it, to count by."""
    return "".join("#" if c.isdigit() else c for c in text.partition("expected")[2] or text)[:LONG]


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_files", description=__doc__)
    parser.add_argument("-n", type=int, default=20000, help="how many files (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    options = parser.parse_args()
    start, done, failures = time.monotonic(), list[Outcome](), list[Outcome]()
    for first in range(options.first, options.first + options.n, BATCH):
        for o in outcomes(first, min(first + BATCH, options.first + options.n)):
            done.append(o)
            if o.verdict == "failed":
                failures.append(o)
                print(f"failed, seed {o.seed} ({o.how}): {o.why}\n  {keep(o, FOLDER)}", flush=True)
        print(f"{len(done)} files, {time.monotonic() - start:.0f} s, {len(failures)} failed", flush=True)
    counts = Counter(o.verdict for o in done)
    print(f"\nseeds {options.first} to {options.first + options.n - 1}:", dict(sorted(counts.items())))
    print(
        f"most time {max(o.seconds for o in done):.2f} s, most memory {max(o.peak for o in done) >> 20} MiB"
    )
    for text, n in Counter(reason(o.why) for o in done if o.verdict == "refused").most_common(15):
        print(f"{n:7} {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
