"""Each site alone: what is chosen for a spec, and whether ONNX Runtime then computes the spec."""

from __future__ import annotations

import math

import pytest
import torch

from attnc.codegen.onnx.check import _operands, check_site, random_inputs, site_model
from attnc.codegen.onnx.runtime import Session
from attnc.codegen.onnx.sites import Call
from attnc.codegen.onnx.table import Row, candidates, load
from attnc.printer import parse

LEAST = torch.finfo(torch.float32).min

SELF = "q=bhqd[b,4,s,16]:float32 k=bhkd[b,4,s,16]:float32 v=bhke[b,4,s,16]:float32 group=1"
GROUPED = "q=bhqd[b,4,s,16]:float32 k=bhkd[b,2,s,16]:float32 v=bhke[b,2,s,16]:float32 group=2"
CROSS = "q=bhqd[b,4,s,12]:float32 k=bhkd[b,4,n,12]:float32 v=bhke[b,4,n,8]:float32 group=1"
CROSS_GROUPED = "q=bhqd[b,4,s,12]:float32 k=bhkd[b,2,n,12]:float32 v=bhke[b,2,n,8]:float32 group=2"
ODD = "q=bhqd[b,4,s,7]:float32 k=bhkd[b,2,s,7]:float32 v=bhke[b,2,s,7]:float32 group=2"
PAD = "with m=bk[b,s]:bool"
PAD_N = "with m=bk[b,n]:bool"
TABLE = load("ort-cpu", "1.31.1")

