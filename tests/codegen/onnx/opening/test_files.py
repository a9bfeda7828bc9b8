"""Hostile ONNX files are refused with one clear error, and no library ever follows what they say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnc.codegen.onnx.opening import wire
from attnc.codegen.onnx.opening.files import custom_operators, open_model
from attnc.errors import CheckpointError
from tests.codegen.onnx.hostile import (
    Node,
    branching,
    external,
    graph,
    message,
    model,
    numbers,
    put_outside,
    stored,
    value,
    varint,
)
from tests.fuzz_files.watch import trespasses, watched

Change = Callable[[onnx.ModelProto], None]
WEIGHT = {"location": "w.bin", "offset": "8", "length": "16"}


def refusal(path: Path) -> str:
    """Open a file that has to be refused; return the message after checking that nothing else happened."""
    before = sorted(p.name for p in path.parent.iterdir())
    with watched() as seen, pytest.raises(CheckpointError) as caught:
        open_model(path)
    assert trespasses(seen, path.parent) == []
    assert sorted(p.name for p in path.parent.iterdir()) == before
    text = str(caught.value)
    assert text.startswith((f"reading {path}: ", f"opening {path}: "))
    assert "expected" in text or "reads" in text
    assert len(text) < 1500
    assert "\n" not in text
    return text


def test_valid_model_is_opened_with_names_and_numbers(tmp_path: Path):
    found = open_model(stored(tmp_path, model()))
    assert [n.op_type for n in found.graph] == ["Add", "Relu"]
    assert [i.name for i in found.graph.inputs] == ["x"]
    np.testing.assert_array_equal(found.graph.initializers["w"].const_value.numpy(), np.zeros(4, np.float32))
    assert custom_operators(found) == ()


def test_relative_path_is_opened_and_its_weights_keep_their_folder(tmp_path: Path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(bytes(8) + np.arange(4, dtype=np.float32).tobytes())
    stored(tmp_path, external(WEIGHT))
    monkeypatch.chdir(tmp_path)
    found = open_model("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(found.graph.initializers["w"].const_value.numpy(), np.arange(4))


def test_keys_that_onnx_runtime_adds_for_itself_are_no_reason_to_refuse(tmp_path: Path):
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    found = open_model(stored(tmp_path, external({"location": "w.bin", "prepacked_0": "key|64;16"})))
    np.testing.assert_array_equal(found.graph.initializers["w"].const_value.numpy(), np.arange(4))


def test_weights_in_a_folder_below_are_read(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    found = open_model(stored(tmp_path, external({"location": "data/w.bin"})))
    np.testing.assert_array_equal(found.graph.initializers["w"].const_value.numpy(), np.arange(4))


def test_operators_that_nobody_knows_are_left_alone_and_named(tmp_path: Path):
    function = helper.make_function(
        "ours",
        "Twice",
        ["a"],
        ["b"],
        [Node("Flip", ["a"], ["b"], domain="acme")],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        Node("Frobnicate", ["x"], ["a"]),
        Node("Gelu", ["a"], ["b"], domain="com.microsoft"),
        Node("Twice", ["b"], ["c"], domain="ours"),
        Node("Attend", ["c"], ["y"], domain="acme"),
    ]
    found = open_model(
        stored(
            tmp_path,
            model(graph(nodes), functions=[function], imports={"acme": 1, "ours": 1, "com.microsoft": 1}),
        )
    )
    assert len(list(found.graph)) == 4
    assert custom_operators(found) == ("acme.Attend", "acme.Flip", "ai.onnx.Frobnicate")


# External data


def outside(folder: Path) -> Path:
    """Return a model's folder beside a file that it must not reach."""
    (folder / "secret.bin").write_bytes(bytes(range(64)))
    (folder / "model").mkdir()
    (folder / "model" / "w.bin").write_bytes(bytes(64))
    return folder / "model"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../secret.bin", "expected a path inside the model's folder, found '../secret.bin'"),
        ("sub/../../secret.bin", "expected a path inside the model's folder"),
        ("./w.bin", "expected a path inside the model's folder"),
        ("/etc/passwd", "expected a path relative to the model, found '/etc/passwd'"),
        ("..\\secret.bin", "expected a path relative to the model"),
        ("w.bin\0.txt", "expected a path relative to the model"),
        ("", "expected a location, found none"),
        ("none.bin", "expected a file 'none.bin' beside the model, found none"),
        ("w.bin/x", "expected a folder at 'w.bin'"),
        ("n" * 5000, "File name too long"),
    ],
)
def test_paths_out_of_the_folder_are_refused(location: str, words: str, tmp_path: Path):
    folder = outside(tmp_path)
    assert words in refusal(stored(folder, external({"location": location})))


