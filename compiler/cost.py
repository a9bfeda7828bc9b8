"""Cost model: what a site costs, eager or fused, and whether fusing it pays on this machine.

Two kinds of figures, kept apart.  ``site_cost`` counts operations and bytes from shapes and divides them by
the machine's ceilings: a floor, for reports.  ``predict_gain`` answers "would the rewrite lose?", which
floors cannot: on one class of CPU, eager bfloat16 attention is 1.5 times as fast as the fused kernel at 256
tokens and half as fast at 2048.  So eager and fused attention are timed against each other once per machine,
torch version, thread count and dtype, in about a second, and the table is kept on disk.

The table has one axis, the number of scores ``B * H * Sq * Sk``: what fusing saves is the traffic of the
score matrix, so the gain follows its size (in which level of cache it fits) and depends little on how that
size came about; head sizes of 32 to 128 move it by a fifth.  Nothing is measured at import.

Source: performance_notes, sections 1 and 7 of the project's design notes; the floor is the roofline of
Williams, Waterman and Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from attnc.errors import CheckpointError
from attnc.files import write_bytes

log = logging.getLogger("attnc.lower")

FORMAT = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
HEADS, HEAD_SIZE = 8, 64  # of the timed attention
BUDGET = 1.1  # seconds for one table; lengths that would go over it are left out
ALWAYS, NEVER = 0, 2**31 - 1  # crossovers: fused wins, or loses, at every length

Timer = Callable[[torch.dtype, int, bool, bool], "tuple[float, float, float]"]
"""``(dtype, tokens, masked, once) -> (eager seconds, fused seconds, eager / fused)``."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most; ``source`` says where the numbers come from."""

    name: str
    flops: float
    """Multiply and add operations of a matrix product, per second."""
    bytes: float
    """Bytes of a copy (read plus written), per second."""
    exps: float
    """Exponentials, per second."""
    source: str


H200 = Ceilings("H200 sm_90, bfloat16", 790e12, 4.3e12, 3.9e12, "measured and published figures of the H200")


@dataclass(frozen=True)
class Cost:
    """What one run of a site costs: operations, bytes moved, and the floor of its time in seconds."""

    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Point:
    """One line of the table: eager time over fused time at a number of scores, without and with a mask."""

    scores: int
    plain: float
    masked: float
    eager_seconds: float
    fused_seconds: float


def site_cost(
    *,
    b: int,
    h: int,
    hk: int,
    sq: int,
    sk: int,
    dqk: int,
    dv: int,
    dtype: torch.dtype,
    fused: bool,
    machine: Ceilings,
    live: float = 1.0,
    masked: bool = False,
) -> Cost:
    """Count the forward pass of one site.

    Args:
        b: batch.
        h: query heads.
        hk: key heads.
        sq: queries.
        sk: keys.
        dqk: head size of queries and keys.
        dv: head size of values.
        dtype: of operands and scores.
        fused: scores are never stored, and hidden tiles are skipped; else they are stored after each step:
            product, scale, mask, softmax.
        machine: the ceilings for ``seconds``.
        live: share of the pairs that a fused form computes, 0 to 1; eager attention computes all.
        masked: whether a dense mask ``[Sq, Sk]`` is read.
    """
    pairs = b * h * sq * sk * (live if fused else 1.0)
    item = dtype.itemsize
    flops = 2 * pairs * (dqk + dv)
    moved = b * (h * sq + hk * sk) * (dqk + dv) * item + masked * sq * sk * item * (live if fused else 1.0)
    if fused:
        seconds = max(flops / machine.flops, moved / machine.bytes, pairs / machine.exps)
        return Cost(flops, moved, seconds)
    # written by the product, read and written by scale, mask and softmax, read by the product with V
    passes = pairs * item * (6 + 2 * masked)
    seconds = flops / machine.flops + (moved + passes) / machine.bytes + pairs / machine.exps
    return Cost(flops, moved + passes, seconds)


