"""Run an ONNX file and its rewritten self in ONNX Runtime on the same inputs, and compare what they give.

Inputs are made for the graph: whole numbers stay below the tables that they index, other whole numbers and
masks are 0 and 1, with a row padded on the left and one that is hidden whole.  Besides the outputs, the value
of every rewritten site is compared, so that a site that disagrees has a name.  What operators give that ONNX
Runtime does not know is made up, the same for both files.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.export import EXTERNAL_AT
from attnc.codegen.onnx.opening.files import custom_operators
from attnc.codegen.onnx.parity import difference, graph_walk, scaled
from attnc.codegen.onnx.reading import Reading
from attnc.codegen.onnx.reading.symbols import Equal, Multiple, evaluated
from attnc.codegen.onnx.reading.tensors import torch_type
from attnc.codegen.onnx.runtime import Session, failures
from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = dict[str, torch.Tensor]
BATCH = (3, 1, 2)
LENGTHS = ((8, 10, 12, 14), (5, 6, 7, 9), (1,))
"""Sizes of the runs; the last one, of one token, is left out where the original does not run at it."""
OTHER_LENGTHS = (8, 16, 32, 64, 224)
"""Lengths to try for all sizes at once where the original does not run at unequal ones."""
_SEED = 20_240_601
_LEAST_IDS = 2
_CARRIERS = frozenset(
    ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Expand", "Transpose", "Flatten", "Clip")
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one value differs at most, and how far it may; ``sizes`` are those of the inputs."""

    name: str
    error: float
    tolerance: float
    sizes: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """The value agrees."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        at = ", ".join(f"{k}={v}" for k, v in self.sizes.items())
        return f"{self.name}: error {self.error:.1e}, tolerance {self.tolerance:.1e}" + (
            f" at {at}" if at else ""
        )


class Original:
    """The file as it was, with the values of its sites, run once at each of two sizes."""

    def __init__(self, model: ir.Model, reading: Reading, watched: Sequence[str]) -> None:
        """Find sizes at which the model runs and keep what it gives there.

        ``watched`` are names of values besides the outputs.  Of ``reading`` the tolerance is derived, and it
        says which sizes are equal.

        Raises:
            CodegenError: ONNX Runtime refuses the file, or it runs at no size that was tried.
        """
        self.watched = tuple(watched)
        self.walk = graph_walk(reading.graph)
        model = without_strangers(model)
        try:
            session = started(watching(model, watched))
        except failures() as e:
            raise CodegenError(f"ONNX: ONNX Runtime refuses the file: {str(e).splitlines()[0]}") from e
        self.runs: list[tuple[dict[str, int], Feeds, dict[str, torch.Tensor]]] = []
        for which in range(len(BATCH) if free_sizes(model) else 1):
            try:
                self.runs.append(_first_run(session, model, reading.equal, which))
            except CodegenError:
                if which < len(BATCH) - 1:
                    raise
        self.noise = self._own_noise(model)

    def _own_noise(self, model: ir.Model) -> list[dict[str, float]]:
        """Return per run how far each value moves when the runtime evaluates the file without optimizing it.

        Both are correct, so a model that magnifies rounding shows here by how much.
        """
        plain = started(watching(model, self.watched), optimized=False)
        out = []
        for _, feeds, expected in self.runs:
            found = dict(zip(plain.outputs, plain(feeds), strict=True))
            moved = {n: difference(x, found[n]) for n, x in expected.items()}
            out.append({n: e if math.isfinite(e) else 0.0 for n, e in moved.items()})
        return out

    def compare(self, model: ir.Model, *, outputs_only: bool = False) -> list[Agreement]:
        """Run a rewritten model and compare, the watched values first unless only outputs are asked for.

        Raises:
            CodegenError: ONNX Runtime refuses it.
        """
        try:
            watched = () if outputs_only else self.watched
            session = started(watching(without_strangers(model), watched))
            out = []
            for (sizes, feeds, expected), noise in zip(self.runs, self.noise, strict=True):
                found = dict(zip(session.outputs, session(feeds), strict=True))
                names = [*watched, *(n for n in expected if n not in self.watched)]
                out += [_agreement(n, expected[n], found[n], self.walk, noise[n], sizes) for n in names]
            return out
        except failures() as e:
            raise CodegenError(
                f"ONNX: ONNX Runtime refuses the rewritten file: {str(e).splitlines()[0]}"
            ) from e


def _agreement(
    name: str, a: torch.Tensor, b: torch.Tensor, walk: float, noise: float, sizes: Mapping[str, int]
) -> Agreement:
    """Compare two values of one name; four times what the runtime's own two ways differ is allowed too."""
    tolerance = max(scaled(a, walk), 4 * noise) if a.is_floating_point() else 0.0
    return Agreement(name, difference(a, b), tolerance, sizes)