def make_link(place: Path, folder: Path) -> None:
    place.symlink_to(folder.parent / "secret.bin")


def make_hard_link(place: Path, folder: Path) -> None:
    os.link(folder.parent / "secret.bin", place)


def make_pipe(place: Path, folder: Path) -> None:
    os.mkfifo(place)


def make_folder(place: Path, folder: Path) -> None:
    place.mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_link, "'d.bin' is a symbolic link"),
        (make_hard_link, "expected a file of one name, 'd.bin' has 2 hard links"),
        (make_pipe, "expected a plain file, 'd.bin' is a pipe"),
        (make_folder, "expected a plain file, 'd.bin' is a folder"),
    ],
)
def test_data_that_is_no_plain_file_is_refused(
    make: Callable[[Path, Path], None], words: str, tmp_path: Path
):
    folder = outside(tmp_path)
    make(folder / "d.bin", folder)
    assert words in refusal(stored(folder, external({"location": "d.bin"})))


def test_a_linked_folder_on_the_way_is_refused(tmp_path: Path):
    folder = outside(tmp_path)
    (folder / "sub").symlink_to(tmp_path)
    text = refusal(stored(folder, external({"location": "sub/secret.bin"})))
    assert (
        "'sub/secret.bin' is a symbolic link; attnc reads plain files inside the model's folder alone" in text
    )


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("location", "w.bin"), ("location", "../secret.bin")], "expected one location, found two"),
        ([("Location", "w.bin")], "expected the keys location, offset, length, checksum, found 'Location'"),
        ([("location", "w.bin"), ("basepath", "/etc")], "found 'basepath'"),
        (
            [("location", "w.bin"), ("offset", "-8")],
            "expected the offset to be a number of bytes, found '-8'",
        ),
        ([("location", "w.bin"), ("offset", "0x8")], "found '0x8'"),
        ([("location", "w.bin"), ("offset", "9" * 30)], "expected the offset to be a number of bytes"),
        (
            [("location", "w.bin"), ("offset", "56")],
            "expected bytes 56 to 72 inside 'w.bin', found a file of 64",
        ),
        (
            [("location", "w.bin"), ("length", "12")],
            "expected 16 bytes by its type and shape [4], found a length",
        ),
    ],
)
def test_entries_that_lie_are_refused(entries: list[tuple[str, str]], words: str, tmp_path: Path):
    assert words in refusal(stored(outside(tmp_path), external(entries)))


def hide_in_attribute(m: onnx.ModelProto, bad: TensorProto) -> None:
    m.graph.node.add(op_type="Constant", output=["k"]).attribute.append(helper.make_attribute("value", bad))


def hide_in_subgraph(m: onnx.ModelProto, bad: TensorProto) -> None:
    inner = graph([Node("Identity", ["h"], ["z"])], (), ("z",), [bad])
    inner.initializer[0].name = "h"
    node = m.graph.node.add(op_type="If", input=["c"], output=["r"])
    node.attribute.extend(helper.make_attribute(n, inner) for n in ("then_branch", "else_branch"))


def hide_in_function(m: onnx.ModelProto, bad: TensorProto) -> None:
    node = Node("Constant", [], ["b"], value=bad)
    m.functions.append(helper.make_function("ours", "F", [], ["b"], [node], [helper.make_opsetid("", 21)]))


def hide_in_default(m: onnx.ModelProto, bad: TensorProto) -> None:
    hide_in_function(m, numbers("w"))
    m.functions[0].attribute_proto.append(helper.make_attribute("k", bad))


def hide_in_sparse(m: onnx.ModelProto, bad: TensorProto) -> None:
    sparse = m.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(bad)


def hide_in_training(m: onnx.ModelProto, bad: TensorProto) -> None:
    m.training_info.add().algorithm.initializer.append(bad)


@pytest.mark.parametrize(
    "hide",
    [
        hide_in_attribute,
        hide_in_subgraph,
        hide_in_function,
        hide_in_default,
        hide_in_sparse,
        hide_in_training,
    ],
)
def test_every_place_that_holds_a_tensor_is_looked_at(hide: Callable[..., None], tmp_path: Path):
    bad = numbers("secret")
    put_outside(bad, {"location": "../secret.bin"})
    m = model()
    hide(m, bad)
    assert "expected a path inside the model's folder" in refusal(stored(outside(tmp_path), m))


