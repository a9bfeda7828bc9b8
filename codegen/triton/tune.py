"""Search the tiles of a kernel by measuring them on this GPU; the pick is kept and used from then on.

The default table needs no search, so this runs only where it is asked for.  What cannot run or cannot win is
left out before it is launched: too much shared memory, too few registers, tiles longer than the sequence.  A
candidate that the compiler or the GPU refuses is not usable, which is no failure; one whose outputs disagree
with those of the default tiles never wins.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnc import logs
from attnc.codegen.triton import picks
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import SHARED_LIMIT, Config, head_sizes, shared_bytes
from attnc.codegen.triton.contest import Clock, Contest, Lengths, Trial, draw
from attnc.codegen.triton.emit import can_run, emit, kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS
from attnc.codegen.triton.launch import launcher
from attnc.codegen.triton.picks import Place, place_of
from attnc.errors import CodegenError, UnsupportedError
from attnc.ir import AttentionSpec, Kernel

log = logs.get("codegen")

REGISTERS = 255
"""32-bit registers that one thread may use."""
GAIN = 0.98
"""A pick takes at most this share of the default's time; less is noise."""
BUSY = 1 << 29
"""Bytes to fill before a timed run: the launch is ready before the GPU is, so its making is not measured."""
HEADS = 32
"""Query heads to measure with where a kernel says nothing of their number."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a search found: the pick, the tiles it was compared with, and all that was tried, in order."""

    place: Place
    pick: Config
    trials: tuple[Trial, ...]

    @property
    def default(self) -> Config:
        """The tiles of the default table."""
        return self.trials[0].config

    @property
    def speedup(self) -> float:
        """The default's time over the pick's."""
        ms = {t.config: t.ms for t in self.trials}
        return (ms[self.default] or 0.0) / (ms[self.pick] or 1.0)


def tune(
    spec: AttentionSpec,
    given: Sequence[Tensor] | Lengths,
    *,
    kind: str = "forward",
    budget: float = 60.0,
    clock: Clock | None = None,
) -> Tuning:
    """Find the fastest tiles for calls like ``given``, and keep them for this and later processes.

    ``given`` are tensors as ``torch.ops.attnc.attend`` takes them (q, k, v, then the captured ones, then the
    seed of a spec with dropout), or lengths to draw such tensors for.  ``budget`` is in seconds, compilation
    included: what is not tried by then is left out.  ``clock`` times a call, by default with the GPU's own
    events.

    Raises:
        UnsupportedError: no kernel can serve the spec, kernels of this kind take more than the tensors of a
            spec, or there is no GPU to measure on.
        CodegenError: the default tiles cannot run here, so there is nothing to compare with.
    """
    miss = can_run(spec, kind)
    if miss is not None:
        raise UnsupportedError(f"tune: {miss.why} (in {spec})")
    own, clock = canonical(spec), clock or event_clock()
    tensors = draw(own, given, _device()) if isinstance(given, Lengths) else tuple(given)
    place = place_of(tensors[0], tensors[1])
    default = KINDS[kind].choose(own)[place.arch]
    with tempfile.TemporaryDirectory(prefix="attnc-tune-") as folder:
        trials = _trials(Contest(own, kind, place, tensors, clock, Path(folder)), default, budget)
    best = _winner(trials)
    picks.keep(own, kind, place, best.config, pick=best.ms or 0.0, default=trials[0].ms or 0.0)
    launcher.cache_clear()
    return Tuning(place, best.config, tuple(trials))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _trials(contest: Contest, default: Config, budget: float) -> list[Trial]:
    """Run the default, then candidates until the budget is spent."""
    start = time.monotonic()
    trials = [contest.run(default)]
    if trials[0].ms is None:
        raise CodegenError(f"tune: expected the default tiles {default} to run here, found {trials[0].why}")
    for config in candidates(contest.spec, contest.place, default):
        if time.monotonic() - start > budget:
            log.info("tune: %s seconds are over after %d candidates", budget, len(trials))
            break
        trials.append(contest.run(config))
        log.info("tune: %s: %s", config, trials[-1].why or f"{trials[-1].ms:.4f} ms")
    return trials


def _winner(trials: Sequence[Trial]) -> Trial:
    """Return the fastest trial, or the first one, the default's, where none is clearly faster."""
    usable = [(t.ms, at) for at, t in enumerate(trials) if t.ms is not None]
    ms, at = min(usable)
    return trials[at] if ms <= GAIN * usable[0][0] else trials[0]


def candidates(spec: AttentionSpec, place: Place, default: Config) -> Iterator[Config]:
    """Yield the tiles worth a launch for a canonical spec, those most like the default first, without it."""
    rows = (16, 32, 64, 128) if place.sq < 64 else (64, 128)
    every = itertools.starmap(Config, itertools.product(rows, (32, 64, 128), (4, 8), (1, 2, 3, 4)))
    for config in sorted(every, key=lambda c: _distance(c, default)):
        why = "the default" if config == default else problem(spec, place, config)
        if why is None:
            yield config
        else:
            log.debug("tune: %s is left out: %s", config, why)


def _distance(a: Config, b: Config) -> int:
    """Return in how many numbers two configs differ."""
    return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))


def problem(spec: AttentionSpec, place: Place, config: Config) -> str | None:
    """Return why tiles cannot run at a place, or cannot win there, as is known without a launch, or None."""
    if config.block_m > max(place.sq, 16) or config.block_n > max(place.sk, 32):
        return f"tiles longer than {place.sq} queries or {place.sk} keys"
    if config.warps == 8 and config.block_m * config.block_n < 128 * 128:
        return "eight warps have too little to do"
    if place.arch not in SHARED_LIMIT:
        return None
    shared, limit = shared_bytes(spec, place.arch, config), SHARED_LIMIT[place.arch]
    if shared > limit:
        return f"about {shared} bytes of shared memory, over the limit of {limit}"
    threads = config.warps * (64 if place.arch.startswith("gfx") else 32)
    sums = config.block_m * (config.block_n + head_sizes(spec)[1]) // threads
    return f"{sums} registers per thread for scores and sums alone" if sums > REGISTERS else None


def tuned(kernel: Kernel, tokens: int, *, budget: float = 60.0, clock: Clock | None = None) -> Kernel:
    """Return a kernel with the tiles in its table that were found here for sequences of this length.

    Raises:
        UnsupportedError: there is no GPU to measure on.
    """
    spec, kind = spec_of(kernel.source), kind_of(kernel.source)
    sizes = Lengths(1, max(1, HEADS // spec.group_size), tokens, tokens)
    found = tune(spec, sizes, kind=kind, budget=budget, clock=clock)
    return emit(spec, name=kernel.name, kind=kind, configs={found.place.arch: found.pick})


def check_gpu() -> None:
    """Raise if nothing can be measured here.

    Raises:
        UnsupportedError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("tune: expected a GPU to measure on, found none; the default tiles stay")


def event_clock(rounds: int = 21, warm_up: int = 3) -> Clock:
    """Return a clock that gives the median of ``rounds`` runs by the GPU's events, each with a cold L2 cache.

    Raises:
        UnsupportedError: there is no GPU.
    """
    check_gpu()
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(2 * cache, BUSY), dtype=torch.uint8, device="cuda")

    def clock(call: Callable[[], object]) -> float:
        for _ in range(warm_up):
            call()
        pairs = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        times: list[float] = [start.elapsed_time(end) for start, end in pairs]
        return statistics.median(times)

    return clock
