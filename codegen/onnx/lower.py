"""Write a site as it was decided: a fused operator, a model-local function, or basic operators in line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnc.codegen.onnx.builder import OURS, Builder
from attnc.codegen.onnx.decompose import decompose
from attnc.codegen.onnx.fused import fuse
from attnc.codegen.onnx.guarded import Functions, Shared, function_name
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import Row

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What a site became: its results (lse from basic operators alone) and the operator."""

    out: ir.Value
    lse: ir.Value | None
    operator: str
    domain: str
    attributes: dict[str, Any]


def lower(
    b: Builder,
    call: Call,
    row: Row | None,
    inputs: Sequence[ir.Value],
    shared: Shared,
    functions: Functions | None,
    opset: int,
) -> Written:
    """Write ``call`` on ``inputs`` (q, k, v, captured); ``functions`` takes new ones, None means in line."""
    if row is not None:
        done = fuse(b, call, row, inputs, shared, functions, opset)
        return Written(done.out, None, done.operator, row.domain or "ai.onnx", done.attributes)
    if functions is None:
        q, k, v, *captured = inputs
        out, lse = decompose(b, call.spec, q, k, v, captured, lse=call.lse_used)
        return Written(out, lse, "basic operators", "ai.onnx", {})
    name = function_name(call, f"lse={call.lse_used}")
    if name not in functions:
        functions[name] = _function(name, call, opset)
    out, *rest = b.ops(name, *inputs, domain=OURS, outputs=1 + call.lse_used, dtype=call.dtype)
    return Written(out, rest[0] if rest else None, name, OURS, {})


def _function(name: str, call: Call, opset: int) -> ir.Function:
    import onnx_ir as ir

    names = ("q", "k", "v", *(o.name for o in call.spec.captured))
    # Types are left out, so a body begins with the casts that the spec's own types ask for.
    inputs = [ir.Value(name=f"in_{n}") for n in names]
    b = Builder("f")
    q, k, v, *captured = inputs
    out, lse = decompose(b, call.spec, q, k, v, captured, lse=call.lse_used)
    outputs = [out] if lse is None else [out, lse]
    graph = ir.Graph(inputs, outputs, nodes=b.nodes, opset_imports={"": opset}, name=name)
    return ir.Function(OURS, name, graph=graph, attributes=[])
