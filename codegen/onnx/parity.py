"""Compare a written model, run by ONNX Runtime, with the program it came from, at several sizes.

A model with a past is also run with an empty one and with one new position (``lengths``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnc import logs
from attnc.codegen.onnx.lengths import edges
from attnc.codegen.onnx.names import input_names, input_nodes
from attnc.codegen.onnx.runtime import Session, failures
from attnc.errors import CodegenError

log = logs.get("codegen")

OTHER = (0.5, 2.0)
"""The other sizes to try, times those of the example; the first at which the model itself runs."""

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
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

    The reference is by default ``program`` itself.  Of the other sizes, what it does not accept is not run:
    a model that divides a size by a number may refuse half of it, and take twice of it.

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
        others = (other_size(program, *inputs[0], times) for times in OTHER)
        found.append(next(filter(None, (one(i, False) for i in others if i is not None)), None))
        found += [one(i, False) for i in _at_edges(program, *inputs[0])]
    return [f for f in found if f is not None]


def by_name(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Return a call with those positional inputs by name that the program was captured with by name."""
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    first, keys = children[0], [k for k in children[1].context if k not in kwargs]
    count = first.num_children if hasattr(first, "num_children") else len(first.children_specs)
    left = args[:count] + args[count + len(keys) :]
    return left, {**dict(zip(keys, args[count:], strict=False)), **kwargs}


def leaves(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flatten a call as the program does; keywords may come in any order.

    Raises:
        CodegenError: another structure than the program was exported with.
    """
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    keys = list(children[1].context)
    if set(keys) != set(kwargs):
        raise CodegenError(f"ONNX export: expected the keywords {keys} in check inputs, found {list(kwargs)}")
    flat, found = pytree.tree_flatten((tuple(args), {k: kwargs[k] for k in keys}))
    if len(flat) != spec.num_leaves:
        raise CodegenError(f"ONNX export: expected check inputs of structure {spec}, found {found}")
    return flat


def other_size(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any], times: float = 0.5
) -> Inputs | None:
    """Return the same call at other sizes, about ``times`` each (and another one); None if all are fixed.

    Values are those of the given inputs, so ids stay ids.
    """
    flat = leaves(program, args, kwargs)
    sizes = _sizes(program, flat)
    for symbol, size in sizes.items():
        least, most = _range(program, symbol)
        half = size // 2 + 1 if size > 2 else size + 1
        wanted = half if times < 1 else int(size * times)
        sizes[symbol] = int(min(max(wanted, least), most))
    return _call(program, flat, sizes, args, kwargs) if sizes else None


def _at_edges(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Inputs]:
    """Yield the call with an empty past, and with one new position, if there is a past."""
    flat = leaves(program, args, kwargs)
    for sizes in edges(program, _sizes(program, flat)):
        yield _call(program, flat, sizes, args, kwargs)


def _sizes(program: ExportedProgram, flat: Sequence[Any]) -> dict[Any, int]:
    """Return the size of each symbol that is an axis of an input."""
    sizes = dict[Any, int]()
    for node, x in zip(input_nodes(program), flat, strict=True):
        for symbol, size in _symbols(node, x):
            sizes.setdefault(symbol, size)
    return sizes


def _call(
    program: ExportedProgram,
    flat: Sequence[Any],
    sizes: Mapping[Any, int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Inputs:
    """Return the call with its tensors cut or repeated to ``sizes``."""
    resized = [_resized(n, x, sizes) for n, x in zip(input_nodes(program), flat, strict=True)]
    order = {k: kwargs[k] for k in _program_order(program, list(kwargs))}
    _, spec = pytree.tree_flatten((tuple(args), order))
    new_args, new_kwargs = pytree.tree_unflatten(resized, spec)
    return new_args, new_kwargs


def _program_order(program: ExportedProgram, keys: Sequence[str]) -> list[str]:
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return [k for k in children[1].context if k in keys]


def _symbols(node: fx.Node, x: Any) -> Iterator[tuple[Any, int]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and isinstance(x, torch.Tensor):
        for traced, size in zip(value.shape, x.shape, strict=True):
            if isinstance(traced, torch.SymInt) and traced.node.expr.is_symbol:
                yield traced.node.expr, size


def _range(program: ExportedProgram, symbol: Any) -> tuple[int, float]:
    """Return the least and greatest size that the program accepts for ``symbol``."""
    found = program.range_constraints.get(symbol)
    if found is None:
        return 1, math.inf
    most = math.inf if not found.upper.is_finite or found.upper > 2**31 else int(found.upper)
    return max(1, int(found.lower)), most


def _resized(node: fx.Node, x: Any, sizes: Mapping[Any, int]) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(x, torch.Tensor):
        return x
    for axis, traced in enumerate(value.shape):
        if isinstance(traced, torch.SymInt):
            size = int(traced.node.expr.subs(sizes))
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def _one(
    session: Session,
    program: ExportedProgram,
    run: Reference,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float | None,
    must_run: bool,
) -> Parity | None:
    """Compare one call; None if the reference fails on it and need not run."""
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