# text of a spec, the operator that is chosen for it
CASES = {
    "plain": (f"{SELF} scale(0.25) mask=none softmax", "MultiHeadAttention"),
    "cross": (f"{CROSS} scale(0.3) mask=none softmax", "MultiHeadAttention"),
    "cross-padding": (
        f"{CROSS} mask=padding(key,m) fill(replace,-inf) softmax {PAD_N}",
        "MultiHeadAttention",
    ),
    "padding-least": (
        f"{SELF} scale(0.25) mask=padding(key,m) fill(add,{LEAST!r}) softmax {PAD}",
        "MultiHeadAttention",
    ),
    "padding-1e9": (
        f"{SELF} scale(0.25) mask=padding(key,m) fill(add,-1e9) softmax {PAD}",
        "MultiHeadAttention",
    ),
    "padding-1e4": (
        f"{SELF} scale(0.25) mask=padding(key,m) fill(add,-1e4) softmax {PAD}",
        "MultiHeadAttention",
    ),
    "padding-put-1e4": (f"{SELF} mask=padding(key,m) fill(replace,-1e4) softmax {PAD}", "MultiHeadAttention"),
    "padding-inf": (
        f"{SELF} scale(0.25) mask=padding(key,m) fill(replace,-inf) softmax {PAD}",
        "MultiHeadAttention",
    ),
    "padding-safe": (
        f"{SELF} mask=padding(key,m) fill(replace,-inf) softmax(safe) {PAD}",
        "MultiHeadAttention",
    ),
    "dense": (
        f"{SELF} scale(0.25) mask=dense(d) fill(replace,-inf) softmax(safe) with d=bhqk[b,1,s,s]:bool",
        "MultiHeadAttention",
    ),
    "bias": (
        f"{CROSS} scale(0.3) bias(p) mask=none softmax with p=bhqk[1,4,s,n]:float32",
        "MultiHeadAttention",
    ),
    "bias-row": (
        f"{CROSS} bias(-p) scale(2.0) mask=none softmax with p=bhqk[b,1,1,n]:float32",
        "MultiHeadAttention",
    ),
    "bias-safe": (
        f"{CROSS} bias(p) mask=none softmax(safe) with p=bhqk[b,1,s,n]:float32",
        "MultiHeadAttention",
    ),
    "bias-safe-mask": (
        f"{CROSS} bias(p) mask=padding(key,m) fill(replace,-inf) softmax(safe) "
        f"with p=bhqk[b,4,s,n]:float32 {PAD_N}",
        "MultiHeadAttention",
    ),
    "bias-causal": (
        f"{GROUPED} bias(p) mask=causal fill(replace,-inf) softmax with p=bhqk[1,4,s,s]:float32",
        "GroupQueryAttention",
    ),
    "bias-causal-safe": (
        f"{GROUPED} bias(p) mask=causal fill(replace,-inf) softmax(safe) with p=bhqk[1,4,s,s]:float32",
        "GroupQueryAttention",
    ),
    "bias-causal-sink": (
        f"{GROUPED} bias(p) mask=causal fill(replace,-inf) softmax(sink=0.5) with p=bhqk[1,4,s,s]:float32",
        "GroupQueryAttention",
    ),
    "safe-but-finite": (
        f"{SELF} mask=padding(key,m) fill(add,{LEAST!r}) softmax(safe) {PAD}",
        "MultiHeadAttention",
    ),
    "cross-grouped-safe": (
        f"{CROSS_GROUPED} mask=padding(key,m) fill(replace,-inf) softmax(safe) {PAD_N}",
        "Attention",
    ),
    "gain": (
        f"{SELF} scale(0.25) gain(t) mask=none softmax with t=bhqk[1,4,1,1]:float32",
        "MultiHeadAttention",
    ),
    "causal": (f"{SELF} scale(0.25) mask=causal fill(replace,-inf) softmax", "GroupQueryAttention"),
    "causal-cross": (f"{CROSS} scale(0.25) mask=causal fill(replace,-inf) softmax", "MultiHeadAttention"),
    "causal-end": (f"{CROSS} scale(0.25) mask=causal(end) fill(replace,-inf) softmax", "MultiHeadAttention"),
    "causal-odd-size": (
        f"{SELF.replace('16]', '7]')} scale(0.25) mask=causal fill(replace,-inf) softmax",
        "MultiHeadAttention",
    ),
    "causal-padding-least": (
        f"{GROUPED} scale(0.25) mask=(causal & padding(key,m)) fill(add,{LEAST!r}) softmax {PAD}",
        "GroupQueryAttention",
    ),
    "causal-padding-inf": (
        f"{GROUPED} scale(0.25) mask=(causal & padding(key,m)) fill(replace,-inf) softmax {PAD}",
        "GroupQueryAttention",
    ),
    "causal-padding-safe": (
        f"{GROUPED} scale(0.25) mask=(causal & padding(key,m)) fill(replace,-inf) softmax(safe) {PAD}",
        "GroupQueryAttention",
    ),
    "window-softcap-sink": (
        f"{GROUPED} scale(0.25) softcap(5.0) mask=window(left=2,right=0) fill(replace,-inf) softmax(sink=z) "
        "with z=h[4]:float32",
        "GroupQueryAttention",
    ),
    "window-sink-padding": (
        f"{GROUPED} scale(0.25) mask=(window(left=2,right=0) & padding(key,m)) fill(replace,-inf) "
        f"softmax(sink=0.0) {PAD}",
        "GroupQueryAttention",
    ),
    "window-two-sided": (
        f"{GROUPED} mask=window(left=2,right=1) fill(replace,-inf) softmax",
        "GroupQueryAttention",
    ),
    "window-and-first-keys": (
        f"{GROUPED} mask=((window(left=3,right=0) | range(k,0,2)) & causal) fill(replace,-inf) softmax",
        "GroupQueryAttention",
    ),
    "cross-grouped": (f"{CROSS_GROUPED} scale(0.3) softcap(4.0) mask=none softmax", "Attention"),
    "cross-grouped-padding": (
        f"{CROSS_GROUPED} scale(0.3) mask=padding(key,m) fill(add,{LEAST!r}) softmax {PAD_N}",
        "Attention",
    ),
    "cross-grouped-causal": (f"{CROSS_GROUPED} mask=causal fill(replace,-inf) softmax", "Attention"),
    "cross-grouped-padding-inf": (
        f"{CROSS_GROUPED} scale(0.3) mask=padding(key,m) fill(replace,-inf) softmax {PAD_N}",
        "",
    ),
    "odd-sink": (f"{ODD} mask=causal fill(replace,-inf) softmax(sink=z) with z=h[4]:float32", "Attention"),
    "past-sink": (
        f"{CROSS_GROUPED} scale(0.3) mask=(window(left=2,right=0,align=end) & padding(key,m)) "
        f"fill(add,{LEAST!r}) softmax(sink=z) {PAD_N} with z=h[4]:float32",
        "Attention",
    ),
    "past-sink-softcap-inf": (
        f"{CROSS_GROUPED} softcap(4.0) mask=(causal(end) & padding(key,m)) fill(replace,-inf) "
        f"softmax(sink=0.0) {PAD_N}",
        "Attention",
    ),
    "past-sink-bias": (
        f"{CROSS_GROUPED} bias(p) mask=causal(end) fill(replace,-inf) softmax(sink=z) "
        "with p=bhqk[b,1,s,n]:float32 with z=h[4]:float32",
        "Attention",
    ),
    "sink-alone": (f"{CROSS} mask=none softmax(sink=z) with z=h[4]:float32", "Attention"),
    "past-window-softcap": (
        f"{CROSS_GROUPED} softcap(4.0) mask=(window(left=2,right=0,align=end) & padding(key,m)) "
        f"fill(add,{LEAST!r}) softmax {PAD_N}",
        "Attention",
    ),
    "gain-per-key": (f"{SELF} gain(t) mask=none softmax with t=bhqk[1,1,1,s]:float32", ""),
    "scale-after-softcap": (f"{SELF} softcap(5.0) scale(0.5) mask=none softmax", ""),
    "small-fill": (f"{SELF} mask=padding(key,m) fill(replace,-10.0) softmax {PAD}", ""),
    "query-padding": (
        f"{SELF} mask=~padding(query,m) fill(replace,-inf) softmax with m=bq[b,s]:bool",
        "MultiHeadAttention",
    ),
    "double": (f"{SELF.replace('float32', 'float64')} scale(0.25) mask=none softmax", "Attention"),
    "half": (f"{SELF.replace('float32', 'float16')} scale(0.25) mask=none softmax", "MultiHeadAttention"),
    "half-padding": (
        f"{SELF.replace('float32', 'float16')} mask=padding(key,m) fill(add,-65504.0) softmax {PAD}",
        "",
    ),
    "half-past-sink": (
        f"{CROSS_GROUPED.replace('float32', 'float16')} mask=(causal(end) & padding(key,m)) "
        f"fill(add,-65504.0) softmax(sink=z) {PAD_N} with z=h[4]:float16",
        "Attention",
    ),
    "bfloat16": (f"{SELF.replace('float32', 'bfloat16')} scale(0.25) mask=none softmax", ""),
}