# Bytes


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(share: float, tmp_path: Path):
    data = model().SerializeToString()
    text = refusal(stored(tmp_path, data[: int(len(data) * share)]))
    assert "the file is truncated or corrupt" in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "found an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS; git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "field number 0 in ModelProto"),
        (message(7, b"\x08\x01"), "GraphProto.node has wire type 0, not 2"),
        (b"\xff" * 40, "does not end"),
        (b"\x7b\x7c", "wire type 3, which ONNX does not use"),
        (message(7, b"\x0a\xff\xff\xff\xff\x0f"), "is said to have 4294967295 bytes, 0 are left"),
        (message(7, b"abc", 2**40), "is said to have 1099511627776 bytes"),
        (message(7, b"") + message(7, b""), "ModelProto.graph is there twice"),
        (message(2, b"\xff\xfe"), "ModelProto.producer_name is not UTF-8 text"),
        (
            message(2, b"a" * (17 << 20)),
            "ModelProto.producer_name has 17,825,792 bytes of at most 16,777,216",
        ),
    ],
    ids=range(11),
)
def test_bytes_that_are_no_model_are_refused(data: bytes, words: str, tmp_path: Path):
    assert words in refusal(stored(tmp_path, data))


def nested(body: bytes, levels: int, *numbers_: int) -> bytes:
    for _ in range(levels):
        for number in numbers_:
            body = message(number, body)
    return body


def test_deeply_nested_graphs_are_refused(tmp_path: Path):
    """Graph 1: node, 5: attribute, 6: graph; a thousand times over."""
    text = refusal(stored(tmp_path, message(7, nested(b"", 1000, 6, 5, 1))))
    assert "messages are nested more than 100 deep" in text


def test_deeply_nested_types_are_refused(tmp_path: Path):
    """Input 11, type 2, then sequence 4 of element type 1, a thousand times over."""
    kind = nested(b"", 1000, 1, 4)
    assert "nested more than 100 deep" in refusal(stored(tmp_path, message(7, message(11, message(2, kind)))))


@pytest.mark.parametrize(
    ("body", "many"),
    [
        (message(1, b""), 400_000),  # nodes
        (message(1, b"\x12\x00"), 400_000),  # nodes with an output of no name
        (message(5, b""), 200_000),  # initializers
        (message(11, b"\x0a\x00"), 400_000),  # inputs
        (message(1, message(5, message(8, b"\0" * 8_000_000))), 1),  # numbers of an attribute, a byte each
        (message(5, message(7, b"\0" * 40_000_000)), 1),  # numbers of a tensor, a byte for eight
    ],
)
def test_few_bytes_that_stand_for_many_objects_are_refused(body: bytes, many: int, tmp_path: Path):
    path = stored(tmp_path, message(7, body * many))
    start = time.monotonic()
    assert "the file is corrupt or made to exhaust memory" in refusal(path)
    assert time.monotonic() - start < 10


