"""Write attention sinks: logits ``[H]`` that take part in the softmax's denominator and have no value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnc.codegen.onnx.builder import Builder
from attnc.codegen.onnx.sites import Call

if TYPE_CHECKING:
    import onnx_ir as ir


def head_sink(b: Builder, call: Call, named: Mapping[str, ir.Value]) -> ir.Value | None:
    """Return the sink logits ``[H]`` in the site's type, or None."""
    sink = call.spec.norm.sink
    if sink is None:
        return None
    if isinstance(sink, str):
        flat = b.op("Reshape", named[sink], b.ints(-1))
        return b.op("Expand", b.cast(flat, call.dtype), b.ints(call.numbers[0]), dtype=call.dtype)
    return b.const([sink] * call.numbers[0], call.dtype)


def sink_column(
    b: Builder, call: Call, sink: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, bias: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Write the sinks as one more key: it scores 0, is biased by the sink, and its value is 0.

    ``softmax([s, z]) [v; 0]`` is ``softmax(s) v`` with ``exp(z)`` more in its denominator, which is the
    meaning of a sink; a softcap leaves a score of 0 as it is.
    """
    pads, zero = b.ints(0, 0, 0, 0, 0, 0, 1, 0), b.const(0.0, call.dtype)
    k, v = (b.op("Pad", x, pads, zero, dtype=call.dtype) for x in (k, v))
    heads, one = b.ints(call.numbers[0]), b.ints(1)
    if bias is None:
        shape = b.op(
            "Concat", one, heads, b.size(q, 2), b.op("Sub", b.op("Shape", k, start=2, end=3), one), axis=0
        )
        bias = b.op("Expand", zero, shape, dtype=call.dtype)
    else:
        ends = (b.op("Shape", bias, start=0, end=1), heads, b.op("Shape", bias, start=2))
        bias = b.op("Expand", bias, b.op("Concat", *ends, axis=0), dtype=call.dtype)
    column = b.op("Reshape", sink, b.ints(1, -1, 1, 1), dtype=call.dtype)
    shape = b.op("Concat", b.op("Shape", bias, start=0, end=3), one, axis=0)
    column = b.op("Expand", column, shape, dtype=call.dtype)
    return k, v, b.op("Concat", bias, column, axis=3, dtype=call.dtype)
