from __future__ import annotations

import dataclasses

import pytest

from attnc.codegen.triton import emit
from attnc.codegen.triton.aot import INSTRUCTIONS, compile_for, count_instructions, report_rows
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


def check(rows, around: int = 0) -> None:
    """Hold rows to no spill in a loop over keys, and to ``around`` bytes of stack beside these."""
    for row in rows:
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert not row["loop_spills"], row
        assert row["stack"] <= around, row
        assert around or not row["spills"], row
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
def test_the_default_tiles_spill_in_no_loop(d: int, dtype: str, case) -> None:
    found = parse(str(spec(d, *case)).replace("bfloat16", dtype))
    rows = report_rows(emit(found, name="site"))
    if dtype == "float32" and d > 64:  # the exception that configs.py names
        assert not [r for r in rows if r["error"] or r["over_limit"]]
        rows = [r for r in rows if r["target"] == "gfx942"]
    check(rows, around=32)  # what pointers into wide heads need on sm_100, once per tile


def test_hopper_runs_the_contractions_on_tensor_cores() -> None:
    kernel = emit(spec(64, *CAUSAL), name="site")
    ptx = compile_for(kernel, load(kernel), "sm_90", KINDS["forward"].programs[1]).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "ex2.approx" in ptx


def test_instructions_are_counted_by_kind() -> None:
    sass = """
	code for sm_90a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000e620000000800 */
        /*0010*/               @P0 LDGSTS.E.BYPASS.128 [R8], desc[UR6] ;      /* 0x00000a00ff017b82 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ; /* 0x00000a00ff017b82 */
        /*0030*/             @!UP1 UTMALDG.4D [UR8], [UR6] ;                  /* 0x00000a00ff017b82 */
        /*0040*/                   MUFU.EX2 R5, R5 ;                          /* 0x00000a00ff017b82 */
        /*0050*/                   MUFU.RCP R5, R5 ;                          /* 0x00000a00ff017b82 */
        /*0060*/                   LDL R3, [R1+0x10] ;                        /* 0x00000a00ff017b82 */
        /*0070*/                   NOP;                                       /* 0x00000a00ff017b82 */
"""
    found = {"instructions": 7, "async_copies": 1, "hgmma": 1, "tma_loads": 1, "exp2": 1, "spills": 1}
    assert count_instructions(sass) == {name: found.get(name, 0) for name in INSTRUCTIONS}
    amd = "\t.loc 1 2\n\tv_mfma_f32_32x32x8_bf16 a[0:15], v[1:2]\n\tv_exp_f32_e32 v1, v2\n"
    found = {"instructions": 2, "mfma": 1, "exp2": 1}
    assert count_instructions(amd) == {name: found.get(name, 0) for name in INSTRUCTIONS}


def test_rows_count_the_instructions_of_the_gpu(corpus) -> None:
    for row in report_rows(emit(spec(64, *CAUSAL), name="site"), ("sm_80", "gfx942")):
        assert row["exp2"] > 0, row
        assert row["hmma" if row["target"] == "sm_80" else "mfma"] > 0, row
        assert row["async_copies"] > 0 or row["target"] == "gfx942", row
        assert row["instructions"] > 500, row
        loops = (row["loop_instructions"], row["loop_spills"])
        if row["target"] == "sm_80":
            assert 100 < loops[0] < row["instructions"], row
            assert loops[1] == 0, row
        else:
            assert loops == (None, None), row


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
