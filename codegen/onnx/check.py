"""Run one site alone in ONNX Runtime and compare it with its executed spec.

Inputs are random and small, with what bites put in: a query that sees no key, an odd length, a length of one,
windows that bind.  So a kernel that differs is found per site, before the model is converted, and the site
falls back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from attnc import expr as E
from attnc.codegen.onnx.builder import MICROSOFT, OURS, Builder, onnx_dtype
from attnc.codegen.onnx.guarded import Functions
from attnc.codegen.onnx.lower import lower
from attnc.codegen.onnx.packing import heads_of, packed, sizes_of
from attnc.codegen.onnx.runtime import Session, failures
from attnc.codegen.onnx.sites import ABSORBS, Call
from attnc.codegen.onnx.table import Row
from attnc.ir import Bias, Operand
from attnc.masks import And, Band, Formula, Mask, Not, Or, Range

if TYPE_CHECKING:
    import onnx_ir as ir


HALF = (torch.float16, torch.bfloat16)
SLACK = 3
"""Two runs in half precision may be so many typical errors apart: one from fp64, and the other twice."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The greatest error of a site beside the tolerance, or the words with which the runtime refused it.

    ``in_float32`` says that not the site was run but the same in float32.
    """

    error: float
    tolerance: float
    refused: str = ""
    in_float32: bool = False

    @property
    def ok(self) -> bool:
        """The site runs and agrees."""
        return not self.refused and self.error <= self.tolerance


def check_site(call: Call, row: Row | None, opset: int) -> Checked:
    """Run ``call`` written as ``row`` says (None: basic operators) at several lengths; see the module.

    The worst case of half precision is wider than what a wrong mask does, so a fused operator has to stay
    within ``SLACK`` typical errors there; basic operators, which have no other choice behind them, have not.
    """
    worst = Checked(0.0, 0.0)
    projects = row is not None and row.projects(call.dtype) and call.is_self
    try:
        for session in [Session(site_model(call, row, opset, p)) for p in (False, True)[: 1 + projects]]:
            for b, sq, sk in _sizes(call):
                for feeds in _feeds(call, b, sq, sk):
                    found = _compare(call, session, feeds, row is not None and call.dtype in HALF)
                    if not found.ok:
                        return found
                    worst = max(worst, found, key=lambda c: c.error)
    except failures() as e:
        return Checked(math.inf, 0.0, str(e).splitlines()[0])
    return worst


def check_in_float32(call: Call, row: Row | None, opset: int) -> Checked:
    """Run the same site in float32: for types that the provider at hand has no kernel for."""
    return replace(check_site(_widened(call, torch.float32), row, opset), in_float32=True)


def _widened(call: Call, dtype: torch.dtype) -> Call:
    """Return the same site with all numbers in another type."""

    def wide(o: Operand) -> Operand:
        return replace(o, dtype=dtype) if o.dtype.is_floating_point else o

    spec = call.spec
    captured = tuple(map(wide, spec.captured))
    spec = replace(spec, q=wide(spec.q), k=wide(spec.k), v=wide(spec.v), captured=captured)
    return replace(call, spec=spec, text=str(spec))


def typical_error(call: Call, feeds: Mapping[str, torch.Tensor]) -> float:
    """Return how far the spec, run in its own type, is from itself in fp64, and a rounding of the result.

    ``tolerance`` bounds the worst case, which in half precision is far from any error seen.
    """
    wide = _widened(call, torch.float64)
    exact = _run(wide, {n: x.double() if x.is_floating_point() else x for n, x in feeds.items()})
    own = (_run(call, feeds).double() - exact).nan_to_num(0.0).abs().max().item()
    return own + torch.finfo(call.dtype).eps * _greatest(exact)


def _run(call: Call, feeds: Mapping[str, torch.Tensor]) -> torch.Tensor:
    q, k, v, *captured = (feeds[o.name] for o in _operands(call))
    return call.spec(q, k, v, tuple(captured))[0]


def site_model(call: Call, row: Row | None, opset: int, projected: bool = False) -> ir.Model:
    """Return a model of the site alone, its inputs named as the spec names them.

    ``projected``: q, k and v come from one tensor by stored matrices, for operators that take those in.
    """
    import onnx_ir as ir

    b, functions = Builder("site"), Functions()
    inputs = []
    for o, shape in zip(
        _operands(call), _shapes(call, "b", "sq", "sq" if call.is_self else "sk"), strict=True
    ):
        inputs.append(ir.Value(name=o.name, type=ir.TensorType(onnx_dtype(o.dtype)), shape=ir.Shape(shape)))
    matrices: list[ir.Value] = []
    values = [*_projected(b, call, inputs[:3], matrices), *inputs[3:]] if projected else inputs
    written = lower(b, call, row, values, {}, functions, opset)
    out = written.out
    out.dtype, out.name = onnx_dtype(call.dtype), "out"
    imports = {"": opset, MICROSOFT: 1, OURS: 1}
    graph = ir.Graph(inputs, [out], nodes=b.nodes, initializers=matrices, opset_imports=imports, name="site")
    return ir.Model(graph, ir_version=10, functions=tuple(functions.values()))


def _projected(
    b: Builder, call: Call, qkv: Sequence[ir.Value], matrices: list[ir.Value]
) -> Iterator[ir.Value]:
    """Yield q, k and v once more, as products of the three side by side with columns of a unit matrix."""
    import onnx_ir as ir

    counts, sizes = heads_of(call), sizes_of(call)
    widths = [n * d for n, d in zip(counts, sizes, strict=True)]
    columns = torch.split(torch.eye(sum(widths), dtype=call.dtype), widths, 1)
    whole = b.op("Concat", *map(partial(packed, b), qkv, counts, sizes), axis=2, dtype=call.dtype)
    for x, n, d, unit in zip(qkv, counts, sizes, columns, strict=True):
        assert x.shape is not None, "inputs have shapes"
        stored = ir.tensor(unit.contiguous(), name=f"{x.name}_weight")
        kind, shape = ir.TensorType(onnx_dtype(call.dtype)), ir.Shape(unit.shape)
        matrices.append(ir.Value(name=stored.name, shape=shape, type=kind, const_value=stored))
        rows = [x.shape[0], x.shape[2]]
        y = b.op("MatMul", whole, matrices[-1], dtype=call.dtype, shape=[*rows, n * d])
        parted = b.op("Reshape", y, b.ints(0, 0, n, d), dtype=call.dtype, shape=[*rows, n, d])
        yield b.op("Transpose", parted, perm=[0, 2, 1, 3], dtype=call.dtype, shape=list(x.shape))


def _operands(call: Call) -> tuple[Operand, ...]:
    return call.spec.q, call.spec.k, call.spec.v, *call.spec.captured


def _shapes(call: Call, b: int | str, sq: int | str, sk: int | str) -> list[list[int | str]]:
    """Return the shapes of all operands with other sizes of batch, queries and keys; an axis of 1 stays 1."""
    h, hkv, dqk, dv = _numbers(call)
    out: list[list[int | str]] = [[b, h, sq, dqk], [b, hkv, sk, dqk], [b, hkv, sk, dv]]
    at: dict[str, int | str] = {"b": b, "h": h, "q": sq, "k": sk}
    for o in call.spec.captured:
        out.append(
            [
                1 if n == 1 else at[a]
                for a, n in zip(o.axes[len(o.axes) - len(o.shape) :], o.shape, strict=True)
            ]
        )
    return out


def _numbers(call: Call) -> tuple[int, int, int, int]:
    """Return (H, Hkv, Dqk, Dv) to try: their own where they are numbers, else small ones."""
    dqk, dv = (n if isinstance(n, int) else 8 for n in call.head_sizes)
    h, hkv = call.heads
    if isinstance(h, int) and isinstance(hkv, int):
        return h, hkv, dqk, dv
    return 2 * call.spec.group_size, 2, dqk, dv


def _sizes(call: Call) -> list[tuple[int, int, int]]:
    """Return (batch, Sq, Sk) to try: past the widest window, of length one, and odd."""
    reach = min(max([0, *_bounds(call.spec.mask)]) + 5, 640)
    if call.is_self:
        return [(2, max(9, reach), max(9, reach)), (1, 1, 1)]
    return [(2, max(9, reach), max(13, reach)), (2, 7, 5), (1, 1, 6)]


def _bounds(mask: Mask) -> list[int]:
    """Return every distance and position that a mask names."""
    if isinstance(mask, And | Or):
        return [n for p in mask.parts for n in _bounds(p)]
    if isinstance(mask, Not):
        return _bounds(mask.part)
    if isinstance(mask, Band):
        return [n for n in (mask.left, mask.right) if n is not None]
    if isinstance(mask, Formula):
        terms = [x for x in E.walk(mask.value) if x.op == "poly"]
        return [2 * abs(n) for x in terms for m, n in E.terms(x) if not m]
    return [mask.lo, mask.hi] if isinstance(mask, Range) else []


def _feeds(call: Call, b: int, sq: int, sk: int) -> Iterator[dict[str, torch.Tensor]]:
    """Return the inputs to try: random ones, and if there are masks, such as hide nothing."""
    given = random_inputs(call, b, sq, sk)
    yield given
    if any(x.dtype == torch.bool for x in given.values()):
        yield {n: torch.ones_like(x) if x.dtype == torch.bool else x for n, x in given.items()}


def random_inputs(call: Call, b: int, sq: int, sk: int) -> dict[str, torch.Tensor]:
    """Return seeded inputs by name.

    Masks hide everything from the first batch element, biases of -inf from its first query.
    """
    g = torch.Generator().manual_seed(b * 1_000_003 + sq * 1009 + sk)
    out, biases = {}, {s.operand for s in call.spec.scores if isinstance(s, Bias)}
    for o, shape in zip(_operands(call), _shapes(call, b, sq, sk), strict=True):
        size = [n for n in shape if isinstance(n, int)]
        if o.dtype == torch.bool:
            x = torch.rand(size, generator=g) > 0.3
            x[(0,) if o.axes.startswith("b") and x.ndim > 1 and size[0] > 1 else (..., 0)] = False
        else:
            x = torch.randn(size, generator=g).to(o.dtype)
            if o.name in biases and x.ndim > 1:
                x[(0,) * (x.ndim - 1)] = -math.inf
        out[o.name] = x
    return out


def _compare(call: Call, session: Session, feeds: Mapping[str, torch.Tensor], typical: bool) -> Checked:
    expected = _run(call, feeds)
    (found,) = session(feeds)
    if found.shape != expected.shape:
        return Checked(math.inf, 0.0, f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if not torch.equal(expected.isnan(), found.isnan()):
        return Checked(math.inf, 0.0, "rows that see no key differ: NaN on one side alone")
    error = (expected.double() - found.double()).nan_to_num(0.0).abs().max().item()
    bound = tolerance(call, feeds)
    return Checked(error, min(bound, SLACK * typical_error(call, feeds)) if typical else bound)


def tolerance(call: Call, feeds: Mapping[str, torch.Tensor]) -> float:
    """Bound the distance of two correct evaluations in the site's type.

    A score is a sum of Dqk products and a few steps, so each side errs by at most ``(Dqk + 8) u A``, where A
    bounds the scores' magnitude; a weight errs by the relative factor ``exp(2 delta) - 1`` and the sum over
    Sk keys by ``(Sk + 4) u``, both times the greatest value.  An added finite fill rounds the scores of a row
    that sees no key to its own last place.
    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    spec, u = call.spec, torch.finfo(call.dtype).eps / 2
    q, k, v = (feeds[o.name].double() for o in (spec.q, spec.k, spec.v))
    k = k.repeat_interleave(call.spec.group_size, 1)
    named = {o.name: feeds[o.name].double() for o in spec.captured}
    s = q.abs() @ k.abs().transpose(-2, -1)
    top = 1.0
    for step in spec.scores:
        s = step.apply(s, named)
        top = max(top, _greatest(s))
    top = max(top, *map(_greatest, named.values())) if named else top
    delta = (q.shape[-1] + 8) * u * top * 2
    fill = spec.fill
    if fill.how == "add" and fill.value > ABSORBS and abs(fill.value) * u < top and call.may_see_nothing():
        delta += 2 * u * abs(fill.value)
    largest = v.abs().max().item()
    return largest * (math.expm1(2 * delta) + 2 * (k.shape[2] + 4) * u) + 2 * u * largest


def _greatest(x: torch.Tensor) -> float:
    """Return the greatest finite magnitude."""
    return x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
