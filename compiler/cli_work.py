"""What the verbs of the command line do, apart from reading arguments and showing results."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnc.errors import CheckpointError, RewriteError, VerifyError
from attnc.examples import Sizes
from attnc.files import check_apart, check_free
from attnc.manifest import MANIFEST, Manifest, read_manifest
from attnc.report.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnc.ir import Kernel
    from attnc.opening import Opened

Call = Callable[[], Any]
Tick = Callable[..., None]
WARM_UP = 2
ROUNDS = 21
SECONDS = 20.0


@dataclass(slots=True)
class Subject:
    """A model that the command line works on, with inputs.

    ``opened`` is how it came from its source, None where attnc saved it; ``manifest`` the other way round.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    opened: Opened | None = None
    manifest: Manifest | None = None

    def __call__(self) -> Any:
        """Run the model on its inputs, without gradients."""
        return self.on(self.args, self.kwargs)

    def on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model on these inputs, without gradients."""
        with torch.no_grad():
            return self.model(*args, **kwargs)

    @property
    def bounded(self) -> bool:
        """Whether a form that is only close was used somewhere in it."""
        records = self.manifest.records() if self.manifest else []
        linears = self.manifest.linears if self.manifest else []
        return bool(linears) or any(s.contract == "BOUNDED" and s.status == "rewritten" for s in records)


def is_saved(path: str) -> bool:
    """Say whether a model argument is a directory that attnc saved."""
    return (Path(path) / MANIFEST).is_file()


def open_subject(path: str, attn: str | None = None, sizes: Sizes | None = None) -> Subject:
    """Open a model argument to run it: a source, or a directory that attnc saved.

    Raises:
        CheckpointError: as ``open_model`` and ``load``.
    """
    from attnc.checkpoint import example_inputs_of, load, open_model

    if is_saved(path):
        manifest = read_manifest(path)
        model = load(path)
        args, kwargs = example_inputs_of(manifest)
        return Subject(path, model, args, kwargs, manifest=manifest)
    opened = open_model(path, attn, sizes=sizes)
    model = opened.model if isinstance(opened.model, nn.Module) else opened.model.module()
    return Subject(path, model, opened.args, opened.kwargs, opened)


def read_forms(names: Sequence[str], plan: Path | None) -> Any:
    """Return the forms asked for: ``--form`` names, the table in a TOML file, or fused.

    Raises:
        RewriteError: both were given, or the file is no TOML, or a name or value in it is bad.
    """
    from attnc.api import parse_forms

    if plan is None:
        return parse_forms(list(names) or "fused")
    if names:
        raise RewriteError("expected --form or --plan, found both")
    return parse_forms(read_toml(plan))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        RewriteError: it cannot be read, or is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RewriteError(f"plan {path}: expected a TOML file: {e}") from None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the outputs of one model are from another's.

    ``limit`` is twice the first model's own error against fp64 plus one rounding unit, None where nothing was
    promised or no fp64 run was possible; ``cosine`` is the smallest over the last axis of the floating
    outputs.
    """

    outputs: int
    max_error: float
    cosine: float
    limit: float | None
    note: str = ""

    @property
    def within(self) -> bool:
        """Whether the promise is kept."""
        return self.limit is None or self.max_error <= self.limit


def compare(a: Subject, b: Subject, atol: float | None = None) -> Difference:
    """Run two models on the same inputs, those of ``a``, and measure how far apart they are.

    Raises:
        VerifyError: the outputs differ in number, shape, or in which values are finite.
    """
    first, second = _floats(a()), _floats(b.on(a.args, a.kwargs))
    if not first:
        raise VerifyError(f"{a.name}: expected floating tensors among the outputs, found none to compare")
    if [t.shape for t in first] != [t.shape for t in second]:
        shapes = [[list(t.shape) for t in side] for side in (first, second)]
        raise VerifyError(f"{b.name}: expected outputs of shapes {shapes[0]}, found {shapes[1]}")
    for t, u in zip(first, second, strict=True):
        if not torch.equal(t.isfinite(), u.isfinite()):
            raise VerifyError(f"{b.name}: expected finite values where {a.name} has them, found a difference")
    pairs = list(zip(first, second, strict=True))
    cosine = min((_cosine(t, u) for t, u in pairs), default=1.0)
    if atol is not None:
        return Difference(len(pairs), _largest(pairs), cosine, atol, "limit given")
    if b.bounded:
        return Difference(len(pairs), _largest(pairs), cosine, None, "a BOUNDED form promises no limit")
    exact = _in_fp64(a)
    if isinstance(exact, str):
        return Difference(len(pairs), _largest(pairs), cosine, None, f"{exact}; give --atol")
    own = _largest(list(zip(exact, first, strict=True)))
    unit = max((_unit(t) for t in first), default=0.0)
    error = _largest(list(zip(exact, second, strict=True)))
    return Difference(len(pairs), error, cosine, 2 * own + unit, "both against fp64")


