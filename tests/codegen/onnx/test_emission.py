"""Each call that a rewrite makes, written as ONNX, gives in ONNX Runtime what it gives in torch."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from attnc.codegen.onnx.builder import Builder, onnx_dtype
from attnc.codegen.onnx.emission import TENSORS, Emission
from attnc.codegen.onnx.runtime import Session
from attnc.errors import CodegenError

aten = torch.ops.aten
FLOATS = torch.arange(24.0).reshape(2, 3, 4) - 11
INTS = torch.arange(-12, 12).reshape(2, 3, 4)
BOOLS = INTS % 3 == 0
Body = Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]


def rows(g: fx.Graph, x: fx.Node) -> fx.Node:
    return g.call_function(aten.sym_size.int, (x, 1))


CASES: dict[str, tuple[torch.Tensor, Body]] = {
    "clone": (FLOATS, lambda g, x, y: g.call_function(aten.clone.default, (x,))),
    "reshape": (FLOATS, lambda g, x, y: g.call_function(aten.reshape.default, (x, [2, 3, 2, 2]))),
    "reshape-by-size": (FLOATS, lambda g, x, y: g.call_function(aten.reshape.default, (x, [8, rows(g, x)]))),
    "reshape-by-product": (
        FLOATS,
        lambda g, x, y: g.call_function(
            aten.reshape.default, (x, [g.call_function(operator.mul, (2, rows(g, x))), 4])
        ),
    ),
    "permute": (FLOATS, lambda g, x, y: g.call_function(aten.permute.default, (x, [2, 0, 1]))),
    "expand": (FLOATS, lambda g, x, y: g.call_function(aten.expand.default, (x, [5, 2, rows(g, x), 4]))),
    "select": (FLOATS, lambda g, x, y: g.call_function(aten.select.int, (x, 1, 2))),
    "slice": (FLOATS, lambda g, x, y: g.call_function(aten.slice.Tensor, (x, 2, 1, rows(g, x)))),
    "cat": (FLOATS, lambda g, x, y: g.call_function(aten.cat.default, ([x, y], 1))),
    "arange": (FLOATS, lambda g, x, y: g.call_function(aten.arange.default, (rows(g, x),))),
    "full-bool": (
        FLOATS,
        lambda g, x, y: g.call_function(aten.full.default, ([1, 1], True), {"dtype": torch.bool}),
    ),
    "full-of-a-size": (
        FLOATS,
        lambda g, x, y: g.call_function(aten.full.default, ([1, 1], rows(g, x)), {"dtype": torch.int64}),
    ),
    "zeros": (
        FLOATS,
        lambda g, x, y: g.call_function(aten.zeros.default, ([2, rows(g, x)],), {"dtype": torch.float32}),
    ),
    "to": (INTS, lambda g, x, y: g.call_function(aten.to.dtype, (x, torch.float32))),
    "mul": (FLOATS, lambda g, x, y: g.call_function(aten.mul.Tensor, (x, y))),
    "mul-number": (FLOATS, lambda g, x, y: g.call_function(aten.mul.Tensor, (x, 0.5))),
    "mul-scalar": (INTS, lambda g, x, y: g.call_function(aten.mul.Scalar, (x, 3))),
    "add": (FLOATS, lambda g, x, y: g.call_function(aten.add.Tensor, (x, y))),
    "add-a-size": (INTS, lambda g, x, y: g.call_function(aten.add.Scalar, (x, rows(g, x)))),
    "le": (INTS, lambda g, x, y: g.call_function(aten.le.Scalar, (x, 2))),
    "eq": (INTS, lambda g, x, y: g.call_function(aten.eq.Scalar, (x, 2))),
    "ne": (INTS, lambda g, x, y: g.call_function(aten.ne.Scalar, (x, 2))),
    "and": (BOOLS, lambda g, x, y: g.call_function(aten.bitwise_and.Tensor, (x, y))),
    "or": (BOOLS, lambda g, x, y: g.call_function(aten.bitwise_or.Tensor, (x, y))),
    "not": (BOOLS, lambda g, x, y: g.call_function(aten.bitwise_not.default, (x,))),
    "where": (
        INTS,
        lambda g, x, y: g.call_function(aten.where.self, (g.call_function(aten.le.Scalar, (x, 2)), x, y)),
    ),
    "remainder-of-negative": (INTS, lambda g, x, y: g.call_function(aten.remainder.Scalar, (x, 5))),
    "floor-of-negative": (
        INTS,
        lambda g, x, y: g.call_function(aten.div.Scalar_mode, (x, 5), {"rounding_mode": "floor"}),
    ),
}


def graph_of(x: torch.Tensor, body: Body) -> tuple[fx.Graph, fx.Node]:
    """Return a graph of ``body`` on two inputs, its values traced at a free second size."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    source = ConstantSource("n")
    symbol = env.create_symbol(x.shape[1], source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = env.create_symintnode(symbol, hint=x.shape[1], source=source)
    g, mode = fx.Graph(), FakeTensorMode(shape_env=env)
    inputs = [g.placeholder(n) for n in "xy"]
    with mode:
        for p in inputs:
            p.meta["val"] = torch.empty([2, size, 4], dtype=x.dtype)  # type: ignore[list-item]
        out = body(g, *inputs)
        for n in g.nodes:
            if n.op == "call_function":
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: a.meta["val"])
                n.meta["val"] = n.target(*args, **kwargs)
    return g, out


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_computes_the_same(name: str) -> None:
    x, body = CASES[name]
    g, out = graph_of(x, body)
    values = {
        n: ir.Value(name=n, type=ir.TensorType(onnx_dtype(x.dtype)), shape=ir.Shape([2, "n", 4]))
        for n in "xy"
    }
    emission = Emission(Builder("new"), dict(values), {}, {})
    for n in g.nodes:
        if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor):
            emission.write(n)
    result = emission.values[out.name]
    if result in values.values():
        result = emission.b.op("Identity", result)
    result.dtype = onnx_dtype(out.meta["val"].dtype)
    graph = ir.Graph(
        list(values.values()), [result], nodes=emission.b.nodes, opset_imports={"": 18}, name="g"
    )
    feeds = {"x": x, "y": x.flip(1)}
    (found,) = Session(ir.Model(graph, ir_version=8))(feeds)
    g.output(out)
    expected: Any = fx.Interpreter(fx.GraphModule({}, g)).run(*feeds.values())
    torch.testing.assert_close(found, expected)


def test_every_call_has_a_case() -> None:
    tried = {n.target for x, body in CASES.values() for n in graph_of(x, body)[0].nodes}
    assert tried >= set(TENSORS)


def test_a_call_that_no_rewrite_makes_is_refused() -> None:
    g, _ = graph_of(FLOATS, lambda g, x, y: g.call_function(aten.exp.default, (x,)))
    emission = Emission(Builder("new"), {}, {}, {})
    with pytest.raises(CodegenError, match="expected a call that a rewrite makes"):
        emission.write(next(n for n in g.nodes if n.op == "call_function"))
