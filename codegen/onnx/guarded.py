"""Write one site in two ways, and let the model choose at run time: is there anything that the mask hides?

Causal attention beside a padding mask has no attribute that is exact: a query before the padding ends may
see no key, and what it gets then is the model's own.  But a padding mask mostly hides nothing, and then the
causal attribute is exact and skips half of the work.  So the site is one model-local function that holds an
``If`` with both operators; what only the second one needs is behind an ``If`` too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnc.codegen.onnx.builder import MICROSOFT, OURS, Builder
from attnc.codegen.onnx.masks import keep
from attnc.codegen.onnx.sites import Call
from attnc.ir import AttentionSpec, Operand
from attnc.masks import Mask

if TYPE_CHECKING:
    import onnx_ir as ir

Shared = dict[tuple[Any, ...], Any]
"""Biases already written, by what they hold: sites with the same mask use one."""

Functions = dict[str, "ir.Function"]
"""Model-local functions already written, by name."""


def function_name(call: Call, detail: str) -> str:
    """Return ``Attention_<digest>``, equal where specs differ in sizes alone: a body reads its sizes."""

    def sizeless(o: Operand) -> Operand:
        return dataclasses.replace(o, shape=())

    spec: AttentionSpec = dataclasses.replace(
        call.spec,
        q=sizeless(call.spec.q),
        k=sizeless(call.spec.k),
        v=sizeless(call.spec.v),
        captured=tuple(map(sizeless, call.spec.captured)),
    )
    return f"Attention_{hashlib.sha256(f'{spec} {detail}'.encode()).hexdigest()[:12]}"


def hides_nothing(
    b: Builder,
    mask: Mask,
    q: ir.Value,
    k: ir.Value,
    named: Mapping[str, ir.Value],
    shared: Shared,
) -> ir.Value:
    """Write a bool scalar: every position is visible under ``mask``.  Sites with the same mask share it."""
    key = ("hides nothing", str(mask), tuple(id(named[o]) for o in mask.operands))
    if key not in shared:
        visible = b.cast(keep(b, mask, q, k, named), torch.int32)
        least = b.op("ReduceMin", b.op("Reshape", visible, b.ints(-1)), b.ints(0), keepdims=0)
        shared[key] = b.cast(least, torch.bool)
    found: ir.Value = shared[key]
    return found


def unless(
    b: Builder, condition: ir.Value, write: Callable[[Builder], ir.Value], dtype: torch.dtype
) -> ir.Value:
    """Write a tensor of rank 4 only if ``condition`` does not hold; else it is a zero ``[1, 1, 1, 1]``."""
    empty, full = Builder(f"{b.prefix}_none"), Builder(f"{b.prefix}_full")
    zero = empty.op("Reshape", empty.const([0.0], dtype), empty.ints(1, 1, 1, 1), dtype=dtype)
    return _if(b, condition, (empty, zero), (full, write(full)), dtype)


def one_of(
    b: Builder,
    name: str,
    operator: str,
    condition: ir.Value,
    inputs: Sequence[ir.Value | None],
    ways: tuple[tuple[Sequence[int], Mapping[str, Any]], tuple[Sequence[int], Mapping[str, Any]]],
    functions: Functions,
    opset: int,
    *,
    outputs: int,
    dtype: torch.dtype,
    shape: Sequence[Any] | None,
) -> ir.Value:
    """Write ``operator`` on ``inputs`` as one function node.

    Each of the two ``ways`` says which inputs it leaves out and its attributes; the first is taken where
    ``condition`` holds.  The function's inputs are the condition and all inputs that are given.
    """
    import onnx_ir as ir

    given = [x for x in inputs if x is not None]
    if name not in functions:
        condition_in, *ins = (ir.Value(name=f"in_{i}") for i in range(len(given) + 1))
        at = iter(ins)
        placed = [None if x is None else next(at) for x in inputs]
        inner, made = Builder("f"), []
        for way, (without, attributes) in zip(("then", "else"), ways, strict=True):
            branch = Builder(f"f_{way}")
            chosen = [None if i in without else x for i, x in enumerate(placed)]
            while chosen and chosen[-1] is None:
                chosen.pop()
            out = branch.op(operator, *chosen, domain=MICROSOFT, outputs=outputs, dtype=dtype, **attributes)
            made.append((branch, out))
        out = _if(inner, condition_in, made[0], made[1], dtype)
        imports = {"": opset, MICROSOFT: 1}
        graph = ir.Graph([condition_in, *ins], [out], nodes=inner.nodes, opset_imports=imports, name=name)
        functions[name] = ir.Function(OURS, name, graph=graph, attributes=[])
    return b.op(name, condition, *given, domain=OURS, dtype=dtype, shape=shape)


def _if(
    b: Builder,
    condition: ir.Value,
    then: tuple[Builder, ir.Value],
    otherwise: tuple[Builder, ir.Value],
    dtype: torch.dtype,
) -> ir.Value:
    import onnx_ir as ir

    def body(part: tuple[Builder, ir.Value]) -> ir.Graph:
        return ir.Graph([], [part[1]], nodes=part[0].nodes, name=part[0].prefix)

    return b.op("If", condition, dtype=dtype, then_branch=body(then), else_branch=body(otherwise))
