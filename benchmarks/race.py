"""Time contenders side by side: they take turns in one process, in an order that rotates each round.

A ratio is taken within a round, so drift of the machine cancels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Rows = dict[str, dict[str, float]]


def race(calls: dict[str, Call], given: dict[str, torch.Tensor], rounds: int) -> Rows:
    """Return per contender: median milliseconds, ratio to the first.

    (median and quartiles), largest error against the first.
    """
    names = list(calls)
    times: dict[str, list[float]] = {n: [] for n in names}
    outputs = {n: calls[n](given).clone() for n in names}
    for n in names:
        calls[n](given)
    for r in range(rounds):
        for n in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            calls[n](given)
            times[n].append(time.perf_counter() - start)
    rows = {}
    for n in names:
        ratios = [a / b for a, b in zip(times[names[0]], times[n], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        error = (outputs[n] - outputs[names[0]]).abs().max().item()
        rows[n] = {
            "ms": statistics.median(times[n]) * 1e3,
            "ratio": middle,
            "low": low,
            "high": high,
            "error": error,
        }
    return rows


def show(title: str, rows: Rows) -> None:
    """Print one table: the first contender is the one that ratios are taken to."""
    print(f"\n{title}: speed over {next(iter(rows))}")
    print(f"{'':22}{'ms':>9}{'ratio':>8}{'quartiles':>15}{'max error':>12}")
    for name, r in rows.items():
        ratios = f"{r['ratio']:>8.2f}{r['low']:>8.2f}-{r['high']:.2f}"
        print(f"{name:22}{r['ms']:>9.2f}{ratios}{r['error']:>14.1e}", flush=True)


def session(path: Path) -> Call:
    """Return the ONNX model at ``path`` as a contender: CPU provider, as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in loaded.get_inputs()]
    return lambda kwargs: torch.from_numpy(loaded.run(None, {n: kwargs[n].numpy() for n in names})[0])
