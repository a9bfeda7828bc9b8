from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from attnc.codegen.triton import can_run, emit, run_varlen
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import varlen
from attnc.codegen.triton.launch import launcher
from attnc.codegen.triton.packed import execute_packed
from attnc.codegen.triton.store import load
from attnc.printer import parse

LINES = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith(("#", "mixed "))]
SOME = NAMES[2::3]


@pytest.fixture(scope="module")
def rows(interpret):
    """Return what the interpreter made of a third of the corpus."""
    return interpret("interpret_varlen.py", *SOME)


@pytest.fixture(scope="module")
def more_rows(interpret):
    """Return what the interpreter made of the rest."""
    return interpret("interpret_varlen.py", *(n for n in NAMES if n not in SOME))


def check(name: str, rows) -> None:
    row = rows[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    assert row["text"].count("\n") == 5  # four cases and the verdict
    found = {run: row for run, row in rows.items() if run.startswith(f"{name} torch.")}
    assert len(found) == 2
    for run, row in found.items():
        assert row["out"] <= 1, run
        assert row["lse"] <= 1, run
        assert row["strange"], f"{run}: rows that see no key"
        assert row["strange_lse"], f"{run}: log-sum-exp of rows that see no key"
        assert row["hidden_rows"] < row["rows"], run


@pytest.mark.parametrize("name", SOME)
def test_packed_sequences_give_what_the_spec_gives_for_each(name: str, rows) -> None:
    check(name, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in SOME])
def test_packed_sequences_give_what_the_spec_gives_for_each_in_the_rest(name: str, more_rows) -> None:
    check(name, more_rows)


def test_the_self_test_notices_every_broken_kernel(rows) -> None:
    broken = {run: row for run, row in rows.items() if run.startswith("broken ")}
    assert len(broken) >= 7
    assert [run for run, row in broken.items() if row["code"] == 0] == []


def test_the_file_is_the_one_that_was_reviewed(corpus, golden) -> None:
    kernel = emit(corpus["documents"], name="documents_varlen", kind="varlen")
    golden("kernel/documents_varlen.py", kernel.source.replace(kernel.key, "<key>"))


def test_the_whole_corpus_can_run_but_for_mixed_dtypes(corpus) -> None:
    assert {name for name, spec in corpus.items() if can_run(spec, "varlen")} == {"mixed"}


def test_the_file_stands_alone_and_names_its_spec_and_kind(corpus) -> None:
    for name in SOME:
        source = emit(corpus[name], name=name, kind="varlen").source
        own = canonical(corpus[name])
        assert (spec_of(source), kind_of(source)) == (own, "varlen")
        assert not [line for line in source.splitlines() if line != line.rstrip()]
        assert "\n\n\n\n" not in source
        assert not [x for x in source.splitlines() if len(x) > 120 and not x.startswith("spec ")]
        kernel = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == f"{name}_kernel")
        types, ones = varlen.KIND.types(own)
        constants = {"DESCRIPTORS", "UPCAST", "BLOCK_M", "BLOCK_N"}
        assert {a.arg for a in kernel.args.args} - constants <= set(types) | set(ones)


def test_the_reference_in_the_file_is_the_spec_executed_for_each_sequence(corpus) -> None:
    for name in SOME:
        module = load(emit(corpus[name], name=name, kind="varlen"))
        lengths = module.LENGTHS[1]
        padded = [x.double() if x.is_floating_point() else x for x in module._sample(1, "cpu")]
        q, k, v = (module._pack(x, n) for x, n in zip(padded, (lengths[0], *lengths[1:] * 2), strict=False))
        cu = [torch.tensor([0, *n]).cumsum(0).int() for n in lengths]
        found = module._in_turn(padded, lengths, torch.float64)
        want, want_lse = execute_packed(canonical(corpus[name]), q, k, v, *cu, padded[3:])
        torch.testing.assert_close(
            found[0].transpose(0, 1), want, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name
        )
        torch.testing.assert_close(found[1], want_lse.double(), rtol=1e-9, atol=1e-9, msg=name)