def call_of(text: str) -> Call:
    return Call.of(parse(f"attn {text}"))


def run(call: Call, row: Row | None, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    opset = max(TABLE.opset, row.opset if row else 0)
    return Session(site_model(call, row, opset))(feeds)[0]


def row_of(operator: str) -> Row:
    return next(r for r in TABLE.rows if r.operator == operator)


@pytest.mark.parametrize("name", CASES)
def test_chosen_operator_computes_the_spec_also_where_nothing_is_seen(name: str) -> None:
    text, operator = CASES[name]
    call = call_of(text)
    choice = candidates(call, TABLE)[0]
    assert (choice.row.operator if choice.row else "") == operator, choice.reason
    checked = check_site(call, choice.row, max(TABLE.opset, choice.row.opset if choice.row else 0))
    assert checked.ok, checked


@pytest.mark.parametrize("name", [n for n, (_, operator) in CASES.items() if operator])
def test_basic_operators_compute_the_spec_at_opset_18(name: str) -> None:
    checked = check_site(call_of(CASES[name][0]), None, 18)
    assert checked.ok, checked


@pytest.mark.parametrize("name", ["odd-sink", "past-sink-softcap-inf", "past-sink-bias", "sink-alone"])
def test_standard_attention_takes_a_sink_as_one_more_key(name: str) -> None:
    row = load("standard-23").rows[0]
    call = call_of(CASES[name][0])
    assert row.refuses(call) is None
    assert check_site(call, row, row.opset).ok


@pytest.mark.parametrize("how", ["add", "replace"])
@pytest.mark.parametrize("shape", [SELF, GROUPED, CROSS])
def test_what_a_bias_and_a_mask_both_hide_weighs_least(shape: str, how: str) -> None:
    """A bias of the least number (a padding mask) hides all keys: the causal mask still tells them apart."""
    keys = "n" if shape == CROSS else "s"
    text = f"{shape} bias(p) mask=causal(end) fill({how},{LEAST!r}) softmax with p=bhqk[b,1,s,{keys}]:float32"
    call = call_of(text)
    choice = candidates(call, TABLE)[0]
    assert choice.row is not None
    feeds = random_inputs(call, 2, 6, 6)
    feeds["p"] = torch.zeros_like(feeds["p"])
    feeds["p"][0, :, :4] = LEAST
    expected, _ = call.spec(*(feeds[n] for n in "qkv"), (feeds["p"],))
    torch.testing.assert_close(run(call, choice.row, feeds), expected, rtol=1e-5, atol=1e-5)


def test_random_inputs_hold_a_query_that_sees_nothing() -> None:
    call = call_of(CASES["padding-inf"][0])
    feeds = random_inputs(call, 2, 9, 9)
    out, _ = call.spec(*(feeds[o.name] for o in _operands(call)[:3]), (feeds["m"],))
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_finite_fill_gives_the_mean_of_all_values_where_nothing_is_seen() -> None:
    """Causal and padded: the mean is over all keys, those of the future included, as in the original."""
    call = call_of(CASES["causal-padding-least"][0])
    feeds = random_inputs(call, 2, 9, 9)
    out = run(call, row_of("GroupQueryAttention"), feeds)
    mean = feeds["v"].mean(2).repeat_interleave(2, 1)[0]
    torch.testing.assert_close(out[0], mean[:, None].expand_as(out[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("softcap", "MultiHeadAttention"),
        ("causal-cross-inf", "Attention"),
        ("sink", "MultiHeadAttention"),
    ],
)
def test_check_catches_an_operator_that_cannot_do_it(name: str, operator: str) -> None:
    """Without the table's conditions these run, and are wrong."""
    text = {
        "softcap": f"{SELF} softcap(0.5) mask=none softmax",
        "causal-cross-inf": CASES["cross-grouped-padding-inf"][0],
        "sink": f"{SELF} mask=none softmax(sink=z) with z=h[4]:float32",
    }[name]
    row = row_of(operator)
    checked = check_site(call_of(text), row, row.opset)
    assert not checked.ok


def test_runtime_refusal_is_reported_in_its_words() -> None:
    checked = check_site(call_of(CASES["odd-sink"][0]), row_of("GroupQueryAttention"), 21)
    assert not checked.ok
    assert "multiple of 8" in checked.refused


def test_log_sum_exp_of_basic_operators_is_the_specs() -> None:
    import dataclasses

    import onnx_ir as ir

    from attnc.codegen.onnx.builder import Builder, onnx_dtype
    from attnc.codegen.onnx.check import _shapes
    from attnc.codegen.onnx.decompose import decompose

    for name in ("causal", "window-softcap-sink", "padding-inf", "window-sink-padding"):
        call = dataclasses.replace(call_of(CASES[name][0]), lse_used=True)
        assert candidates(call, TABLE)[0].row is None
        inputs = [
            ir.Value(name=o.name, type=ir.TensorType(onnx_dtype(o.dtype)), shape=ir.Shape(shape))
            for o, shape in zip(_operands(call), _shapes(call, "b", "s", "s"), strict=True)
        ]
        b = Builder("t")
        _, lse = decompose(b, call.spec, *inputs[:3], inputs[3:], lse=True)
        assert lse is not None
        graph = ir.Graph(inputs, [lse], nodes=b.nodes, opset_imports={"": 18}, name="t")
        feeds = random_inputs(call, 2, 9, 9)
        (found,) = Session(ir.Model(graph, ir_version=10))(feeds)
        tensors = [feeds[o.name] for o in _operands(call)]
        _, expected = call.spec(*tensors[:3], tuple(tensors[3:]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_nearest_table_is_named_when_the_version_was_not_measured() -> None:
    assert load("ort-cpu", "1.31.4").note == ""
    assert load("ort-cpu", "1.40.0").note == "ort-cpu-1.31 is the nearest table to the installed 1.40.0"
    assert load("ort-cpu", "1.2.0").name == "ort-cpu-1.31"


def test_tolerance_is_far_below_what_a_wrong_mask_does() -> None:
    """The bound is worst-case arithmetic; one key too many moves the output by a thousand times it."""
    call = call_of(CASES["causal"][0])
    feeds = random_inputs(call, 2, 9, 9)
    from attnc.codegen.onnx.check import tolerance

    wrong = call_of(f"{SELF} scale(0.25) mask=window(right=1) fill(replace,-inf) softmax")
    q, k, v = (feeds[n] for n in "qkv")
    difference = (call.spec(q, k, v)[0] - wrong.spec(q, k, v)[0]).abs().max().item()
    assert difference > 1000 * tolerance(call, feeds)
    assert math.isfinite(difference)


@pytest.mark.parametrize("operator", ["MultiHeadAttention", "GroupQueryAttention", "Attention"])
def test_a_wrong_mask_is_seen_in_half_precision_too(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case of half precision would let it pass; what rounding typically does would not."""
    from attnc.codegen.onnx import check
    from attnc.codegen.onnx.sites import Split
    from attnc.masks import Band, Full

    row = next(r for r in TABLE.rows if r.operator == operator)
    call = call_of(CASES["plain"][0].replace("float32", "float16"))
    assert check_site(call, row, row.opset).ok
    monkeypatch.setattr(Call, "split", lambda self, **_: Split(Band(None, 0), Full()))
    wrong = check_site(call, row, row.opset)
    assert not wrong.ok
    assert wrong.error > 10 * wrong.tolerance
    feeds = random_inputs(call, 2, 9, 9)
    assert check.tolerance(call, feeds) > 10 * check.typical_error(call, feeds)