def _first_run(
    session: Session, model: ir.Model, equal: Mapping[str, Equal], which: int
) -> tuple[dict[str, int], Feeds, Feeds]:
    """Run the model at the first sizes at which it runs; return sizes, inputs and outputs."""
    why, errors = "", (*failures(), RuntimeError)
    for free in _sizes(model, which):
        sizes = _with_equal(free, equal)
        feeds = make_feeds(model, sizes)
        try:
            return sizes, feeds, dict(zip(session.outputs, session(feeds), strict=True))
        except errors as e:  # type: ignore[misc]  # a tuple of types
            why = why or str(e).splitlines()[0]
    raise CodegenError(
        f"ONNX: the file itself runs at none of the sizes that were tried, so nothing can be checked: {why}"
    )


def started(model: ir.Model, *, optimized: bool = True) -> Session:
    """Return a session of a copy of a model, whose weights may lie beside its file; it may change."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > EXTERNAL_AT:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
            return Session(path, optimized=optimized)
    return Session(ir.external_data.load_to_model(model), optimized=optimized)


def strangers(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of the graph that ONNX Runtime does not know, and that are no functions of it."""
    unknown = custom_operators(model)
    return [n for n in model.graph if f"{n.domain or 'ai.onnx'}.{n.op_type}" in unknown]


def without_strangers(model: ir.Model) -> ir.Model:
    """Return the model with what unknown operators give as inputs, and what they read as outputs.

    It is returned itself if it has none.

    Raises:
        CodegenError: nothing is known of the type or the shape of what one gives.
    """
    if not strangers(model):
        return model
    copied = model.clone()
    for node in strangers(copied):
        for value in node.outputs:
            if value.dtype is None or value.shape is None:
                raise CodegenError(
                    f"ONNX: {node.domain}.{node.op_type} {node.name} is unknown to ONNX Runtime and the file "
                    f"does not say what {value.name} is, so nothing can be checked; write its type and shape "
                    "down, or rewrite without a check"
                )
            if value.is_graph_output():
                copied.graph.outputs.remove(value)
            given = _again(value)
            value.replace_all_uses_with(given)
            copied.graph.inputs.append(given)
        read = [v for v in node.inputs if v is not None and v.producer() is not None]
        copied.graph.outputs.extend(v for v in read if not v.is_graph_output())
        copied.graph.remove(node, safe=True)
    return copied


def _again(value: ir.Value) -> ir.Value:
    """Return a new value of the same name, type and shape."""
    import onnx_ir as ir

    name, value.name = value.name, f"{value.name}_unknown"
    return ir.Value(name=name, type=value.type, shape=value.shape)


