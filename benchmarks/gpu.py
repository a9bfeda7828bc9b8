"""Attention on one GPU, side by side: SDPA pinned to cuDNN and to flash, compiled FlexAttention, attnc.

    python benchmarks/gpu.py                           # all cases that fit into ten minutes
    python benchmarks/gpu.py --only 'causal/d128' --budget 120
    python benchmarks/gpu.py --write                   # benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --smoke      # tiny sizes, to try the benchmark itself

Every contender gets the same tensors, as many sets in turn as do not fit into the L2 cache together, and they
take turns in one process.  Before any is timed, its result is compared with fp64 on one head; a wrong result
has no speed.  A contender that cannot run a case is a row with the reason.  Ceilings are measured in the same
run: a large matrix product, and a copy.  ``of ceiling`` is the time that the slower of the two would take for
the case's operations and bytes, over the measured time; ``of best rival`` the fastest other's time over ours.
Times are medians by the GPU's own events.  The exit code is 1 if a result of attnc was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "--device" in sys.argv and sys.argv[sys.argv.index("--device") + 1 :][:1] == ["cpu"]:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from gpu_cases import Case, Tensors, all_cases, draw, limits, smoke_cases
from gpu_contenders import Call, Contender, UnfitError, contenders
from machine import about

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECONDS = 0.4
"""Time to measure one case for, over all contenders."""
BUSY = 1 << 29
"""Bytes written before each timed call: it empties the L2 cache, and the launch is ready when it ends."""


@dataclass
class Row:
    """One contender in one case: milliseconds and rates, or why there are none."""

    case: str
    contender: str
    status: str
    why: str = ""
    error: float | None = None
    limit: float | None = None
    ms: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    of_ceiling: float | None = None
    of_best_rival: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best: operations of a matrix product and bytes of a copy, per second."""

    flops: float
    bytes: float

    def floor_ms(self, case: Case, item: int) -> float:
        """Return the least time of a case, in milliseconds."""
        return 1e3 * max(case.flops / self.flops, case.bytes(item) / self.bytes)


