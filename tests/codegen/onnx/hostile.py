"""Small valid ONNX models, and the bytes of broken ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

Node = helper.make_node


def value(
    name: str, shape: Sequence[int | str | None] | None = ("n", 4), kind: int = 1
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def numbers(name: str, shape: Sequence[int] = (4,)) -> onnx.TensorProto:
    """Return float zeros as bytes."""
    n = 1
    for d in shape:
        n *= d
    return helper.make_tensor(name, 1, shape, bytes(4 * n), raw=True)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes), "g", [value(i) for i in inputs], [value(o) for o in outputs], list(initializers)
    )


def model(graph_: onnx.GraphProto | None = None, **words: Any) -> onnx.ModelProto:
    """Return a model of a graph, one of two nodes and a weight by default, at opset 21."""
    imports = {"": 21} | words.pop("imports", {})
    functions = words.pop("functions", ())
    return helper.make_model(
        graph_
        or graph([Node("Add", ["x", "w"], ["a"]), Node("Relu", ["a"], ["y"])], initializers=[numbers("w")]),
        opset_imports=[helper.make_opsetid(d, v) for d, v in imports.items()],
        ir_version=10,
        functions=list(functions),
        **words,
    )


def branching(then: onnx.GraphProto, other: onnx.GraphProto | None = None) -> onnx.ModelProto:
    """Return a model whose result is that of an If: two subgraphs without inputs."""
    node = Node("If", ["c"], ["y"], then_branch=then, else_branch=other or then)
    outer = graph([node])
    outer.input.append(value("c", (), 9))
    return model(outer)


def external(
    entries: dict[str, str] | Sequence[tuple[str, str]], shape: Sequence[int] = (4,)
) -> onnx.ModelProto:
    """Return a model whose weight lies outside, as ``entries`` say."""
    out = model()
    put_outside(out.graph.initializer[0], entries, shape)
    return out


def put_outside(
    tensor: onnx.TensorProto, entries: dict[str, str] | Sequence[tuple[str, str]], shape: Sequence[int] = (4,)
) -> None:
    tensor.ClearField("raw_data")
    tensor.dims[:] = shape
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in entries.items() if isinstance(entries, dict) else entries:
        tensor.external_data.add(key=key, value=text)


def stored(folder: Path, what: onnx.ModelProto | bytes, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(what if isinstance(what, bytes) else what.SerializeToString())
    return path


def varint(n: int) -> bytes:
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def message(number: int, body: bytes, length: int | None = None) -> bytes:
    """Return a field of a message that says its length, the true one unless ``length`` is given."""
    return varint(number << 3 | 2) + varint(len(body) if length is None else length) + body
