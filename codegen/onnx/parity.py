"""Compare a written model, run by ONNX Runtime, with the program it came from, at several sizes."""

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

from attnc.codegen.onnx.names import input_nodes
from attnc.codegen.onnx.runtime import Session, failures
from attnc.errors import CodegenError

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
Reference = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison: the sizes of the first input, the output with the worst error, and its tolerance."""

    shape: tuple[int, ...]
    output: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Every output agrees."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.output} at {sizes}: error {self.error:.1e}, tolerance {self.tolerance:.1e}"


def compare(
    path: Path,
    program: ExportedProgram,
    inputs: Sequence[Inputs],
    reference: Reference | None,
    tolerance: float | None,
) -> list[Parity]:
    """Run the model at ``path`` and the reference on ``inputs``, and at a second size if sizes are dynamic.

    The reference is by default ``program`` itself.

    Raises:
        CodegenError: ONNX Runtime refuses the model, or the inputs are not the program's.
    """
    try:
        session = Session(path)
        run = reference or program.module()
        return [
            _one(session, program, run, args, kwargs, tolerance) for args, kwargs in _all(program, inputs)
        ]
    except failures() as e:
        raise CodegenError(f"ONNX export: ONNX Runtime refuses the model: {str(e).splitlines()[0]}") from e


def _all(program: ExportedProgram, inputs: Sequence[Inputs]) -> Iterator[Inputs]:
    yield from inputs
    second = other_size(program, *inputs[0]) if inputs else None
    if second is not None:
        yield second


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


def other_size(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs | None:
    """Return the same call at other sizes, about half of each (or one more); None if all are fixed.

    Values are those of the given inputs, so ids stay ids.
    """
    flat = leaves(program, args, kwargs)
    nodes, sizes = input_nodes(program), dict[Any, int]()
    for node, x in zip(nodes, flat, strict=True):
        for symbol, size in _symbols(node, x):
            least, most = _range(program, symbol)
            half = size // 2 + 1 if size > 2 else size + 1
            sizes.setdefault(symbol, int(min(max(half, least), most)))
    if not sizes:
        return None
    for i, (node, x) in enumerate(zip(nodes, flat, strict=True)):
        flat[i] = _resized(node, x, sizes)
    keys = list(kwargs)
    _, spec = pytree.tree_flatten((tuple(args), {k: kwargs[k] for k in _program_order(program, keys)}))
    new_args, new_kwargs = pytree.tree_unflatten(flat, spec)
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
) -> Parity:
    nodes, flat = input_nodes(program), leaves(program, args, kwargs)
    feeds = {n.name: x for n, x in zip(nodes, flat, strict=True) if isinstance(x, torch.Tensor)}
    with torch.no_grad():
        expected = _tensors(run(*args, **kwargs))
    found = session(feeds)
    shape = tuple(next(iter(feeds.values())).shape) if feeds else ()
    if len(found) != len(expected):
        raise CodegenError(f"ONNX export: expected {len(expected)} outputs, found {session.outputs}")
    relative = model_tolerance(program) if tolerance is None else 0.0
    worst = Parity(shape, "outputs", 0.0, tolerance or relative)
    for name, a, b in zip(session.outputs, expected, found, strict=True):
        got = Parity(shape, name, _error(a, b), _allowed(a, relative, tolerance))
        if not got.ok or (worst.ok and got.error > worst.error):
            worst = got
    return worst


def _tensors(tree: Any) -> list[torch.Tensor]:
    flat = pytree.tree_leaves(tree)
    parts = [list(x.values()) if isinstance(x, Mapping) else [x] for x in flat]
    return [x for part in parts for x in part if isinstance(x, torch.Tensor)]


def _error(expected: torch.Tensor, found: torch.Tensor) -> float:
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


def _allowed(expected: torch.Tensor, relative: float, absolute: float | None) -> float:
    if absolute is not None:
        return absolute
    if not expected.is_floating_point():
        return 0.0
    x = expected.detach().double()
    most = x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0
    scale = torch.finfo(expected.dtype).eps / torch.finfo(torch.float32).eps
    return relative * max(scale, 1.0) * most


def model_tolerance(program: ExportedProgram) -> float:
    """Return the relative error that two correct fp32 runs of the whole graph may show.

    Rounding errors add up as a random walk: a node over K terms errs by about ``u sqrt(K)``, N nodes by
    ``sqrt(N)`` times that, and four standard deviations are allowed.  Rounding to int8 may fall to the other
    side in each of L integer linears, which moves a result by about one step of 1/127 of its range: ``sqrt(L)
    / 127``.
    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, section 2.8.
    """
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    widths = [n for node in calls for n in _fixed_sizes(node)]
    walk = 4 * 2**-24 * math.sqrt(max(widths, default=1)) * math.sqrt(max(len(calls), 1))
    linears = sum("linear_w8a8" in str(n.target) for n in calls)
    return walk + math.sqrt(linears) / 127


def _fixed_sizes(node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    return [int(n) for n in value.shape[-1:] if isinstance(n, int)] if isinstance(value, torch.Tensor) else []
