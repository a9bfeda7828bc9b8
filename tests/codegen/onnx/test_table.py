"""The capability tables: what they hold, which is nearest, and which operator comes first."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from attnc.codegen.onnx import probe
from attnc.codegen.onnx.check import site_model
from attnc.codegen.onnx.opening import files
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import CONDITIONS, TARGETS, WORDS, Row, Table, candidates, load
from attnc.errors import CodegenError
from attnc.printer import parse

NAMES = ("ort-cpu-1.31", "ort-cuda-1.31", "standard-18", "standard-23", "standard-24")
CPU, CUDA = load("ort-cpu"), load("ort-cuda")
WORD_OF = {
    "causal": "causal",
    "unidirectional": "causal",
    "is_causal": "causal",
    "local_window_size": "window",
    "softcap": "softcap",
}
"""Attributes of operators that stand for a word; others come with each site."""


def site(dtype: str = "float32", group: int = 1, rest: str = "scale(0.25) mask=none softmax") -> Call:
    keys = f"[b,{4 // group},s,16]:{dtype}"
    return Call.of(parse(f"attn q=bhqd[b,4,s,16]:{dtype} k=bhkd{keys} v=bhke{keys} group={group} {rest}"))


CAUSAL = "scale(0.25) mask=causal fill(replace,-inf) softmax"


def test_there_is_a_table_for_every_target_and_a_target_for_every_table():
    folder = resources.files("attnc.codegen.onnx.capabilities")
    found = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
    assert tuple(found) == NAMES
    assert {load(t).name for t in TARGETS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_tables_hold_known_words_alone(name: str):
    text = (resources.files("attnc.codegen.onnx.capabilities") / f"{name}.json").read_text()
    data = json.loads(text)
    assert set(data) == {"provider", "opset", "greatest_opset", "rows"}
    for r in data["rows"]:
        given = {"operator", "domain", "opset", "dtypes", "takes", "conditions", "facts"}
        assert given <= set(r) <= given | {"cost", "measured", "projecting"}
        assert set(r["takes"]) <= set(WORDS)
        assert set(r["conditions"]) <= set(CONDITIONS)
        assert set(r.get("cost", ())) <= {"full", "causal"} & set(r["takes"])
        assert all(isinstance(getattr(torch, t), torch.dtype) for t in r["dtypes"])
        assert data["opset"] <= r["opset"] <= data["greatest_opset"]


def test_models_are_read_up_to_the_opset_that_the_runtime_runs():
    assert files.OPSETS[-1] == CPU.greatest_opset


@pytest.mark.parametrize(
    ("target", "installed", "name", "note"),
    [
        ("ort-cpu", "1.31.1", "ort-cpu-1.31", ""),
        ("ort-cpu", "1.40.0", "ort-cpu-1.31", "ort-cpu-1.31 is the nearest table to the installed 1.40.0"),
        ("ort-cpu", "1.20.0", "ort-cpu-1.31", "ort-cpu-1.31 is the nearest table to the installed 1.20.0"),
        ("ort-cpu-1.30", "1.31.1", "ort-cpu-1.31", "ort-cpu-1.31 is the nearest table to ort-cpu-1.30"),
        ("standard", "1.31.1", "standard-18", ""),
        ("standard-22", None, "standard-18", "standard-18 is the nearest table to standard-22"),
        ("standard-24", None, "standard-24", ""),
        ("standard-30", None, "standard-24", "standard-24 is the nearest table to standard-30"),
    ],
)
def test_the_nearest_table_is_taken_and_said(target: str, installed: str | None, name: str, note: str):
    found = load(target, installed)
    assert (found.name, found.note) == (name, note)


@pytest.mark.parametrize("target", ["tensorrt", "ort-cpu-new", "standard-17", "ort", ""])
def test_an_unknown_target_is_one_clear_error(target: str):
    with pytest.raises(CodegenError, match=r"expected a target of .*'standard-24'.*found"):
        load(target, "1.31.1")


def test_the_note_of_a_table_that_nobody_ran_says_so():
    assert "was not measured" in CUDA.note
    assert "nothing was run on CUDAExecutionProvider" in CUDA.note
    assert load("ort-cuda", "1.40.0").note.startswith("ort-cuda-1.31 is the nearest table")


def names(call: Call, table: Table) -> list[str]:
    return [c.row.operator if c.row else "basic operators" for c in candidates(call, table)]


def test_the_cheapest_operator_comes_first_and_says_its_price():
    twice = ["MultiHeadAttention"] * 2  # with the projections inside, and without
    assert names(site(), CPU) == [*twice, "GroupQueryAttention", "Attention", "basic operators"]
    assert names(site(rest=CAUSAL), CPU)[0] == "GroupQueryAttention"
    assert (
        candidates(site(rest=CAUSAL), CPU)[0].reason == "it takes about 0.5 times as long as basic operators"
    )
    swapped = Table("t", "p", 21, 26, tuple(Row(**fields(r) | {"cost": {}}) for r in CPU.rows))
    assert names(site(rest=CAUSAL), swapped)[0] == "MultiHeadAttention", (
        "without prices the order is the table's"
    )


def fields(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in Row.__dataclass_fields__}


@pytest.mark.parametrize(
    ("rest", "word"),
    [
        ("scale(0.25) softcap(5.0) mask=none softmax", "softcap"),
        ("scale(0.25) mask=window(left=2,right=0) fill(replace,-inf) softmax", "window"),
        ("scale(0.25) bias(p) mask=none softmax with p=bhqk[1,4,s,s]:float32", "bias"),
        ("scale(0.25) mask=none softmax(sink=z) with z=h[4]:float32", "sink"),
        (CAUSAL, "causal"),
        ("scale(0.25) mask=none softmax", "full"),
    ],
)
def test_a_row_that_lacks_a_word_refuses_the_sites_that_ask_for_it(rest: str, word: str):
    row = next(r for r in CPU.rows if r.operator == "GroupQueryAttention")
    call = site(rest=rest)
    assert word in row.asks(call)
    assert row.refuses(call) is None
    without = Row(**fields(row) | {"takes": tuple(w for w in row.takes if w != word)})
    if word in ("window", "causal"):  # what is no attribute becomes a bias
        assert word not in without.asks(call) or without.refuses(call) == WORDS[word]
    else:
        assert without.refuses(call) == WORDS[word]


@pytest.mark.parametrize("row", CPU.rows, ids=lambda r: r.operator)
def test_what_is_written_is_what_the_row_takes_and_every_word_is_probed(row: Row):
    """For each claim of the doctor: the attributes in the model are those of the words asked for."""
    asked: set[str] = set()
    for claim, dtype, call in probe.claims(row):
        words = set(row.asks(call))
        asked |= words
        model = site_model(call, row, row.opset)
        bodies = [model.graph, *model.functions.values()]
        nodes = [n for body in bodies for n in body.all_nodes() if n.op_type == row.operator]
        given = {a for n in nodes for a, v in n.attributes.items() if v.value}
        written = {WORD_OF[a] for a in given if a in WORD_OF}
        assert written == words & {"causal", "window", "softcap"}, (claim, dtype)
    assert asked == set(row.takes)
    assert {dtype for _, dtype, _ in probe.claims(row)} == set(row.dtypes)


def test_cuda_takes_no_bias_into_grouped_attention_for_nothing_published_says_that_it_can():
    padded = "scale(0.25) mask=padding(key,m) fill(replace,-inf) softmax with m=bk[b,s]:bool"
    assert names(site("float16", 2, padded), CUDA) == ["basic operators"]
    assert names(site("bfloat16", 2, CAUSAL), CUDA) == ["GroupQueryAttention", "basic operators"]
    assert names(site("float32", 1, padded), CUDA) == ["MultiHeadAttention", "basic operators"]


def test_standard_24_has_the_same_operator_at_its_own_opset():
    rows = [load(t).rows for t in ("standard-23", "standard-24")]
    assert [[r.opset for r in rs] for rs in rows] == [[23], [24]]
    assert rows[0][0].takes == rows[1][0].takes
