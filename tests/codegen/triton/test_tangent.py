"""Tangents by emitted kernels, under Triton's interpreter: a part of the corpus, and all of it if slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnc.codegen.tangents import tangent
from attnc.codegen.triton import can_run, emit
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.kinds import TARGETS
from attnc.codegen.triton.launch import run_tangent, tangent_launcher
from attnc.codegen.triton.store import load
from attnc.errors import UnsupportedError
from attnc.printer import parse

LINES = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8").splitlines()
UNSERVED = {"latent", "mixed"}
"""Wide heads, and values narrower than queries and keys."""
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith("#")]
NAMES = [name for name in NAMES if name not in UNSERVED]
SOME = (
    "left_padded",  # rows that spread over hidden keys, in fp16, with a group
    "biases",  # rows of zeros
    "sink_logits",
    "expression",
    "sigmoid",
)


@pytest.fixture(scope="session")
def some(interpret) -> dict[str, dict[str, object]]:
    return interpret("interpret_tangent.py", "short", *SOME)


def check(found: dict[str, dict[str, object]], name: str) -> None:
    row = found[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    assert row["text"].count("\n") == 5  # four cases and the verdict
    rows = {run: row for run, row in found.items() if run.startswith(f"{name} torch.")}
    assert rows
    for run, row in rows.items():
        assert len(row["errors"]) == 4
        assert max(row["errors"]) <= 1, run
        assert row["undefined"] == 0, run


@pytest.mark.parametrize("name", SOME)
def test_tangents_are_those_of_plain_torch(name: str, some) -> None:
    check(some, name)


def test_rows_that_see_no_key_were_among_them(some) -> None:
    assert any(row["hidden_rows"] for run, row in some.items() if run.startswith("left_padded torch."))


def test_a_tangent_that_is_not_given_is_zero(some) -> None:
    assert some["absent expression"]["same"] == [True] * 6


@pytest.mark.slow
def test_tangents_of_the_whole_corpus_are_those_of_plain_torch(interpret) -> None:
    found = interpret("interpret_tangent.py", *NAMES)
    for name in NAMES:
        check(found, name)


@pytest.mark.slow
def test_the_self_test_notices_every_broken_file(interpret) -> None:
    found = interpret("interpret_tangent.py", "broken")
    assert len(found) >= 15
    assert [run for run, row in found.items() if not row["noticed"]] == []


@pytest.mark.parametrize("name", NAMES)
def test_lines_fit_and_nothing_but_torch_and_triton_is_needed(name: str, corpus) -> None:
    source = emit(corpus[name], name=name, kind="tangent").source
    long = [line for line in source.splitlines() if len(line) > 120 and not line.startswith("spec ")]
    assert long == []
    imports = {line.split()[1] for line in source.splitlines() if line.lstrip().startswith("import ")}
    assert imports == {"os", "sys", "torch", "triton", "triton.language", "numpy"}


def test_the_file_is_the_one_that_was_reviewed(corpus, golden) -> None:
    kernel = emit(corpus["causal"], name="causal_tangent", kind="tangent")
    golden("kernel/causal_tangent.py", kernel.source.replace(kernel.key, "<key>"))


def test_what_no_kernel_serves_is_named_and_runs_as_plain_torch(corpus, caplog) -> None:
    for name in UNSERVED:
        assert can_run(corpus[name], "tangent") is not None
    with pytest.raises(UnsupportedError, match="head sizes of 1 to 256 in forward mode, found 320"):
        emit(corpus["latent"], kind="tangent")
    spec = parse(str(corpus["causal"]).replace("float32", "float64"))
    q, k, v = (torch.randn(1, h, n, 32, dtype=torch.float64) for h, n in ((2, 3), (1, 5), (1, 5)))
    tangents = [q.flip(-1), None, v.flip(-1)]
    torch.testing.assert_close(run_tangent(spec, q, k, v, [], tangents), tangent(spec, q, k, v, [], tangents))
    assert "the site runs as plain torch" in caplog.text


def test_wrong_inputs_are_named(corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = corpus["causal"]
    q, k, v = (torch.randn(1, h, n, 32) for h, n in ((2, 3), (1, 5), (1, 5)))
    kernel = tangent_launcher(spec)
    assert kernel is not None
    with pytest.raises(
        ValueError, match=r"tk: expected torch\.float32 \[1, 1, 5, 32\], found torch\.float32 \[1, 1, 4"
    ):
        kernel(q, k, v, q, k[:, :, :4], v)
    with pytest.raises(ValueError, match="expected tensors on a GPU, or TRITON_INTERPRET=1"):
        kernel(q, k, v, q, k, v)


SPEC = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) {rest}"
)
CAUSAL = "mask=causal fill(replace,-inf) softmax"
PADDED = "mask=(causal & padding(key,pad)) fill(replace,-inf) softmax with pad=bk[b,t]:bool"
BIASED = "bias(rel) mask=none softmax with rel=bhqk[1,h,s,t]:bfloat16"


def compiles(text: str, targets: tuple[str, ...], stack: int = 0, in_loops: int = 0) -> None:
    kernel = emit(parse(text), name="site", kind="tangent")
    rows = report_rows(kernel, targets)
    assert {row["target"] for row in rows} == set(targets)
    for row in rows:
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert row["stack"] <= stack, row
        assert (row["loop_spills"] or 0) <= in_loops, row
        assert stack or not row["spills"], row


@pytest.mark.parametrize("d", [64, 128])
def test_a_causal_kernel_compiles_for_every_target_without_spills(d: int) -> None:
    compiles(SPEC.format(d=d, rest=CAUSAL), TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("rest", [CAUSAL, PADDED, BIASED], ids=["causal", "padded", "biased"])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_kernels_compile_for_every_target_with_few_spills(d: int, rest: str) -> None:
    # as test_gate.py has it: two outputs are carried, and four tensors loaded in a turn
    known = {} if rest == CAUSAL else {"stack": 40, "in_loops": 4}
    compiles(SPEC.format(d=d, rest=rest), TARGETS, **known)


@pytest.mark.slow
@pytest.mark.parametrize("d", [32, 64, 128])
def test_kernels_in_fp32_compile_without_spills(d: int) -> None:
    compiles(SPEC.format(d=d, rest=PADDED).replace("bfloat16", "float32"), TARGETS)


def test_the_kernel_that_moves_no_captured_tensor_is_compiled_apart() -> None:
    kernel = emit(parse(SPEC.format(d=64, rest=BIASED)), name="site", kind="tangent")
    rows = {row["program"]: row for row in report_rows(kernel, ("sm_90",))}
    assert set(rows) == {"kernel", "kernel still"}
    assert rows["kernel still"]["registers"] < rows["kernel"]["registers"]
    assert load(kernel).site_kernel is not None