def predict_gain(
    dtype: torch.dtype,
    *,
    b: int,
    h: int,
    sq: int,
    sk: int,
    masked: bool = False,
    live: float = 1.0,
    threads: int | None = None,
    target: str = "cpu",
) -> float:
    """Estimate eager time over fused time of a site; below 1 the rewrite loses.

    ``threads`` None is torch's own number.  A gain that comes from skipping tiles (``live`` < 1) is taken to
    be proportional.  For a ``cuda`` target, nothing is measured: the ratio of floors on an H200 at head size
    64.

    Raises:
        ValueError: a dtype other than float32, bfloat16 and float16.
    """
    if target != "cpu":
        costs = [
            site_cost(
                b=b, h=h, hk=h, sq=sq, sk=sk, dqk=HEAD_SIZE, dv=HEAD_SIZE, dtype=dtype, fused=fused,
                machine=H200, live=live, masked=masked,
            ).seconds
            for fused in (False, True)
        ]  # fmt: skip
        return costs[0] / max(costs[1], 1e-12)
    points = table(dtype, threads)
    return _interpolate(points, max(1, b * h * sq * sk), masked) / max(live, 1e-6)


def crossover(
    dtype: torch.dtype, threads: int | None = None, *, heads: int = HEADS, masked: bool = False
) -> int:
    """Return the least length in tokens from which fusing self-attention always wins.

    ``heads`` is the batch times the heads.  ``ALWAYS`` (0) if it wins at every measured size, ``NEVER`` if it
    loses at the largest and the gain does not rise.
    """
    points = table(dtype, threads)
    gains = [p.masked if masked else p.plain for p in points]
    losing = [i for i, g in enumerate(gains) if g < 1]
    if not losing:
        return ALWAYS
    last = losing[-1]
    if last == len(points) - 1:
        last -= 1
    if last < 0 or gains[last + 1] <= gains[last]:
        return NEVER
    lo, hi = points[last], points[last + 1]
    share = -math.log(gains[last]) / (math.log(gains[last + 1]) - math.log(gains[last]))
    scores = math.exp(math.log(lo.scores) + share * (math.log(hi.scores) - math.log(lo.scores)))
    return min(NEVER, math.ceil(math.sqrt(scores / heads) - 1e-6))