def test_fields_are_counted_known_or_not(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(wire, "FIELDS", 10_000)
    path = stored(tmp_path, b"\xf8\x07\x00" * 11_000)  # number 127, which no version of ONNX has
    assert "expected a model of at most 10,000 fields" in refusal(path)


def test_files_over_two_gigabytes_are_refused_unread(tmp_path: Path):
    path = stored(tmp_path, model())
    os.truncate(path, 2**31)  # a hole: no disk is taken
    assert "expected at most 2 GiB, found 2,147,483,648 bytes" in refusal(path)


def test_what_is_no_file_is_refused(tmp_path: Path):
    assert "found none (No such file or directory)" in refusal(tmp_path / "m.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "found a folder" in refusal(tmp_path / "folder.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "found no plain file" in refusal(tmp_path / "pipe.onnx")


# Tensors


def initializer(**fields: object) -> Change:
    def change(m: onnx.ModelProto) -> None:
        tensor = TensorProto(name="w")
        for key, given in fields.items():
            if isinstance(given, list):
                getattr(tensor, key).extend(given)
            else:
                setattr(tensor, key, given)
        m.graph.initializer[0].CopyFrom(tensor)

    return change


F = TensorProto.FLOAT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (initializer(data_type=F, dims=[4], raw_data=bytes(12)), "expected 16 bytes for FLOAT [4], found 12"),
        (
            initializer(data_type=F, dims=[2**62, 8], raw_data=b"1234"),
            "a size that can be counted in 63 bits",
        ),
        (initializer(data_type=F, dims=[2**62, 8, 0], raw_data=b""), "a size that can be counted in 63 bits"),
        (initializer(data_type=F, dims=[-4], raw_data=bytes(16)), "expected sizes >= 0, found shape [-4]"),
        (initializer(data_type=F, dims=[1] * 65, raw_data=b"1234"), "expected at most 64 axes, found 65"),
        (initializer(data_type=F, dims=[2**31]), "expected 2147483648 numbers in float_data"),
        (
            initializer(data_type=F, dims=[2], int32_data=[1, 2]),
            "expected FLOAT in float_data, found int32_data",
        ),
        (
            initializer(data_type=F, dims=[1], raw_data=b"1234", float_data=[1.0]),
            "found raw_data and float_data",
        ),
        (
            initializer(data_type=TensorProto.INT4, dims=[3], raw_data=b"1"),
            "expected 2 bytes for INT4 [3], found 1",
        ),
        (
            initializer(data_type=TensorProto.STRING, dims=[1], raw_data=b"1"),
            "found raw_data and a tensor of texts",
        ),
        (initializer(data_type=TensorProto.STRING, dims=[3], string_data=[b"a"]), "3 numbers in string_data"),
        (initializer(data_type=0, dims=[1], raw_data=b"1"), "expected an element type, found number 0"),
        (initializer(data_type=99, dims=[1], raw_data=b"1"), "expected an element type, found number 99"),
    ],
    ids=range(13),
)
def test_tensors_that_lie_are_refused(change: Change, words: str, tmp_path: Path):
    m = model()
    change(m)
    assert f"tensor 'w': {words}" in refusal(stored(tmp_path, m)) or words in refusal(tmp_path / "m.onnx")


def test_texts_cannot_lie_outside(tmp_path: Path):
    m = external({"location": "w.bin"})
    m.graph.initializer[0].data_type = TensorProto.STRING
    assert "expected numbers, found texts" in refusal(stored(outside(tmp_path), m))


# Graphs


def circle(m: onnx.ModelProto) -> None:
    m.graph.node[0].input[1] = "y"


def backwards(m: onnx.ModelProto) -> None:
    first = m.graph.node.pop(0)
    m.graph.node.append(first)


def undefined(m: onnx.ModelProto) -> None:
    m.graph.node[0].input[1] = "nobody"


def made_twice(m: onnx.ModelProto) -> None:
    m.graph.node[0].output[0] = "y"


def over_input(m: onnx.ModelProto) -> None:
    m.graph.node[0].output[0] = "x"


def two_inputs(m: onnx.ModelProto) -> None:
    m.graph.input.append(value("x"))


