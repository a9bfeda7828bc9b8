"""Generate attention programs and check each: ``python -m tests.fuzz -n 20000``, or ``make fuzz N=20000``.

Prints the counts, and for every failure the seed, the shrunk program and the path of a script of its own.
The exit code is 1 if any rewritten program computes something else, or does not run.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tests.fuzz.axes import Spelling, drawn
from tests.fuzz.check import Outcome, check
from tests.fuzz.program import rendered
from tests.fuzz.script import save
from tests.fuzz.shrink import shrunk
from tests.fuzz.tally import Tally

FOLDER = Path("build/fuzz")
BATCH = 50
SHRUNK = 10
"""How many failures are made small; the others are listed by seed."""


def quiet() -> None:
    """Use one thread, and leave torch's own warnings and log lines out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


def batch(seeds: range) -> list[Outcome]:
    """Check the programs of some seeds."""
    return [check(drawn(seed)) for seed in seeds]


def outcomes(first: int, n: int, workers: int) -> Iterator[list[Outcome]]:
    """Yield outcomes, batch by batch, as workers finish them."""
    batches = [range(i, min(i + BATCH, first + n)) for i in range(first, first + n, BATCH)]
    if workers == 1:
        yield from map(batch, batches)
        return
    with multiprocessing.get_context("fork").Pool(workers, quiet, maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(batch, batches)


def report(o: Outcome) -> None:
    """Print one failure made small, and write its script."""

    def fails(x: Spelling) -> bool:
        return check(x).verdict == o.verdict

    small = check(shrunk(o.spelling, fails))
    path = save(replace(small, why=small.why or o.why), FOLDER)
    print(f"\n{o.verdict}, seed {o.spelling.seed}, shrunk to: {small.spelling}\n{small.why.strip()}\n")
    try:
        print(rendered(small.spelling).text)
    except Exception as e:
        print(f"(the program is not written: {e})")
    print(f"stand-alone: {path}", flush=True)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=20000, help="how many programs (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args()
    quiet()
    tally, start, told = Tally(), time.monotonic(), 0
    for done in outcomes(options.first, options.n, options.workers):
        tally.add(done)
        if tally.graphs - told >= 1000:
            told = tally.graphs
            print(
                f"{told} graphs, {time.monotonic() - start:.0f} s, {len(tally.failures)} failed", flush=True
            )
    print(tally)
    failures = sorted(tally.failures, key=lambda o: (o.verdict, o.spelling.seed))
    for o in failures[:SHRUNK]:
        report(o)
    if failures:
        print("\nfailed:", *(f"{o.verdict}:{o.spelling.seed}" for o in failures))
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