def watching(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of ``model`` that gives the values of these names besides its outputs."""
    copied = model.clone()
    values = {v.name: v for n in copied.graph for v in n.outputs}
    present = {v.name for v in copied.graph.outputs}
    for name in names:
        if name not in present:
            copied.graph.outputs.append(values[name])
    return copied


# ---------------------------------------------------------------- inputs


def _fed(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if v.name not in model.graph.initializers]


def free_sizes(model: ir.Model) -> dict[str, bool]:
    """Return the names of sizes that vary, in order, and whether each is first a batch: the first axis."""
    import ast

    out: dict[str, bool] = {}
    for value in _fed(model):
        for axis, text in _dims(value):
            try:
                names = [n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)]
            except SyntaxError:
                names = [text]
            for name in names or [text]:
                out.setdefault(name, axis == 0)
    return out


def _dims(value: ir.Value) -> Iterator[tuple[int, str]]:
    """Yield axis and text of the sizes of an input that are no numbers."""
    for axis, size in enumerate(value.shape or ()):
        if not isinstance(size, int):
            yield axis, size.value or f"{value.name}_{axis}"


def _sizes(model: ir.Model, which: int) -> Iterator[dict[str, int]]:
    """Yield sizes to try: unequal ones first, then one length for all; see the module."""
    free = free_sizes(model)
    lengths = itertools.cycle(LENGTHS[which])
    yield {name: BATCH[which] if batch else next(lengths) for name, batch in free.items()}
    if LENGTHS[which] == (1,):
        return
    for length in OTHER_LENGTHS:
        yield {name: BATCH[which] if batch else length for name, batch in free.items()}
    for length in OTHER_LENGTHS:
        yield {name: BATCH[which] * 4 if batch else length for name, batch in free.items()}


def _with_equal(sizes: Mapping[str, int], equal: Mapping[str, Equal]) -> dict[str, int]:
    """Return the sizes with those that must be equal, a number or a multiple as they must be."""

    def of(name: str, free: int) -> int:
        other = equal.get(name)
        if isinstance(other, Multiple):
            return other.times * of(other.part, max(1, free // other.times))
        if isinstance(other, str):
            return of(other, sizes.get(other, free))
        return free if other is None else other

    return {name: of(name, size) for name, size in sizes.items()}


def make_feeds(model: ir.Model, sizes: Mapping[str, int]) -> Feeds:
    """Return an input for each name; see the module."""
    g = torch.Generator().manual_seed(_SEED)
    out: Feeds = {}
    for value in _fed(model):
        shape = [n if isinstance(n, int) else _number(n.value or "", sizes) for n in value.shape or ()]
        texts = dict(_dims(value))
        shape = [
            sizes[texts[i]] if n is None and texts.get(i) in sizes else n or 1 for i, n in enumerate(shape)
        ]
        dtype = torch_type(value.dtype)
        if dtype is None:
            raise CodegenError(f"ONNX: input {value.name!r} has a type that torch has not: {value.dtype}")
        assert value.name is not None, "an input has a name"
        out[value.name] = _values(value, shape, dtype, g)  # type: ignore[arg-type]
    return out


def _number(text: str, sizes: Mapping[str, int]) -> int | None:
    try:
        found = evaluated(text, lambda name: sizes[name], {"Max": max, "Min": min})
    except KeyError:
        return None
    return int(found) if found is not None else None


def _values(value: ir.Value, shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point and not _is_inverted(value):
        return torch.randn(shape, generator=g).to(dtype)
    bound = None if dtype.is_floating_point or dtype == torch.bool else _table(value)
    if bound is not None:
        return torch.randint(0, max(bound, 1), shape, generator=g).to(dtype)
    return _mask(shape).to(dtype)


def _mask(shape: Sequence[int]) -> torch.Tensor:
    """Return ones, but for a second row padded on the left and a third one of zeros."""
    out = torch.ones(list(shape))
    if out.dim() >= 2 and shape[0] > 1:
        out[1, ..., : -(-shape[-1] // 3)] = 0
    if out.dim() >= 2 and shape[0] > 2:
        out[2] = 0
    return out


def _is_inverted(value: ir.Value) -> bool:
    """Say whether a float input is a mask of 0 and 1: ``1 - x`` is computed from it."""
    stack, seen = [value], set[Any]()
    while stack:
        v = stack.pop()
        seen.add(v)
        for node in v.consumers():
            if node.op_type == "Sub" and node.inputs[1] is v and node.inputs[0] is not None:
                return True
            if node.op_type in _CARRIERS and node.inputs[0] is v:
                stack += [o for o in node.outputs if o not in seen]
    return False


def _table(value: ir.Value) -> int | None:
    """Return how many rows the smallest table has that the input indexes, None if it indexes none."""
    stack, seen = [(value, 0)], set[Any]()
    found: list[int] = []
    while stack:
        v, above = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        for node in v.consumers():
            rows = _rows(node, v)
            if rows is not None:
                found.append(rows - above)
            elif node.op_type in _CARRIERS and node.inputs[0] is v:
                stack += [(o, above) for o in node.outputs]
            elif node.op_type in ("Add", "Where", "Mul"):
                stack += [(o, above + _constant_beside(node, v)) for o in node.outputs]
    return max(min(found), _LEAST_IDS) if found else None


def _rows(node: ir.Node, places: ir.Value) -> int | None:
    """Return the size of the axis that ``node`` indexes by ``places``, None if it does not."""
    if node.op_type not in ("Gather", "GatherElements") or node.inputs[1] is not places:
        return None
    data, axis = node.inputs[0], node.attributes.get("axis")
    shape = None if data is None else data.shape
    if shape is None and data is not None and data.const_value is not None:
        shape = data.const_value.shape  # type: ignore[assignment]
    if shape is None:
        return None
    rows = shape[0 if axis is None else axis.as_int()]
    return rows if isinstance(rows, int) else None


def _constant_beside(node: ir.Node, v: ir.Value) -> int:
    """Return the greatest number that ``node`` adds, 0 if it adds none that is known."""
    most = 0
    for other in node.inputs:
        stored: Any = None if other is None or other is v else other.const_value
        if stored is not None and stored.size and node.op_type == "Add":
            most = max(most, math.ceil(float(stored.numpy().max())))
    return most