class Machine:
    """Where things run, and the clock there."""

    def __init__(self, device: str, smoke: bool) -> None:
        self.device, self.smoke = torch.device(device), smoke
        self.is_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        size = BUSY if self.is_gpu else 1
        self.room = torch.empty(size, dtype=torch.uint8, device=self.device)

    @property
    def name(self) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"

    def sets(self, first: Tensors) -> int:
        """Return how many sets of tensors do not fit into the L2 cache together."""
        if not self.is_gpu:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(8, max(2, 1 + 2 * cache // first.size))

    def times(self, calls: list[Callable[[], Any]]) -> list[float]:
        """Return the milliseconds that each call takes, one after the other."""
        if not self.is_gpu:
            out = []
            for call in calls:
                start = time.perf_counter()
                call()
                out.append(1e3 * (time.perf_counter() - start))
            return out
        pairs = []
        for call in calls:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.room.zero_()
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]

    def ceilings(self) -> Ceilings:
        """Measure a matrix product and a copy."""
        n = 256 if self.smoke else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        source = torch.empty(1 << (20 if self.smoke else 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        matmul, copy = lambda: a @ b, lambda: target.copy_(source)
        ms = [statistics.median(self.times([call] * 12)[2:]) for call in (matmul, copy)]
        return Ceilings(2 * n**3 / ms[0] * 1e3, 2 * source.numel() / ms[1] * 1e3)


def measure(case: Case, machine: Machine, who: list[Contender], ceilings: Ceilings) -> Iterator[Row]:
    """Yield a row per contender of one case."""
    first = draw(case, machine.device, machine.dtype, 0, None)
    first.keep, first.added  # noqa: B018  made once, for all sets
    sets = [
        first,
        *(draw(case, machine.device, machine.dtype, i, first) for i in range(1, machine.sets(first))),
    ]
    expected: dict[bool, Any] = {}
    rows, ready = [], {}
    for contender in who:
        row = Row(case.name, contender.name, "ok")
        rows.append(row)
        try:
            calls = [contender.prepare(t) for t in sets]
            key = contender.rounds_bias and case.mask == "alibi"
            if key not in expected:
                expected[key] = limits(first, rounded=key)
            check(row, calls[0](), expected[key])
        except UnfitError as error:
            row.status, row.why = "cannot", str(error)
        except Exception as error:  # of any type: a contender that fails is a row, and the others go on
            row.status, row.why = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if row.status == "ok":
            ready[contender.name] = calls
    _race(rows, ready, machine)
    _rate(rows, case, machine, ceilings)
    yield from rows


def check(row: Row, found: tuple[torch.Tensor, ...], expected: list[tuple[torch.Tensor, float]]) -> None:
    """Compare results, of the first batch entry and head, with the exact ones; note the worst."""
    worst = -1.0
    for x, (want, limit) in zip(found, expected, strict=True):
        off = (x[0, 0].double() - want).abs().nan_to_num(float("inf")).max().item()
        if off / limit > worst:
            worst, row.error, row.limit = off / limit, off, limit
    if worst > 1:
        row.status, row.why = "wrong", f"off by {row.error:.1e} where {row.limit:.1e} is allowed"


def _race(rows: list[Row], ready: dict[str, list[Call]], machine: Machine) -> None:
    """Time the contenders in turns; the one to begin changes from round to round."""
    names = list(ready)
    if not names:
        return
    once = {n: sum(machine.times(ready[n][:1])) for n in names}
    rounds = 1 if machine.smoke else min(40, max(7, int(1e3 * SECONDS / max(sum(once.values()), 1e-3))))
    times: dict[str, list[float]] = {n: [] for n in names}
    for r in range(rounds):
        order = names[r % len(names) :] + names[: r % len(names)]
        taken = machine.times([ready[n][r % len(ready[n])] for n in order])
        for n, ms in zip(order, taken, strict=True):
            times[n].append(ms)
    for row in rows:
        if row.contender in times:
            row.ms = statistics.median(times[row.contender])


def _rate(rows: list[Row], case: Case, machine: Machine, ceilings: Ceilings) -> None:
    """Fill in what follows from the times."""
    item = torch.empty((), dtype=machine.dtype).element_size()
    rivals = [r.ms for r in rows if r.ms is not None and r.contender != "attnc"]
    for row in rows:
        if row.ms is None:
            continue
        row.tflops, row.gbytes = case.flops / row.ms / 1e9, case.bytes(item) / row.ms / 1e6
        row.of_ceiling = ceilings.floor_ms(case, item) / row.ms
        if row.contender == "attnc" and rivals:
            row.of_best_rival = min(rivals) / row.ms


def show(row: Row) -> str:
    """Return a row as a line of the table."""
    head = f"{row.case:28} {row.contender:11}"
    if row.ms is None:
        return f"{head} {row.status}: {row.why[:120]}"
    rates = (
        f"{row.ms:9.4f} ms {row.tflops:8.1f} TFLOP/s {row.gbytes:8.1f} GB/s {row.of_ceiling:6.2f} of ceiling"
    )
    best = "" if row.of_best_rival is None else f" {row.of_best_rival:6.2f} of best rival"
    return f"{head}{rates}{best}"


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for; return what ``--write`` writes."""
    machine = Machine(given.device, given.smoke)
    who = [c for c in contenders() if re.search(given.contenders, c.name)]
    cases = [c for c in (smoke_cases() if given.smoke else all_cases()) if re.search(given.only, c.name)]
    start = time.monotonic()
    ceilings = machine.ceilings()
    best = (
        f"{ceilings.flops / 1e12:.1f} TFLOP/s in a matrix product, {ceilings.bytes / 1e9:.1f} GB/s in a copy"
    )
    print(f"{machine.name}: {best}")
    rows: list[Row] = []
    for at, case in enumerate(cases):
        if time.monotonic() - start > given.budget:
            print(f"{len(cases) - at} cases were not run: the {given.budget:g} seconds were over")
            rows += [Row(c.name, "all", "not run", "the time was over") for c in cases[at:]]
            break
        for row in measure(case, machine, who, ceilings):
            rows.append(row)
            print(show(row), flush=True)
        if machine.is_gpu:
            torch.cuda.empty_cache()
    return {
        **about("torch", "triton"),
        "gpu": machine.name,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "ceilings": asdict(ceilings),
        "seconds": round(time.monotonic() - start, 1),
        "rows": [asdict(r) for r in rows],
    }


def quiet() -> None:
    """Silence what is meant: 0 / 0 in the interpreter, and FlexAttention that is not compiled."""
    import numpy

    numpy.seterr(all="ignore")
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a result of attnc was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny cases, one round")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no case is begun")
    parser.add_argument("--only", default="", help="regular expression that a case's name has to match")
    parser.add_argument("--contenders", default="", help="regular expression of contenders")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} into benchmarks/results")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU, found none; --device cpu --smoke tries the benchmark itself")
    if given.device == "cpu":
        quiet()
    result = run(given)
    if given.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(r["contender"] == "attnc" and r["status"] == "wrong" for r in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