def _floats(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output, in order, through containers, mappings and dataclasses."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = [getattr(output, f.name) for f in fields(output)]
    parts = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, (list, tuple))
        else ()
    )
    return [t for part in parts for t in _floats(part)]


def _largest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest absolute difference over finite values."""
    gaps = [(t.double() - u.double()).abs().nan_to_num(0.0, 0.0, 0.0) for t, u in pairs]
    return max((float(g.max()) for g in gaps if g.numel()), default=0.0)


def _cosine(t: torch.Tensor, u: torch.Tensor) -> float:
    """Return the smallest cosine over the last axis; rows that are zero on both sides agree."""
    if t.ndim == 0 or not t.numel():
        return 1.0
    x, y = (v.double().nan_to_num(0.0, 0.0, 0.0) for v in (t, u))
    same = (x == y).all(-1)
    return float(torch.where(same, 1.0, nn.functional.cosine_similarity(x, y, dim=-1)).min())


def _unit(t: torch.Tensor) -> float:
    finite = t[t.isfinite()]
    return float(finite.abs().max()) * torch.finfo(t.dtype).eps if finite.numel() else 0.0


def _in_fp64(subject: Subject) -> list[torch.Tensor] | str:
    """Run a copy of the model in fp64 on the same inputs; a text says why that was not possible."""
    if subject.opened is None:
        return "the original is a saved one"
    double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    args, kwargs = pytree.tree_map(double, (subject.args, subject.kwargs))
    try:
        with torch.no_grad():
            return _floats(copy.deepcopy(subject.model).double()(*args, **kwargs))
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
    ) as e:  # dtypes fixed in the program or the code
        return f"the original has no fp64: {type(e).__name__}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of two models, paired: medians, and the median of the ratios with its quartiles."""

    first_ms: float
    second_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    threads: int


