"""Compare a written model, run by ONNX Runtime, with the program it came from, call by call (``trials``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnc import logs
from attnc.codegen.onnx.names import input_names
from attnc.codegen.onnx.runtime import Session, failures
from attnc.codegen.onnx.trials import Inputs, at_edges, leaves, masked, other_sizes
from attnc.errors import CodegenError

log = logs.get("codegen")

Reference = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison: the sizes of the first input, the output with the worst error, and its tolerance.

    ``refused`` holds the words with which the runtime gave up, if it did.
    """

    shape: tuple[int, ...]
    output: str
    error: float
    tolerance: float
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Every output agrees."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        if self.refused:
            return f"the run at {sizes}: {self.refused}"
        return f"{self.output} at {sizes}: error {self.error:.1e}, tolerance {self.tolerance:.1e}"


def compare(
    path: Path,
    program: ExportedProgram,
    inputs: Sequence[Inputs],
    reference: Reference | None,
    tolerance: float | None,
) -> list[Parity]:
    """Run the model at ``path`` and the reference on ``inputs``, and at more sizes if sizes are dynamic.

    The reference is by default ``program`` itself.  Of the other sizes, the first that it accepts are run: a
    model that divides a size by a number may refuse half of it, and take twice of it, or another batch alone.

    Raises:
        CodegenError: ONNX Runtime does not load the model, or the inputs are not the program's.
    """
    try:
        session = Session(path)
    except failures() as e:
        raise CodegenError(f"ONNX export: ONNX Runtime refuses the model: {str(e).splitlines()[0]}") from e
    run = reference or program.module()

    def one(call: Inputs, must_run: bool) -> Parity | None:
        return _one(session, program, run, *call, tolerance, must_run)

    found = [one(i, True) for i in inputs]
    if inputs:
        others = (one(i, False) for i in other_sizes(program, *inputs[0]))
        found.append(next(filter(None, others), None))
        found += [one(i, False) for i in at_edges(program, *inputs[0])]
        found += [one(i, False) for i in masked(program, *inputs[0])]
    return [f for f in found if f is not None]


def _one(
    session: Session,
    program: ExportedProgram,
    run: Reference,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float | None,
    must_run: bool,
) -> Parity | None:
    """Compare one call; None if it need not run, and the reference or the captured program fails on it."""
    names, flat = input_names(program), leaves(program, args, kwargs)
    feeds = {n: x for n, x in zip(names, flat, strict=True) if isinstance(x, torch.Tensor)}
    shape = tuple(next(iter(feeds.values())).shape) if feeds else ()
    try:
        with torch.no_grad():
            expected = _tensors(run(*args, **kwargs))
    except Exception as e:  # whatever a model raises at sizes that it was not made for
        if must_run:
            raise
        log.warning("not compared at %s: the model itself fails there: %s", shape, e)
        return None
    try:
        found = session(feeds)
    except failures() as e:
        bound = None if must_run else _refusal(program, args, kwargs)
        if bound is not None:
            log.warning("not compared at %s: file and captured program do not take it: %s", shape, bound)
            return None
        return Parity(shape, "outputs", math.inf, 0.0, str(e).splitlines()[0])
    if len(found) != len(expected):
        raise CodegenError(f"ONNX export: expected {len(expected)} outputs, found {session.outputs}")
    relative = model_tolerance(program) if tolerance is None else 0.0
    worst = Parity(shape, "outputs", 0.0, tolerance or relative)
    for name, a, b in zip(session.outputs, expected, found, strict=True):
        got = Parity(shape, name, difference(a, b), scaled(a, relative) if tolerance is None else tolerance)
        if not got.ok or (worst.ok and got.error > worst.error):
            worst = got
    return worst


def _refusal(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return why the program does not take a call: it was captured for multiples of a chunk, for instance."""
    try:
        with torch.no_grad():
            program.module()(*args, **kwargs)
    except Exception as e:  # a guard that does not hold, or an operation that fails as in the file
        return str(e).splitlines()[0] if str(e) else type(e).__name__
    return None


def _tensors(tree: Any) -> list[torch.Tensor]:
    flat = pytree.tree_leaves(tree)
    parts = [list(x.values()) if isinstance(x, Mapping) else [x] for x in flat]
    return [x for part in parts for x in part if isinstance(x, torch.Tensor)]


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the greatest difference; infinite if shapes, or the places of NaN or of infinities, differ."""
    if expected.shape != found.shape:
        return math.inf
    a, b = expected.detach().cpu().double(), found.double()
    usual = a.isfinite()
    if not torch.equal(usual, b.isfinite()) or not torch.equal(
        a[~usual].nan_to_num(), b[~usual].nan_to_num()
    ):
        return math.inf
    return (a - b)[usual].abs().max().item() if usual.any() else 0.0


def scaled(expected: torch.Tensor, relative: float) -> float:
    """Return the absolute difference that ``relative`` (of fp32) allows for a value; 0 for whole numbers."""
    if not expected.is_floating_point():
        return 0.0
    x = expected.detach().double()
    most = x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0
    scale = torch.finfo(expected.dtype).eps / torch.finfo(torch.float32).eps
    return relative * max(scale, 1.0) * most


def model_tolerance(program: ExportedProgram) -> float:
    """Return the relative error that two correct fp32 runs of the whole program may show.

    Rounding to int8 may fall to the other side in each of L integer linears, which moves a result by about
    one step of 1/127 of its range: ``sqrt(L) / 127`` beside what rounding does (``graph_walk``).
    """
    linears = sum("linear_w8a8" in str(n.target) for n in program.graph.nodes)
    return graph_walk(program.graph) + math.sqrt(linears) / 127


def graph_walk(graph: fx.Graph) -> float:
    """Return the relative error that two correct fp32 runs of a graph may show by rounding.

    Rounding errors add up as a random walk: a node over K terms errs by about ``u sqrt(K)``, N nodes by
    ``sqrt(N)`` times that, and four standard deviations are allowed.
    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, section 2.8.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    widths = [n for node in calls for n in _fixed_sizes(node)]
    return 4 * 2**-24 * math.sqrt(max(widths, default=1)) * math.sqrt(max(len(calls), 1))


def _fixed_sizes(node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    return [int(n) for n in value.shape[-1:] if isinstance(n, int)] if isinstance(value, torch.Tensor) else []
