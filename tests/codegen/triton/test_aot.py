from __future__ import annotations

import dataclasses

import pytest

from attnc.codegen.triton import emit
from attnc.codegen.triton.aot import compile_for, report_rows
from attnc.codegen.triton.configs import SHARED_LIMIT, Config
from attnc.codegen.triton.kinds import KINDS, TARGETS
from attnc.codegen.triton.store import load
from attnc.errors import CodegenError
from attnc.printer import parse

MIN = -3.4028234663852886e38
TEXT = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) mask={mask} {rest}"
)
CAUSAL = ("causal", "fill(replace,-inf) softmax")
PADDED = ("(causal & padding(key,pad))", f"fill(replace,{MIN}) softmax with pad=bk[b,t]:bool")


def spec(d: int, mask: str, rest: str):
    return parse(TEXT.format(d=d, mask=mask, rest=rest))


def check(rows) -> None:
    for row in rows:
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert (row["stack"], row["spills"]) == (0, 0), row
        assert 0 < row["shared"] <= row["shared_limit"], row
        assert 16 <= row["registers"] <= 512, row


@pytest.mark.parametrize("target", TARGETS)
def test_causal_and_padded_kernels_compile_without_spills(target: str) -> None:
    for d, case in ((64, CAUSAL), (64, PADDED)):
        check(report_rows(emit(spec(d, *case), name="site"), (target,)))


def test_a_bert_site_compiles_for_every_target_in_fp32(corpus) -> None:
    rows = report_rows(emit(corpus["bert"], name="bert"))
    assert list(dict.fromkeys(row["target"] for row in rows)) == list(TARGETS)
    assert {row["program"] for row in rows if row["target"] == "sm_90"} == {
        "kernel pointers",
        "kernel descriptors",
    }
    check(rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CAUSAL, PADDED], ids=["causal", "padded"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_the_default_tiles_compile_without_spills(d: int, dtype: str, case) -> None:
    found = parse(str(spec(d, *case)).replace("bfloat16", dtype))
    rows = report_rows(emit(found, name="site"))
    if dtype == "float32" and d > 64:  # the exception that configs.py names
        assert not [r for r in rows if r["error"] or r["over_limit"]]
        rows = [r for r in rows if r["target"] == "gfx942"]
    check(rows)


@pytest.mark.slow
def test_the_whole_corpus_compiles(corpus) -> None:
    for name, found in corpus.items():
        check(report_rows(emit(found, name=name)))


def test_hopper_runs_the_contractions_on_tensor_cores() -> None:
    kernel = emit(spec(64, *CAUSAL), name="site")
    ptx = compile_for(kernel, load(kernel), "sm_90", KINDS["forward"].programs[1]).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "ex2.approx" in ptx


def test_a_config_over_the_shared_memory_limit_is_reported() -> None:
    kernel = emit(spec(128, *CAUSAL), name="site", configs={"sm_90": Config(64, 128, 4, 6)})
    rows = {row["program"]: row for row in report_rows(kernel, ("sm_90",))}
    assert rows["kernel descriptors"]["over_limit"]
    assert rows["kernel descriptors"]["shared"] > SHARED_LIMIT["sm_90"]
    assert not rows["kernel pointers"]["over_limit"]  # its tiles are in a table of their own


def test_a_kernel_that_does_not_compile_is_reported_with_the_compilers_words() -> None:
    kernel = emit(spec(64, *CAUSAL), name="site", configs={"sm_90": Config(64, 8, 4, 2)})
    row = report_rows(kernel, ("sm_90",))[0]
    assert row["registers"] is None
    assert "16" in row["error"]  # the least size of a contraction


def test_interpreter_mode_is_refused(monkeypatch, corpus) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(CodegenError, match="expected TRITON_INTERPRET unset, found 1"):
        report_rows(emit(corpus["plain"]))


def test_a_file_that_names_no_spec_is_refused(corpus) -> None:
    kernel = emit(corpus["plain"], name="site")
    with pytest.raises(CodegenError, match="line 'spec    attn"):
        report_rows(
            dataclasses.replace(kernel, source=kernel.source.replace("spec    attn", "attn"), key="nospec")
        )