def two_initializers(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(numbers("w"))


def no_output(m: onnx.ModelProto) -> None:
    m.graph.output[0].name = "z"


def no_operator(m: onnx.ModelProto) -> None:
    m.graph.node[0].ClearField("op_type")


def no_shape(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.ClearField("shape")


def no_type(m: onnx.ModelProto) -> None:
    m.graph.input[0].ClearField("type")


def negative_size(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def many_axes(m: onnx.ModelProto) -> None:
    m.graph.output[0].type.tensor_type.shape.dim.extend(
        [m.graph.output[0].type.tensor_type.shape.dim[0]] * 100
    )


def huge(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**62


def tower(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "9**9**9**9"


def no_opset(m: onnx.ModelProto) -> None:
    m.ClearField("opset_import")


def old_opset(m: onnx.ModelProto) -> None:
    m.opset_import[0].version = 6


def new_opset(m: onnx.ModelProto) -> None:
    m.opset_import[0].version = 27


def two_opsets(m: onnx.ModelProto) -> None:
    m.opset_import.add(domain="ai.onnx", version=13)


def new_ir(m: onnx.ModelProto) -> None:
    m.ir_version = 14


def no_graph(m: onnx.ModelProto) -> None:
    m.ClearField("graph")


def training(m: onnx.ModelProto) -> None:
    m.training_info.add()


def sparse(m: onnx.ModelProto) -> None:
    m.graph.sparse_initializer.add(dims=[4])


def empty_sequence(m: onnx.ModelProto) -> None:
    m.graph.input.add(name="q").type.sequence_type.elem_type.denotation = "IMAGE"


def a_map(m: onnx.ModelProto) -> None:
    m.graph.input.add(name="q").type.map_type.key_type = 7


def two_attributes(m: onnx.ModelProto) -> None:
    m.graph.node[1].attribute.extend([helper.make_attribute("a", 1), helper.make_attribute("a", 2)])


def wrong_attribute(m: onnx.ModelProto) -> None:
    m.graph.node[1].attribute.append(helper.make_attribute("a", 1))
    m.graph.node[1].attribute[0].type = onnx.AttributeProto.GRAPH


def lost_reference(m: onnx.ModelProto) -> None:
    m.graph.node[1].attribute.add(name="a", ref_attr_name="b", type=onnx.AttributeProto.INT)


def sparse_attribute(m: onnx.ModelProto) -> None:
    m.graph.node[1].attribute.add(name="a", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims.append(
        1
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (circle, "expected a graph without circles, found node 0 (Add) -> node 1 (Relu) -> node 0 (Add)"),
        (backwards, "node 0 (Relu) reads 'a' before node 1 (Add) makes it; expected the nodes in an order"),
        (undefined, "node 0 (Add) reads 'nobody', which nothing makes"),
        (made_twice, "expected one maker of the value 'y', found two; the second is node 1 (Relu)"),
        (over_input, "expected one maker of the value 'x', found two"),
        (two_inputs, "inputs: expected each name once, found 'x' twice"),
        (two_initializers, "initializers: expected each name once, found 'w' twice"),
        (no_output, "expected something to make the output 'z', found nothing"),
        (no_operator, "node 0 (): expected an operator, found none"),
        (no_shape, "input 'x': it needs a size or a name for each axis, expected a shape, found none"),
        (no_type, "input 'x': expected an element type, found none"),
        (negative_size, "value 'x', axis 0: expected a size >= 0 or a name, found -1"),
        (many_axes, "value 'y': expected at most 64 axes, found 102"),
        (huge, "value 'x': expected at most 3e+14 elements, found sizes [4611686018427387904, 4]"),
        (tower, "value 'x', axis 0: expected a name of a size, found '9**9**9**9'"),
        (no_opset, "expected an opset of ai.onnx, found none"),
        (old_opset, "expected an opset of ai.onnx from 7 to 26, found 6"),
        (new_opset, "expected an opset of ai.onnx from 7 to 26, found 27"),
        (two_opsets, "expected one version of ai.onnx, found two"),
        (new_ir, "expected an IR version of 3 to 13, found 14"),
        (no_graph, "expected a graph, found none"),
        (training, "expected a model for inference, found training_info"),
        (sparse, "expected dense initializers, found sparse ones"),
        (empty_sequence, "value 'q': expected the type of what the sequence holds, found none"),
        (a_map, "value 'q': expected a tensor, found a map or an opaque type"),
        (two_attributes, "node 1 (Relu): attributes: expected each name once, found 'a' twice"),
        (wrong_attribute, "attribute 'a': expected a value of type GRAPH alone, found ['i']"),
        (lost_reference, "attribute 'a': expected a function that declares 'b', found none"),
        (sparse_attribute, "attribute 'a': expected a dense value, found a sparse tensor"),
    ],
)
def test_broken_graphs_are_refused(change: Change, words: str, tmp_path: Path):
    m = model()
    change(m)
    assert words in refusal(stored(tmp_path, m))


def test_a_circle_through_a_subgraph_is_one(tmp_path: Path):
    inner = graph([Node("Neg", ["y"], ["z"])], (), ("z",))
    assert "without circles, found node 0 (If) -> node 0 (If)" in refusal(stored(tmp_path, branching(inner)))


def test_subgraphs_see_what_was_made_around_them_so_far(tmp_path: Path):
    inner = graph([Node("Neg", ["x"], ["z"])], (), ("z",))
    assert len(list(open_model(stored(tmp_path, branching(inner))).graph)) == 1
    inner.node[0].input[0] = "nobody"
    text = refusal(stored(tmp_path, branching(inner), "n.onnx"))
    assert "node 0 (If): attribute 'else_branch': node 0 (Neg) reads 'nobody', which nothing makes" in text


def test_a_subgraph_that_reads_a_name_and_then_makes_it_is_refused(tmp_path: Path):
    """Which ``x`` is meant depends on who reads the file."""
    inner = graph([Node("Neg", ["x"], ["z"]), Node("Abs", ["z"], ["x"])], (), ("x",))
    assert "expected a graph without circles" in refusal(stored(tmp_path, branching(inner)))


# Functions


def function(name: str, *calls: str, domain: str = "ours", opset: int = 21) -> onnx.FunctionProto:
    """Return a function that hands its input through the functions ``calls``, or Neg if there are none."""
    nodes = [
        Node(c, ["a" if not i else f"t{i - 1}"], ["b" if i == len(calls) - 1 else f"t{i}"], domain="ours")
        for i, c in enumerate(calls)
    ]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
    return helper.make_function(domain, name, ["a"], ["b"], nodes or [Node("Neg", ["a"], ["b"])], imports)


def calling(*functions: onnx.FunctionProto, name: str = "F") -> onnx.ModelProto:
    return model(graph([Node(name, ["x"], ["y"], domain="ours")]), functions=functions, imports={"ours": 1})


def test_functions_are_opened(tmp_path: Path):
    found = open_model(stored(tmp_path, calling(function("F", "G", "G"), function("G"))))
    assert [f.name for f in found.functions.values()] == ["F", "G"]


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ([function("F", "F")], "expected no function that calls itself, found 'ours.F' -> 'ours.F'"),
        ([function("F", "G"), function("G", "F")], "found 'ours.F' -> 'ours.G' -> 'ours.F'"),
        ([function("F"), function("F")], "function 'ours.F': expected one function of that name, found two"),
        (
            [function("F", "G1"), *(function(f"G{i}", f"G{i + 1}") for i in range(1, 150)), function("G150")],
            "expected calls at most 100 deep",
        ),
        (
            [
                function("F", *["G0"] * 10),
                *(function(f"G{i}", *[f"G{i + 1}"] * 10) for i in range(40)),
                function("G40"),
            ],
            "once functions are written out, found about 10 to the power of 41",
        ),
        ([function("F"), function("Relu", domain="")], "found ai.onnx, whose operators it would hide"),
        ([function("F", opset=27)], "function 'F': expected an opset of ai.onnx from 7 to 26, found 27"),
    ],
    ids=["itself", "each-other", "twice", "deep", "bomb", "hides", "opset"],
)
def test_bad_functions_are_refused(functions: list[onnx.FunctionProto], words: str, tmp_path: Path):
    assert words in refusal(stored(tmp_path, calling(*functions)))


def test_a_graph_by_reference_is_refused(tmp_path: Path):
    f = function("F")
    f.attribute.append("body")
    f.node[0].attribute.add(name="g", ref_attr_name="body", type=onnx.AttributeProto.GRAPHS)
    assert "expected a graph of its own, found a reference to one" in refusal(stored(tmp_path, calling(f)))


def test_a_function_of_another_version_is_refused_where_an_operator_means_something_else(tmp_path: Path):
    """Softmax flattened its input up to version 12."""
    f = function("F", opset=11)
    assert open_model(stored(tmp_path, calling(function("F", opset=20)))).graph is not None
    f.node[0].op_type = "Softmax"
    text = refusal(stored(tmp_path, calling(f), "n.onnx"))
    assert "function 'ours.F': expected the operators of ai.onnx 21, found Softmax of 11" in text


# Limits


def test_walking_a_large_model_is_linear_in_its_fields(tmp_path: Path):
    nodes = [Node("Neg", [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(20_000)]
    m = model(graph(nodes, ("v0",), ("v20000",)))
    start = time.monotonic()
    assert len(open_model(stored(tmp_path, m)).graph) == 20_000
    assert time.monotonic() - start < 10


def test_large_weights_cost_no_more_than_twice_the_file(tmp_path: Path):
    """Measured where it is used: in a process of its own, as the peak of what it holds in memory."""
    import subprocess
    import sys

    m = model()
    m.graph.initializer[0].dims[:] = [64 << 20]
    m.graph.initializer[0].raw_data = bytes(256 << 20)
    path = stored(tmp_path, m)
    code = (
        "import resource, sys, onnx, onnx_ir.serde, onnx.defs\n"
        "from attnc.codegen.onnx.opening.files import open_model\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); open_model(sys.argv[1]); print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert int(run.stdout) * 1024 < 2 * path.stat().st_size + wire.MEMORY, run.stderr


def test_fields_are_walked_as_the_encoding_says():
    assert varint(300) == b"\xac\x02"  # the example of protobuf.dev
    wire.scan(model().SerializeToString())