def draw(spec, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]):
    """Return packed q, k, v, where sequences begin, and captured tensors padded to the longest."""
    hkv = 2
    q, k, v = (
        torch.randn(sum(n), h, o.shape[3])
        for o, n, h in (
            (spec.q, q_lengths, hkv * spec.group_size),
            (spec.k, k_lengths, hkv),
            (spec.v, k_lengths, hkv),
        )
    )
    sizes = {"b": len(q_lengths), "h": q.shape[1], "s": max(q_lengths), "t": max(k_lengths)}
    captured = [torch.randn([sizes.get(d, d) for d in o.shape]) for o in spec.captured]
    captured = [
        x > -1 if o.dtype == torch.bool else x.to(o.dtype)
        for x, o in zip(captured, spec.captured, strict=True)
    ]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lengths, k_lengths))
    return q, k, v, cu_q, cu_k, captured


QUERIES, KEYS = (3, 0, 9, 1, 5), (7, 4, 9, 0, 2)


@pytest.mark.parametrize("name", ["causal_from_the_end", "left_padded", "biases", "documents", "sigmoid"])
def test_off_the_gpu_each_sequence_is_as_if_it_were_alone(name: str, corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = corpus[name]
    q, k, v, cu_q, cu_k, captured = draw(spec, QUERIES, KEYS)
    out, lse = run_varlen(spec, q, k, v, cu_q, cu_k, max(QUERIES), captured)
    assert (out.shape, lse.shape) == ((18, q.shape[1], v.shape[2]), (q.shape[1], 18))
    for b, (sq, sk) in enumerate(zip(QUERIES, KEYS, strict=True)):
        tokens = slice(cu_q[b], cu_q[b + 1])
        alone = (q[tokens], *(x[cu_k[b] : cu_k[b + 1]] for x in (k, v)))
        own = []
        for o, x in zip(spec.captured, captured, strict=True):
            kept = {"b": slice(b, b + 1), "q": slice(sq), "k": slice(sk)}
            cuts = (
                slice(None) if n == 1 else kept.get(a, slice(None))
                for a, n in zip(o.axes, o.shape, strict=True)
            )
            own.append(x[tuple(cuts)])
        want, want_lse = spec(*(x[None].transpose(1, 2) for x in alone), tuple(own))
        torch.testing.assert_close(out[tokens], want[0].transpose(0, 1), equal_nan=True)
        torch.testing.assert_close(lse[:, tokens], want_lse[0])


def test_a_sequence_without_keys_gives_zeros(corpus) -> None:
    spec = corpus["causal"]
    q, k, v, cu_q, cu_k, _ = draw(spec, (3, 2), (4, 0))
    out, lse = run_varlen(spec, q, k, v, cu_q, cu_k, 3)
    assert (out[3:] == 0).all()
    assert (lse[:, 3:] == -torch.inf).all()
    assert out[:3].isfinite().all()


def test_a_sequence_may_compute_with_its_number(corpus) -> None:
    text = str(corpus["causal"])
    spec = parse(text.replace("mask=causal", "mask={k<=q+b}"))
    q, k, v, cu_q, cu_k, _ = draw(spec, (6, 6, 6), (8, 8, 8))
    assert can_run(spec, "varlen") is None
    out, _ = run_varlen(spec, q, k, v, cu_q, cu_k, 6)
    for b in range(3):
        alone = parse(text.replace("mask=causal", f"mask=window(right={b})"))
        cu_6, cu_8 = torch.tensor([0, 6], dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32)
        part = slice(6 * b, 6 * b + 6), slice(8 * b, 8 * b + 8)
        want, _ = run_varlen(alone, q[part[0]], k[part[1]], v[part[1]], cu_6, cu_8, 6)
        torch.testing.assert_close(out[part[0]], want)


def test_wrong_inputs_are_named_by_the_launcher(corpus) -> None:
    spec = corpus["bert"]
    attend = launcher(spec, kind="varlen")
    q, k, v, cu_q, cu_k, captured = draw(spec, QUERIES, KEYS)
    with pytest.raises(
        ValueError, match=r"q: expected torch.float32 \[18, 2, 32\], found torch.float32 \[18, 1, 32\]"
    ):
        attend(q[:, :1], k, v, *captured, cu_q, cu_k, 9, 9)
    with pytest.raises(ValueError, match=r"v: expected torch.float32 \[22, 2, 32\]"):
        attend(q, k, v[1:], *captured, cu_q, cu_k, 9, 9)
    with pytest.raises(ValueError, match=r"cu_q: expected torch.int32 \[6\], found torch.int64 \[6\]"):
        attend(q, k, v, *captured, cu_q.long(), cu_k, 9, 9)
    with pytest.raises(ValueError, match=r"cu_k: expected torch.int32 \[6\], found torch.int32 \[5\]"):
        attend(q, k, v, *captured, cu_q, cu_k[1:], 9, 9)
    with pytest.raises(ValueError, match="max_q: expected the longest of 5 sequences of 18 queries, found 3"):
        attend(q, k, v, *captured, cu_q, cu_k, 3, 9)
    with pytest.raises(ValueError, match=r"valid: expected what broadcasts to \[5, 9\], found \[5, 8\]"):
        attend(q, k, v, captured[0][:, :8], cu_q, cu_k, 9, 9)


TEXT = (
    "attn q=bhqd[b,h,s,{d}]:{dtype} k=bhkd[b,hkv,t,{d}]:{dtype} v=bhke[b,hkv,t,{d}]:{dtype} group=4"
    " scale(0.125) mask={mask}"
)
LEAST = torch.finfo(torch.float32).min
MASKS = {
    "full": "none softmax",
    "causal": "causal fill(replace,-inf) softmax",
    "causal_end": "causal(end) fill(replace,-inf) softmax",
    "window": "window(left=1023,right=0) fill(replace,-inf) softmax",
    "padded": f"(causal & padding(key,pad)) fill(replace,{LEAST}) softmax with pad=bk[b,t]:bool",
}


def compiles(spec, *targets: str, around: int = 0) -> None:
    rows = report_rows(emit(spec, name="site", kind="varlen"), *([targets] if targets else []))
    for row in rows:
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert not row["loop_spills"], row
        assert row["stack"] <= around, row
        assert around or not row["spills"], row


def test_the_default_tiles_compile_without_spills() -> None:
    compiles(parse(TEXT.format(d=64, dtype="bfloat16", mask=MASKS["causal"])), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("d", [64, 128])
def test_the_default_tiles_compile_without_spills_on_every_target(d: int, mask: str) -> None:
    compiles(parse(TEXT.format(d=d, dtype="bfloat16", mask=mask)))


@pytest.mark.slow
def test_the_whole_corpus_compiles(corpus) -> None:
    for name in NAMES:
        compiles(corpus[name], around=72)  # as test_gate.py has it, for latent heads


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["causal", "causal_from_the_end", "left_padded", "window_and_sinks", "biases"]
)
def test_packed_sequences_on_a_gpu_equal_the_executed_spec(name: str, corpus) -> None:
    spec = corpus[name]
    lengths = (0, 1, 17, 63, 65, 129, 1000), (5, 1, 65, 17, 0, 513, 1000)
    q, k, v, cu_q, cu_k, captured = draw(spec, *lengths)
    q, k, v = (x.to("cuda", spec.q.dtype) for x in (q, k, v))
    cu_q, cu_k, captured = cu_q.cuda(), cu_k.cuda(), [x.cuda() for x in captured]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = run_varlen(spec, q, k, v, cu_q, cu_k, 1000, captured)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want, want_lse = execute_packed(spec, *(x.double() for x in (q, k, v)), cu_q, cu_k, captured)
    atol = 4 * torch.finfo(q.dtype).eps * v.abs().max().item()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
