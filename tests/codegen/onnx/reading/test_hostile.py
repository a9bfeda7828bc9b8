"""Files that are valid and yet made to exhaust who reads them: read in no time, or refused in one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnc.errors import AttncError
from attnc.onnx_file import inspect_onnx
from tests.codegen.onnx.hostile import Node, graph, model, stored, value

SECONDS = 8.0
"""Far more than any of these takes; what they were made to take has no end."""


def integers(name: str, *values: int, shape: tuple[int, ...] | None = None) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64).reshape(shape or (len(values),)), name)


def with_sizes(*names: str | int) -> onnx.ModelProto:
    """Return a model that multiplies an input of these sizes by its own transpose."""
    perm = [*range(len(names) - 2), len(names) - 1, len(names) - 2]
    out = graph([Node("Transpose", ["x"], ["t"], perm=perm), Node("MatMul", ["x", "t"], ["y"])])
    out.input[0].CopyFrom(value("x", names))
    out.output[0].CopyFrom(value("y", None))
    return model(out)


def long_range() -> onnx.ModelProto:
    stored_ = [integers("a", 0, shape=()), integers("b", 2**60, shape=()), integers("c", 1, shape=())]
    nodes = [Node("Range", ["a", "b", "c"], ["r"]), Node("Cast", ["r"], ["y"], to=1)]
    return model(graph(nodes, initializers=stored_))


def squares() -> onnx.ModelProto:
    """Square 3, and the length of an axis, two hundred times."""
    nodes = [
        Node("Shape", ["x"], ["s0"]),
        *(Node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(200)),
    ]
    nodes += [Node("Mul", [f"t{i}", f"t{i}"], [f"t{i + 1}"]) for i in range(200)]
    nodes += [Node("Add", ["s200", "t200"], ["u"]), Node("Cast", ["u"], ["y"], to=1)]
    return model(graph(nodes, initializers=[integers("t0", 3, 3)]))


def broadcasts() -> onnx.ModelProto:
    """Four vectors of 200 along four axes: more than a billion elements."""
    shapes = [tuple(200 if i == j else 1 for j in range(4)) for i in range(4)]
    given = [integers(f"v{i}", *range(200), shape=s) for i, s in enumerate(shapes)]
    nodes = [Node("Max", [t.name for t in given], ["m"]), Node("Cast", ["m"], ["y"], to=1)]
    return model(graph(nodes, initializers=given))


def large_constant() -> onnx.ModelProto:
    fill = helper.make_tensor("f", TensorProto.INT64, [1], [1])
    nodes = [Node("ConstantOfShape", ["n"], ["c"], value=fill), Node("Cast", ["c"], ["y"], to=1)]
    return model(graph(nodes, initializers=[integers("n", 2**30, 2**30)]))


def odd_norm() -> onnx.ModelProto:
    """onnx's own inference of such a node ends the process."""
    out = graph([Node("LayerNormalization", ["x", "w", "w"], ["y", "z"], axis=2**31, stash_type=3)])
    out.input.append(value("w", (4,)))
    return model(out)


def deep_scopes() -> onnx.ModelProto:
    out = model()
    text = "[" * 100_000
    out.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    out.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="-" * 100_000 + "1")
    return out


@pytest.mark.parametrize(
    "make",
    [long_range, squares, broadcasts, large_constant, odd_norm, deep_scopes],
)
def test_what_would_take_all_memory_or_time_is_left_alone(
    make: Callable[[], onnx.ModelProto], tmp_path: Path
):
    path = stored(tmp_path, make())
    start = time.monotonic()
    assert inspect_onnx(path).sites == []
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (tuple(f"n{i}" for i in range(40)), ""),
        (("9" * 30, 4), "expected input 'x' to have the sizes of a tensor"),
        (("5 - 9", 4), "expected input 'x' to have the sizes of a tensor"),
        (("n\0m", 4), ""),
        (("n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n*n", 4), ""),
        (("-" * 200 + "n", 4), ""),
    ],
    ids=range(6),
)
def test_odd_sizes_are_read_or_refused(names: tuple[str | int, ...], words: str, tmp_path: Path):
    path = stored(tmp_path, with_sizes(*names))
    start, said = time.monotonic(), ""
    try:
        assert inspect_onnx(path).sites == []
    except AttncError as e:
        said = str(e)
    assert time.monotonic() - start < SECONDS
    assert words in said
    assert bool(words) == bool(said)
    assert "\n" not in said