def _interpolate(points: Sequence[Point], scores: int, masked: bool) -> float:
    """Return the gain at ``scores``: straight lines between logarithms, held before the first point.

    After the last point the last gain holds, unless it loses and rises: then its line goes on up to a gain of
    1.
    """
    xs = [math.log(p.scores) for p in points]
    ys = [math.log(p.masked if masked else p.plain) for p in points]
    x = math.log(scores)
    if x <= xs[0] or len(points) == 1:
        return math.exp(ys[0])
    i = next((i for i in range(1, len(xs)) if x <= xs[i]), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    if x > xs[-1]:
        return math.exp(max(ys[-1], min(ys[-1] + slope * (x - xs[-1]), 0.0)))
    return math.exp(ys[i - 1] + slope * (x - xs[i - 1]))


def table(dtype: torch.dtype, threads: int | None = None) -> tuple[Point, ...]:
    """Return the measured table, from memory, from disk, or by measuring now (about a second).

    Raises:
        ValueError: a dtype other than float32, bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cost model: expected float32, bfloat16 or float16, found {dtype}")
    return _table(dtype, threads or torch.get_num_threads(), cache_dir())


def cache_dir() -> Path:
    """Return where tables are kept: ATTNC_CACHE_DIR, or ``attnc`` in XDG_CACHE_HOME or ``~/.cache``."""
    if own := os.environ.get("ATTNC_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "attnc"


@functools.cache
def machine_name() -> str:
    """Return the CPU's name, its instruction set as torch sees it, and the number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


@functools.cache
def _table(dtype: torch.dtype, threads: int, folder: Path) -> tuple[Point, ...]:
    found = _load("gain", dtype, threads, folder)
    if isinstance(found, list):
        try:
            points = tuple(Point(**p) for p in found)
            if points and all(p.scores > 0 and p.plain > 0 and p.masked > 0 for p in points):
                return points
        except TypeError:
            log.info("cost model: the cached table has other fields; measuring again")
    start = time.perf_counter()
    with _threads(threads):
        points = measure(dtype)
    log.info("cost model: measured %s on %d threads in %.1f s", dtype, threads, time.perf_counter() - start)
    _store("gain", dtype, threads, folder, [asdict(p) for p in points])
    return points


def measure(dtype: torch.dtype, timer: Timer | None = None) -> tuple[Point, ...]:
    """Time eager against fused attention at rising lengths, until ``BUDGET`` is spent."""
    timer = timer or _time_pair
    points: list[Point] = []
    start, per_run = time.perf_counter(), 0.0
    for tokens in LENGTHS:
        left = BUDGET - (time.perf_counter() - start)
        # Work grows fourfold per doubling; plain and masked are run three times each, or once when short
        if points and 4 * per_run * 2 > left:
            break
        once = 4 * per_run * 6 > left
        plain, masked = (timer(dtype, tokens, m, once) for m in (False, True))
        per_run = plain[0] + plain[1]
        points.append(Point(HEADS * tokens**2, plain[2], masked[2], plain[0], plain[1]))
    return tuple(points)


def _time_pair(dtype: torch.dtype, tokens: int, masked: bool, once: bool) -> tuple[float, float, float]:
    """Time both in turns, after a warm-up unless ``once``; return median seconds and the median ratio."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_SIZE, generator=g).to(dtype) for _ in range(3))
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype) if masked else None
    eager: list[float] = []
    fused: list[float] = []
    start = time.perf_counter()
    with torch.inference_mode():
        if not once:
            _eager(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
        while len(eager) < (1 if once else 2) or (time.perf_counter() - start < 0.02 and not once):
            a = time.perf_counter()
            _eager(q, k, v, mask)
            b = time.perf_counter()
            F.scaled_dot_product_attention(q, k, v, mask)
            c = time.perf_counter()
            eager.append(b - a)
            fused.append(c - b)
    ratio = statistics.median(a / b for a, b in zip(eager, fused, strict=True))
    return statistics.median(eager), statistics.median(fused), ratio


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * HEAD_SIZE**-0.5
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), v)


def ceilings(dtype: torch.dtype = torch.float32, threads: int | None = None) -> Ceilings:
    """Return this CPU's ceilings: a matrix product, a copy and an exponential, timed once and kept.

    Raises:
        ValueError: a dtype other than float32, bfloat16 and float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cost model: expected float32, bfloat16 or float16, found {dtype}")
    return _ceilings(dtype, threads or torch.get_num_threads(), cache_dir())


@functools.cache
def _ceilings(dtype: torch.dtype, threads: int, folder: Path) -> Ceilings:
    found = _load("ceilings", dtype, threads, folder)
    name = f"{machine_name()}, {threads} threads, {str(dtype).removeprefix('torch.')}"
    if not (
        isinstance(found, list) and len(found) == 3 and all(isinstance(x, float) and x > 0 for x in found)
    ):
        with _threads(threads), torch.inference_mode():
            found = _measure_ceilings(dtype)
        _store("ceilings", dtype, threads, folder, found)
    flops, moved, exps = found
    return Ceilings(name, flops, moved, exps, "measured on this machine")


def _measure_ceilings(dtype: torch.dtype) -> list[float]:
    a = torch.ones(512, 512, dtype=dtype)
    big = torch.ones(1 << 23, dtype=torch.float32)
    out, part = torch.empty_like(big), torch.zeros(1 << 16)
    exps = torch.empty_like(part)
    product = _best(lambda: torch.mm(a, a))
    copy = _best(lambda: out.copy_(big))
    exp = _best(lambda: torch.exp(part, out=exps))
    return [2 * 512**3 / product, 2 * big.nbytes / copy, part.numel() / exp]


def _best(run: Callable[[], object]) -> float:
    """Return the least time of ``run`` within 50 ms, in seconds: a ceiling is what nothing disturbed."""
    run()
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < 0.05 or math.isinf(best):
        t = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - t)
    return max(best, 1e-9)


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if n != before:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        if n != before:
            torch.set_num_threads(before)


def _key(kind: str, dtype: torch.dtype, threads: int) -> dict[str, object]:
    return {
        "format": FORMAT,
        "kind": kind,
        "machine": machine_name(),
        "torch": str(torch.__version__),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _path(key: dict[str, object], folder: Path) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{key['kind']}-{key['dtype']}-{key['threads']}-{digest}.json"


def _load(kind: str, dtype: torch.dtype, threads: int, folder: Path) -> object:
    """Return the cached values, or None if there are none that can be used."""
    key = _key(kind, dtype, threads)
    path = _path(key, folder)
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("cost model: %s cannot be read (%s); measuring again", path, error)
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        log.info("cost model: %s is not a table of this machine; measuring again", path)
        return None
    return stored.get("values")


def _store(kind: str, dtype: torch.dtype, threads: int, folder: Path, values: object) -> None:
    key = _key(kind, dtype, threads)
    path = _path(key, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps({"key": key, "values": values}, indent=1) + "\n").encode(), force=True)
    except (OSError, CheckpointError) as error:
        log.info("cost model: %s cannot be written (%s); the table lasts for this process only", path, error)
