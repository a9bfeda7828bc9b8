"""Gradients over packed sequences, by emitted kernels under Triton's interpreter and in plain torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from attnc.codegen.triton import can_run, emit, run_varlen
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import varlen_backward
from attnc.codegen.triton.launch import run_varlen_backward, varlen_backward_launcher
from attnc.codegen.triton.packed import _cut, execute_packed, packed_gradients
from attnc.codegen.triton.store import load
from attnc.printer import parse

LINES = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
UNSERVED = {"mixed"}
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith("#")]
NAMES = [name for name in NAMES if name not in UNSERVED]
SOME = (
    "causal_from_the_end",  # a mask that knows the lengths
    "left_padded",  # rows that spread over hidden keys, in fp16, with a group
    "biases",  # summed over sequences; columns
    "sink_logits",
    "squared_relu",  # no row is divided by a sum
    "below_zero",  # weights over their own sum, whose logarithm is NaN
    "every_axis",
)
SHARES = ["below_zero", "settled", "vanishing"]


@pytest.fixture(scope="module")
def some(interpret):
    return interpret("interpret_varlen_backward.py", "short", *SOME)


def check(rows, name: str, count: int = 1) -> None:
    row = rows[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    assert row["text"].count("\n") == 5  # four cases and the verdict
    found = {run: row for run, row in rows.items() if run.startswith(f"{name} torch.")}
    assert len(found) == count
    for run, row in found.items():
        assert max(row["errors"]) <= 1, run
        assert row["undefined"] == 0, run


@pytest.mark.parametrize("name", SOME)
def test_gradients_over_packed_sequences_are_those_of_plain_torch(name: str, some) -> None:
    check(some, name)


def test_rows_that_see_no_key_were_among_them(some) -> None:
    for name in ("causal_from_the_end", "left_padded", "biases"):
        assert any(row["hidden_rows"] for run, row in some.items() if run.startswith(f"{name} torch."))


def test_each_gradient_can_be_had_alone_and_has_the_same_bits(some) -> None:
    assert some["alone"]["alone"] == [True] * 8


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_gradients_of_the_whole_corpus_are_those_of_plain_torch(part: int, interpret) -> None:
    names = (NAMES + SHARES)[part::4]
    found = interpret("interpret_varlen_backward.py", *names)
    for name in names:
        check(found, name, count=2)


@pytest.mark.slow
def test_the_self_test_notices_every_broken_file(interpret) -> None:
    found = interpret("interpret_varlen_backward.py", "broken")
    assert len(found) >= 25
    assert [run for run, row in found.items() if not row["noticed"]] == []


QUERIES, KEYS = (3, 0, 9, 1, 5), (7, 4, 9, 0, 2)


def draw(spec, queries=QUERIES, keys=KEYS, dtype=torch.float64):
    """Return packed q, k, v, where sequences begin, captured tensors, and gradients of out and lse."""
    g = torch.Generator().manual_seed(len(queries))
    heads = 2 * spec.group_size
    sizes = {"b": len(queries), "h": heads, "s": max(queries), "t": max(keys)}
    q, k, v = (
        torch.randn(sum(n), h, o.shape[3], generator=g, dtype=dtype)
        for o, n, h in ((spec.q, queries, heads), (spec.k, keys, 2), (spec.v, keys, 2))
    )
    captured = [
        torch.randn([sizes.get(d, d) for d in o.shape], generator=g, dtype=dtype) for o in spec.captured
    ]
    pairs = zip(captured, spec.captured, strict=True)
    captured = [x if o.dtype.is_floating_point else (x > -1).to(o.dtype) for x, o in pairs]
    cu = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)]
    dout = torch.randn(*q.shape[:2], v.shape[2], generator=g, dtype=dtype)
    return [q, k, v, *captured], cu, dout, torch.randn(heads, q.shape[0], generator=g, dtype=dtype)


@pytest.mark.parametrize("name", ["plain", "bert", "softmax_plus_one", "sink_logits", "angles", "taylor"])
def test_plain_gradients_are_those_of_autograd_through_the_spec(name: str, corpus) -> None:
    spec = corpus[name]
    inputs, cu, dout, dlse = draw(spec)
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    out, lse = execute_packed(spec, *inputs[:3], *cu, inputs[3:])
    dlse = torch.where(lse.isfinite(), dlse, 0.0)
    want = torch.autograd.grad((out, lse), leaves, (dout, dlse), materialize_grads=True)
    needs = [x.is_floating_point() for x in inputs]
    detached = [x.detach() for x in inputs]
    found = packed_gradients(spec, *detached[:3], *cu, detached[3:], dout, dlse, needs)
    torch.testing.assert_close(found, list(want), rtol=1e-9, atol=1e-9)


def test_what_sequences_share_has_the_sum_of_their_gradients(corpus) -> None:
    spec = corpus["biases"]
    inputs, cu, dout, dlse = draw(spec)
    inputs[5] = torch.ones_like(inputs[5])
    dlse[:, cu[1].diff().repeat_interleave(cu[0].diff()) == 0] = 0.0
    needs = [x.is_floating_point() for x in inputs]
    shared, own = packed_gradients(spec, *inputs[:3], *cu, inputs[3:], dout, dlse, needs)[3:]
    total = torch.zeros_like(shared)
    for b, (sq, sk) in enumerate(zip(QUERIES, KEYS, strict=True)):
        rows, cols = (slice(c[b], c[b + 1]) for c in cu)
        alone = [inputs[0][rows], inputs[1][cols], inputs[2][cols]]
        rest = [_cut(x, "bhqk", slice(b, b + 1), sq, sk) for x in inputs[3:]]
        ends = [torch.tensor([0, n], dtype=torch.int32) for n in (sq, sk)]
        found = packed_gradients(spec, *alone, *ends, rest, dout[rows], dlse[:, rows], needs)
        total[..., :sq, :sk] += found[3]
        torch.testing.assert_close(own[b, ..., :sk], found[4][0])
        assert (own[b, ..., sk:] == 0).all()
    torch.testing.assert_close(shared, total)


@pytest.mark.parametrize("name", ["taylor", "causal"])
def test_plain_torch_runs_where_no_kernel_does(name: str, corpus, caplog, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = parse(str(corpus[name]).replace("float32", "float64"))
    inputs, cu, dout, dlse = draw(spec, dtype=spec.q.dtype)
    out, lse = execute_packed(spec, *inputs[:3], *cu)
    dlse = torch.where(lse.isfinite(), dlse, 0.0)
    given = (spec, *inputs, *cu, max(QUERIES), [], out, lse)
    found = run_varlen_backward(*given, dout, dlse, [True, False, True])
    want = packed_gradients(spec, *inputs, *cu, [], dout, dlse, [True, False, True])
    torch.testing.assert_close(found, want, equal_nan=True)
    assert "the site runs as plain torch" in caplog.text
    assert len(run_varlen_backward(*given, None, dlse, [True] * 3)) == 3


def test_off_the_gpu_autograd_goes_through_plain_torch(corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = corpus["sink_logits"]
    inputs, cu, dout, _ = draw(spec, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    out, _ = run_varlen(spec, *inputs[:3], *cu, max(QUERIES), inputs[3:])
    found = torch.autograd.grad(out, leaves, dout)
    plain = [x.detach() for x in inputs]
    want = packed_gradients(spec, *plain[:3], *cu, plain[3:], dout, None, [True] * 4)
    torch.testing.assert_close(list(found), want)


def test_wrong_inputs_are_named_by_the_launcher(corpus) -> None:
    spec = corpus["bert"]
    backward = varlen_backward_launcher(spec)
    (q, k, v, pad), (cu_q, cu_k), dout, lse = draw(spec, dtype=torch.float32)
    rest = (torch.zeros_like(dout), lse, dout)
    with pytest.raises(
        ValueError, match=r"dout: expected torch.float32 \[18, 2, 32\], found torch.float32 \[17"
    ):
        backward(q, k, v, pad, cu_q, cu_k, 9, 9, *rest[:2], dout[1:])
    with pytest.raises(
        ValueError, match=r"lse: expected torch.float32 \[2, 18\], found torch.float32 \[18, 2"
    ):
        backward(q, k, v, pad, cu_q, cu_k, 9, 9, rest[0], lse.T, dout)
    with pytest.raises(ValueError, match=r"cu_k: expected torch.int32 \[6\], found torch.int64 \[6\]"):
        backward(q, k, v, pad, cu_q, cu_k.long(), 9, 9, *rest)
    with pytest.raises(ValueError, match="max_k: expected the longest of 5 sequences of 22 tokens, found 3"):
        backward(q, k, v, pad, cu_q, cu_k, 9, 3, *rest)
    with pytest.raises(ValueError, match=r"valid: expected what broadcasts to \[5, 9\], found \[5, 8\]"):
        backward(q, k, v, pad[:, :8], cu_q, cu_k, 9, 9, *rest)


def test_nothing_is_launched_without_tokens(corpus) -> None:
    spec = corpus["causal"]
    (q, k, v), _, dout, lse = draw(spec, dtype=torch.float32)
    none = torch.zeros(3, dtype=torch.int32)
    given = (q[:0], k[:0], v[:0], none, none, 0, 0, dout[:0], lse[:, :0], dout[:0])
    grads = varlen_backward_launcher(spec)(*given, needs=(True, False, True))
    assert grads[0].shape == q[:0].shape
    assert grads[1] is None


def test_the_specs_that_backward_serves_have_this_backward_too(corpus) -> None:
    assert {name for name, spec in corpus.items() if can_run(spec, "varlen_backward")} == UNSERVED


def test_the_same_spec_gives_the_same_bytes_and_no_atomic_addition(corpus) -> None:
    for name in NAMES:
        source = emit(corpus[name], name=name, kind="varlen_backward").source
        own = canonical(corpus[name])
        assert source == emit(corpus[name], name=name, kind="varlen_backward").source
        assert (spec_of(source), kind_of(source)) == (own, "varlen_backward")
        assert "atomic_" not in source
        assert "\n\n\n\n" not in source, name
        assert not [line for line in source.splitlines() if line != line.rstrip()]
        types, ones = varlen_backward.KIND.types(own)
        constants = {"UPCAST", "BLOCK_M", "BLOCK_N"}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert {a.arg for a in node.args.args} - constants <= set(types) | set(ones)


def test_the_reference_in_the_file_is_the_spec_executed_for_each_sequence(corpus) -> None:
    for name in ("documents", "sink_logits", "angles", "sigmoid"):
        module = load(emit(corpus[name], name=name, kind="varlen_backward"))
        inputs, cu, *_ = draw(corpus[name])
        found = module.reference(*inputs, *cu)
        want, want_lse = execute_packed(canonical(corpus[name]), *inputs[:3], *cu, inputs[3:])
        torch.testing.assert_close(
            found[0].transpose(0, 1), want, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
        )
        torch.testing.assert_close(found[1], want_lse.double(), rtol=1e-9, atol=1e-9, msg=name)


def test_the_file_is_the_one_that_was_reviewed(corpus, golden) -> None:
    kernel = emit(corpus["biases"], name="biases_varlen_backward", kind="varlen_backward")
    golden("kernel/biases_varlen_backward.py", kernel.source.replace(kernel.key, "<key>"))


TEXT = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) {rest}"
)
LEAST = torch.finfo(torch.float32).min
CASES = {
    "causal": "mask=causal fill(replace,-inf) softmax",
    "padded": f"mask=(causal & padding(key,pad)) fill(replace,{LEAST}) softmax with pad=bk[b,t]:bool",
    "biased": "bias(rel) mask=none softmax with rel=bhqk[1,h,s,t]:bfloat16",
}


def compiles(case: str, d: int, *targets: str) -> None:
    spec = parse(TEXT.format(d=d, rest=CASES[case]))
    for row in report_rows(emit(spec, name="site", kind="varlen_backward"), *([targets] if targets else [])):
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert (row["stack"], row["spills"]) == (0, 0), row


def test_the_default_tiles_compile_without_spills() -> None:
    compiles("causal", 64, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("d", [64, 128])
def test_the_default_tiles_compile_without_spills_on_every_target(d: int, case: str) -> None:
    compiles(case, d)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "causal_from_the_end", "left_padded", "biases", "sink_logits"])
def test_gradients_on_a_gpu_equal_those_of_plain_torch(name: str, corpus) -> None:
    spec = corpus[name]
    lengths = (0, 1, 17, 63, 65, 129, 300), (5, 1, 65, 17, 0, 200, 300)
    inputs, cu, dout, dlse = draw(spec, *lengths)
    tokens = [x.to(spec.q.dtype) for x in inputs[:3]]
    rest = [x.to(o.dtype) for x, o in zip(inputs[3:], spec.captured, strict=True)]
    inputs, cu = [x.cuda() for x in (*tokens, *rest)], [x.cuda() for x in cu]
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    dout, dlse = dout.cuda().to(spec.q.dtype), dlse.cuda().float()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = run_varlen(spec, *inputs[:3], *cu, 300, inputs[3:], 300)
        dlse = torch.where(lse.abs() < 1e6, dlse, 0.0)
        found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        again = torch.autograd.grad(run_varlen(spec, *inputs[:3], *cu, 300, inputs[3:]), leaves, (dout, dlse))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    inputs = [x.detach() for x in inputs]
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    needs = [x.is_floating_point() for x in inputs]
    want = packed_gradients(spec, *wide[:3], *cu, wide[3:], dout.double(), dlse.double(), needs)
    module = load(emit(spec, name=name, kind="varlen_backward"))
    limits = [x for x, _ in module._limits([*inputs, *cu], dout.transpose(0, 1), dlse) if x is not None]
    for x, z, limit in zip(found, want, limits, strict=True):
        torch.testing.assert_close(x.double(), z, rtol=0, atol=limit.item(), equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_emitted_file_passes_its_own_test_on_a_gpu(name: str, corpus) -> None:
    assert load(emit(corpus[name], name=name, kind="varlen_backward")).main() == 0
