"""Inputs made for a file: ids below their tables, masks with padded rows, sizes that must be equal."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch

from attnc.codegen.onnx.agreement import Original, make_feeds
from attnc.codegen.onnx.reading import read
from attnc.errors import CodegenError


def model_of(inputs: str, body: str, out: str = "float[N,4] out") -> ir.Model:
    header = '<ir_version: 8, opset_import: ["" : 18, "other" : 1]>'
    return ir.serde.deserialize_model(
        onnx.parser.parse_model(f"{header} g ({inputs}) => ({out}) {{ {body} }}")
    )


def test_ids_stay_below_the_smallest_table_they_index() -> None:
    body = "i = Cast<to=7>(ids) a = Gather(big, i) b = Gather(small, i) out = Add(a, b)"
    model = model_of("int32[B,S] ids, float[99,4] big, float[7,4] small", body, "float[B,S,4] out")
    ids = make_feeds(model, {"B": 3, "S": 50})["ids"]
    assert ids.dtype == torch.int32
    assert int(ids.min()) >= 0
    assert 4 <= int(ids.max()) < 7


def test_a_number_that_is_added_to_ids_is_taken_off_the_bound() -> None:
    model = model_of(
        "int64[B,S] ids, float[9,4] t", "c = Constant<value_int=0>() i = Add(ids, two) out = Gather(t, i)"
    )
    two = ir.tensor(torch.tensor(2), name="two")
    value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == "two")
    value.const_value = two
    model.graph.register_initializer(value)
    assert int(make_feeds(model, {"B": 3, "S": 50})["ids"].max()) < 7


def test_numbers_that_index_nothing_are_a_mask_with_a_padded_and_a_hidden_row() -> None:
    model = model_of("int64[B,S] mask", "out = Cast<to=1>(mask)", "float[B,S] out")
    mask = make_feeds(model, {"B": 3, "S": 6})["mask"]
    assert mask.tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6]


def test_float_that_is_taken_from_one_is_a_mask_too() -> None:
    model = model_of(
        "float[B,S] mask", "c = Constant<value_float=1.0>() out = Sub(c, mask)", "float[B,S] out"
    )
    assert set(make_feeds(model, {"B": 3, "S": 6})["mask"].unique().tolist()) == {0.0, 1.0}


def test_sizes_that_must_be_equal_are_tried_equal() -> None:
    model = model_of("float[S,4] x, float[T,4] y", "out = Add(x, y)", "float[S,4] out")
    original = Original(model, read(model), ())
    assert all(sizes["S"] == sizes["T"] for sizes, _, _ in original.runs)
    assert len({sizes["S"] for sizes, _, _ in original.runs}) > 1


def test_sizes_that_must_be_multiples_are_tried_as_such() -> None:
    body = (
        "s = Shape(x) i = Constant<value_ints=[0]>() j = Constant<value_ints=[1]>() b = Gather(s, i)"
        " n = Gather(s, j) e = Constant<value_ints=[8]>() t = Div(n, e) to = Concat<axis=0>(b, t, e)"
        " out = Reshape(x, to)"
    )
    model = model_of("float[B,S] x", body, "float[B,T,8] out")
    original = Original(model, read(model), ())
    assert original.runs
    assert all(sizes["S"] % 8 == 0 for sizes, _, _ in original.runs)


def test_a_changed_model_is_told_from_the_original() -> None:
    model = model_of("float[S,4] x", "out = Exp(x)", "float[S,4] out")
    original = Original(model, read(model), ())
    assert all(a.ok for a in original.compare(model))
    other = model_of("float[S,4] x", "out = Tanh(x)", "float[S,4] out")
    assert not any(a.ok for a in original.compare(other))


def test_unknown_operator_without_a_shape_is_one_clear_error() -> None:
    model = model_of("float[S,4] x", "y = other.Thing(x) out = Exp(y)", "float[S,4] out")
    with pytest.raises(CodegenError, match=r"other.Thing .*does not say what y is"):
        Original(model, read(model), ())