def race(a: Call, b: Call, tick: Callable[[int, int], None] | None = None, rounds: int = ROUNDS) -> Timing:
    """Time two calls in turns, the first to go changing each round, for ``rounds`` or about ``SECONDS``."""
    for _ in range(WARM_UP):
        a(), b()
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(pairs) < rounds and (len(pairs) < 3 or time.perf_counter() - start < SECONDS):
        if len(pairs) % 2:
            late = _seconds(b)
            pairs.append((_seconds(a), late))
        else:
            pairs.append((_seconds(a), _seconds(b)))
        if tick is not None:
            tick(len(pairs), rounds)
    ratios = [x / y for x, y in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    first, second = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return Timing(first, second, statistics.median(ratios), low, high, len(pairs), torch.get_num_threads())


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use ``count`` threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sizes(given: tuple[int, int | None]) -> Sizes:
    """Return the sizes of example inputs from what the command line says."""
    return Sizes(batch=given[0], length=given[1])


def check_output(output: Path, model: str, force: bool) -> None:
    """Check before any work that the output is free and apart from the input.

    Raises:
        CheckpointError: it is not.
    """
    file, colon, _ = model.rpartition(":")
    check_apart(output, file if colon and file.endswith(".py") else model)
    check_free(output, force=force)


def open_source(path: str, attn: str | None, given: tuple[int, int | None], progress: Tick) -> Opened:
    """Open a model as it was before attnc.

    Raises:
        CheckpointError: as ``open_model``, or a directory that attnc saved.
    """
    from attnc.checkpoint import open_model

    if is_saved(path):
        raise CheckpointError(f"opening {path}: expected a model as it was, found one that attnc has saved")
    progress(f"open {Path(path).name}")
    return open_model(path, attn, sizes=sizes(given))


def inspect_model(
    path: str,
    forms: Any,
    attn: str | None,
    target: str | None,
    given: tuple[int, int | None],
    progress: Tick,
    draw: bool = False,
) -> Report:
    """Return the report of a model that is not changed, with regions to be drawn if asked for."""
    from attnc.api import inspect

    opened = open_source(path, attn, given, progress)
    progress("capture")
    return inspect(
        opened.model, opened.args, opened.kwargs, forms=forms, target=target, progress=progress, draw=draw
    )


def optimize_opened(
    opened: Opened,
    forms: Any,
    target: str | None,
    progress: Tick,
    *,
    verify: bool = True,
    cost_model: bool = True,
) -> nn.Module:
    """Optimize a model that was opened from a path, on its example inputs."""
    from attnc.api import optimize, session

    fast = optimize(
        opened.model,
        opened.args,
        opened.kwargs,
        dynamic_shapes=opened.dynamic,
        forms=forms,
        target=target,
        verify=verify,
        cost_model=cost_model,
        progress=progress,
    )
    session(fast).source = opened
    session(fast).report.warnings.extend(opened.warnings)
    return fast


def ready(
    path: str,
    attn: str | None,
    given: tuple[int, int | None],
    forms: Any,
    progress: Tick,
    *,
    with_past: bool = False,
) -> nn.Module:
    """Return an optimized model to write in another form: rewritten now, or loaded as attnc saved it.

    ``with_past`` opens the cache of a decoder (``attnc.past``).
    """
    from attnc import past
    from attnc.checkpoint import load

    if is_saved(path) and not with_past:
        progress(f"load {Path(path).name}")
        return load(path)
    opened = open_source(path, attn, given, progress)
    if with_past:
        progress("open the cache")
        opened.model, opened.kwargs = past.with_past(opened.model, sizes=sizes(given))
        opened.args = ()
    return optimize_opened(opened, forms, None, progress, cost_model=False)


def contestants(
    a: str, b: str | None, attn: str | None, given: Sizes, forms: Any, target: str | None, progress: Tick
) -> tuple[Subject, Subject]:
    """Open two models to race; where one is given, the other is the same, optimized."""
    first = open_subject(a, attn, given)
    if b is not None:
        return first, open_subject(b, attn, given)
    if first.opened is None:
        raise CheckpointError(f"bench {a}: expected a second model to race a saved one with")
    fast = optimize_opened(first.opened, forms, target, progress)
    return first, Subject("attnc", fast, first.args, first.kwargs)


def counter(progress: Tick) -> Callable[[int, int], None]:
    """Return what shows how many rounds of a race are done."""
    return lambda done, total: progress("run", done, total)


def saved_report(path: str) -> Report:
    """Return the report in the manifest of a saved directory."""
    from attnc.checkpoint import report_of

    return report_of(read_manifest(path))


def exported_rows(became: Any) -> list[dict[str, Any]]:
    """Return one row per exported site: its operator, its measured error, and why not an earlier choice."""
    sites = getattr(became, "sites", became)
    return [
        {
            "site": s.id,
            "became": f"{s.domain or 'ai.onnx'}.{s.operator}",
            "fused": s.is_fused,
            "error": s.error,
            "tolerance": s.tolerance,
            "reason": s.reason,
        }
        for s in sites
    ]


def check_tuning() -> None:
    """Check before any work that tiles can be measured here.

    Raises:
        UnsupportedError: there is no GPU.
    """
    from attnc.codegen.triton.tune import check_gpu

    check_gpu()


def emit_kernels(
    fast: nn.Module, output: Path, kinds: Sequence[str], *, force: bool, tune: int | None = None
) -> list[Kernel]:
    """Write the kernels of a model into a folder, with tiles measured here for ``tune`` tokens if given.

    Raises:
        UnsupportedError: no site has a kernel, or there is no GPU to measure on.
    """
    from attnc.api import emit
    from attnc.files import write_directory

    kernels: list[Kernel] = emit(fast, output, kinds=kinds, force=force)
    if tune is not None:
        from attnc.codegen.triton.tune import tuned

        kernels = [tuned(k, tune) for k in kernels]
        with write_directory(output, force=True) as folder:
            for k in kernels:
                (folder / f"{k.name}.py").write_text(k.source, encoding="utf-8")
    return kernels


def kernel_figures(kernels: Sequence[Kernel], progress: Tick) -> list[dict[str, Any]]:
    """Compile each different kernel for every GPU that is known; return registers, shared memory, spills."""
    from attnc.codegen.triton.aot import report_rows

    rows: list[dict[str, Any]] = []
    different = list({k.key: k for k in kernels}.values())
    for i, kernel in enumerate(different):
        progress(f"compile {kernel.name}", i, len(different))
        rows += report_rows(kernel)
    return rows
