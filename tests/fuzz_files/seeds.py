"""Valid ONNX models from which broken ones are made, and the folder that they lie in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.codegen.onnx.hostile import Node, branching, external, graph, model, numbers, put_outside, value

SECRET = "secret.bin"


def plain() -> onnx.ModelProto:
    return model()


def attention() -> onnx.ModelProto:
    """Return softmax(q k') v with a scale, a mask and projections, as exporters write it."""
    nodes = [
        Node("MatMul", ["x", "wq"], ["q"], name="/attn/q"),
        Node("MatMul", ["x", "wk"], ["k"], name="/attn/k"),
        Node("MatMul", ["x", "wv"], ["v"], name="/attn/v"),
        Node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        Node("MatMul", ["q", "kt"], ["s"]),
        Node("Constant", [], ["scale"], value=numbers("", ())),
        Node("Mul", ["s", "scale"], ["scaled"]),
        Node("Where", ["mask", "scaled", "scale"], ["masked"]),
        Node("Softmax", ["masked"], ["p"], axis=-1),
        Node("MatMul", ["p", "v"], ["y"]),
    ]
    out = graph(nodes, (), ("y",), [numbers(n, (4, 4)) for n in ("wq", "wk", "wv")])
    out.input.extend([value("x", ("b", "s", 4)), value("mask", ("b", "s", "s"), TensorProto.BOOL)])
    out.output[0].CopyFrom(value("y", ("b", "s", 4)))
    out.value_info.append(value("s", ("b", "s", "s")))
    return model(out)


def outside() -> onnx.ModelProto:
    out = external({"location": "w.bin", "offset": "16", "length": "16"})
    second = numbers("w2", (2, 8))
    put_outside(second, {"location": "data/w.bin"}, (2, 8))
    out.graph.initializer.append(second)
    return out


def subgraphs() -> onnx.ModelProto:
    """Return an If whose branches hold an If, and a Loop that carries a value."""
    inner = branching(graph([Node("Neg", ["x"], ["z"])], (), ("z",))).graph.node[0]
    then = graph([inner, Node("Identity", ["y"], ["t"])], (), ("t",))
    other = graph([Node("Abs", ["x"], ["t"])], (), ("t",), [numbers("h")])
    out = branching(then, other)
    body = graph([Node("Identity", ["go"], ["on"]), Node("Add", ["at", "x"], ["to"])], (), ())
    body.input.extend([value("i", (), 7), value("go", (), 9), value("at", None)])
    body.output.extend([value("on", (), 9), value("to", None)])
    out.graph.node.append(Node("Loop", ["", "c", "x"], ["r"], body=body))
    out.graph.output.append(value("r", None))
    return out


def functions() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("ours", 1)]
    node = Node("LeakyRelu", ["t"], ["b"])
    node.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    first = helper.make_function(
        "ours", "F", ["a"], ["b"], [Node("G", ["a"], ["t"], domain="ours"), node], imports, ["slope"]
    )
    second = helper.make_function("ours", "G", ["a"], ["b"], [Node("Neg", ["a"], ["b"])], imports)
    second.attribute_proto.append(helper.make_attribute("k", 3))
    call = Node("F", ["x"], ["y"], domain="ours", slope=0.5)
    return model(graph([call]), functions=[first, second], imports={"ours": 1})


def kinds() -> onnx.ModelProto:
    """Return a model with a tensor of many types, as bytes and as numbers, and attributes of many types."""
    tensors = [
        helper.make_tensor("f16", TensorProto.FLOAT16, [3], [1.0, 2.0, 3.0]),
        helper.make_tensor("bf16", TensorProto.BFLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("i64", TensorProto.INT64, [2, 2], [1, -2, 3, 2**40]),
        helper.make_tensor("u64", TensorProto.UINT64, [2], [1, 2**63]),
        helper.make_tensor("f64", TensorProto.DOUBLE, [2], [1.0, 2.0]),
        helper.make_tensor("c64", TensorProto.COMPLEX64, [2], [1 + 2j, 3 - 1j]),
        helper.make_tensor("b", TensorProto.BOOL, [3], [True, False, True]),
        helper.make_tensor("i4", TensorProto.INT4, [3], [1, -2, 3]),
        helper.make_tensor("f8", TensorProto.FLOAT8E4M3FN, [3], [1, 2, 3]),
        helper.make_tensor("s", TensorProto.STRING, [2], ["a", "bc"]),
        helper.make_tensor("none", TensorProto.FLOAT, [0, 4], []),
    ]
    node = Node("Odd", ["x", *(t.name for t in tensors)], ["y"], domain="acme")
    given = {"f": 1.5, "i": 3, "s": "text", "fs": [1.0, 2.0], "ints": [1, 2, 3], "ss": ["a", "b"]}
    node.attribute.extend(helper.make_attribute(k, v) for k, v in given.items())
    node.attribute.append(helper.make_attribute("t", numbers("t")))
    node.attribute.append(helper.make_attribute("g", graph([Node("Neg", ["x"], ["z"])], (), ("z",))))
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, ["n"]))
    node.attribute.append(helper.make_attribute("tp", sequence))
    out = model(graph([node], initializers=tensors), imports={"acme": 1}, producer_name="seed")
    out.graph.input.append(helper.make_value_info("q", sequence))
    helper.set_model_props(out, {"key": "value", "other": "1"})
    return out


MAKERS = (plain, attention, outside, subgraphs, functions, kinds)


def seeds() -> list[bytes]:
    """Return the bytes of every valid model, the same in each run."""
    return [m().SerializeToString(deterministic=True) for m in MAKERS]


def make_folder(parent: Path) -> Path:
    """Make the folder that models lie in, with their data and traps, beside a file that nobody may open."""
    (parent / SECRET).write_bytes(bytes(range(256)))
    folder = parent / "model"
    (folder / "data").mkdir(parents=True)
    for place in (folder / "w.bin", folder / "data" / "w.bin"):
        place.write_bytes(np.arange(32, dtype=np.float32).tobytes())
    (folder / "link.bin").symlink_to(parent / SECRET)
    (folder / "linked").symlink_to(parent)
    os.mkfifo(folder / "pipe.bin")
    (parent / "other.bin").write_bytes(bytes(256))
    os.link(parent / "other.bin", folder / "hard.bin")
    return folder
