from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.triton import can_run, emit, tiles
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS
from attnc.codegen.triton.kinds.decode import share_lines
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec
from attnc.printer import parse
from tests.codegen.triton.test_tiles import Int, fills, kept, masks, spec_with

HERE = Path(__file__).parent


def read(file: str) -> dict[str, AttentionSpec]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return {n: parse(s) for n, _, s in (line.partition(" ") for line in lines if not line.startswith("#"))}


CACHES, CORPUS = read("caches.txt"), read("corpus.txt")
"""Specs as a decoder has them, which run always, and those of the forward, which are slow here."""
UNSERVED = ("mixed",)
"""What of the corpus has no decode kernel: values narrower than queries and keys."""
QUICK = (*CACHES, "angles", "rounded_least", "relu_shares")


def interpret(folder: Path, *arguments: str) -> dict[str, dict[str, object]]:
    """Return what interpret_decode.py found, by name of the run."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpret_decode.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["run"]: row for row in rows}


@pytest.fixture(scope="session")
def decoded(tmp_path_factory) -> dict[str, dict[str, object]]:
    return interpret(tmp_path_factory.mktemp("kernels"), "quick", *QUICK, "broken")


def check(name: str, rows: dict[str, dict[str, object]], runs: int = 5) -> None:
    """Check the self-test of one spec, and its comparisons with the spec executed in fp64."""
    own = rows[f"self-test {name}"]
    assert own["code"] == 0, own["text"]
    assert str(own["text"]).count("\n") == 5  # four cases and the verdict
    found = {run: row for run, row in rows.items() if run.startswith(f"{name} torch.")}
    assert len(found) >= runs
    for run, row in found.items():
        assert row["out"] <= 1, run
        assert row["lse"] <= 1, run
        assert row["strange"], f"{run}: rows that see no key"
        assert row["strange_lse"], f"{run}: log-sum-exp of rows that see no key"


@pytest.mark.parametrize("name", QUICK)
def test_shares_of_the_keys_add_up_to_the_executed_spec(name: str, decoded) -> None:
    check(name, decoded)


def test_rows_that_see_no_key_were_among_them(decoded) -> None:
    for name in ("cache", "padded_cache", "signed_cache", "documents_in_a_cache"):  # NaN, and finite fills
        assert any(r["hidden_rows"] for run, r in decoded.items() if run.startswith(f"{name} torch.")), name


def test_the_self_test_notices_every_broken_kernel(decoded) -> None:
    broken = {run: row for run, row in decoded.items() if run.startswith("broken ")}
    assert len(broken) >= 15
    assert [run for run, row in broken.items() if row["code"] == 0] == []


@pytest.mark.slow
def test_every_spec_of_the_corpus_at_all_lengths_and_numbers_of_shares(tmp_path) -> None:
    names = [n for n in (*CACHES, *CORPUS) if n not in UNSERVED]
    rows = interpret(tmp_path, "all", *names)
    for name in names:
        check(name, rows)


def visit(spec: AttentionSpec, sq: int, sk: int, bn: int, splits: int) -> list[list[int]]:
    """Run the emitted loop in each share; return the tiles of keys of each."""
    seen: list[list[int]] = []
    tl = SimpleNamespace(
        maximum=lambda a, b: Int(max(a, b)),
        minimum=lambda a, b: Int(min(a, b)),
        where=lambda c, a, b: Int(a if c else b),
        cdiv=lambda a, b: Int(Int(a) + b - 1) // b,
    )
    text = "\n".join(share_lines(spec, ["see(int(n))"]))
    for split in range(splits):
        seen.append([])
        sizes = {"sq": Int(sq), "sk": Int(sk), "splits": Int(splits), "split": Int(split), "BLOCK_N": bn}
        exec(text, {"tl": tl, "see": seen[-1].append, **sizes})
    return seen


@settings(max_examples=150, deadline=None)
@given(masks, fills, st.integers(1, 4), st.integers(1, 40), st.sampled_from([2, 4]), st.integers(1, 5))
def test_every_key_that_matters_is_in_one_share_and_all_shares_but_the_last_are_equal(
    mask, fill, sq, sk, bn, splits
) -> None:
    spec = dataclasses.replace(spec_with(mask), fill=fill)
    seen = visit(spec, sq, sk, bn, splits)
    starts = [n for share in seen for n in share]
    assert len(set(starts)) == len(starts), "a tile is visited twice"
    assert all(n % bn == 0 for n in starts), "tiles overlap"
    if tiles.floor(mask, fill) is not None or not tiles.may_skip(fill):
        assert set(starts) == set(range(0, sk, bn)), "a row that sees nothing needs all keys"
    visible = {int(k) // bn * bn for k in kept(mask, sq, sk).any(0).nonzero()}
    assert visible <= set(starts), "a visible key is left out"
    sizes = [len(share) for share in seen if share]
    assert all(seen[: len(sizes)]), "a share without keys before one with some"
    assert len(set(sizes[:-1])) <= 1
    assert not sizes or sizes[-1] <= sizes[0]


def test_a_window_far_into_a_cache_is_divided_among_all_shares() -> None:
    spec = CACHES["window_of_a_cache"]
    assert visit(spec, 1, 1000, 4, 3) == [[0, 976, 980], [984, 988, 992], [996]]


@pytest.mark.parametrize("name", ["window_of_a_cache", "capped_sinks"])
def test_the_file_is_the_one_that_was_reviewed(name: str, golden) -> None:
    kernel = emit(CACHES[name], name=name, kind="decode")
    golden(f"kernel/decode_{name}.py", kernel.source.replace(kernel.key, "<key>"))


def test_what_of_the_corpus_cannot_run() -> None:
    found = {name for name, spec in {**CACHES, **CORPUS}.items() if can_run(spec, "decode")}
    assert found == set(UNSERVED)


def test_files_stand_alone_and_name_their_spec_and_kind() -> None:
    for name, spec in CACHES.items():
        source = emit(spec, name=name, kind="decode").source
        tree = ast.parse(source)
        imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imports <= {"os", "sys", "torch", "triton", "triton.language", "numpy"}
        assert (spec_of(source), kind_of(source)) == (canonical(spec), "decode")
        assert not [line for line in source.splitlines() if line != line.rstrip()]
        assert "\n\n\n\n" not in source
        assert not [x for x in source.splitlines() if len(x) > 120 and not x.startswith("spec ")]


def test_the_type_of_every_argument_of_both_kernels_is_known() -> None:
    kind = KINDS["decode"]
    for spec in CACHES.values():
        tree = ast.parse(emit(spec, kind="decode").source)
        types, ones = kind.types(canonical(spec))
        for program in kind.programs:
            fn = next(n for n in ast.walk(tree) if getattr(n, "name", "") == f"site_0_{program.kernel}")
            names = {a.arg for a in fn.args.args} - {"BLOCK_M", "BLOCK_N", *program.constants}
            assert names <= set(types) | set(ones)


def test_wrong_inputs_are_named() -> None:
    attend = load(emit(CACHES["cache"], name="cache", kind="decode")).attend
    q, k = torch.zeros(1, 4, 1, 32).half(), torch.zeros(1, 2, 9, 32).half()
    with pytest.raises(ValueError, match=r"k: expected torch\.float16 \[1, 2, 9, 32\], found torch\.float32"):
        attend(q, k.float(), k)
    with pytest.raises(
        ValueError, match=r"q: expected torch\.float16 \[1, 4, 1, 32\], found .*\[1, 3, 1, 32\]"
    ):
        attend(q[:, :3], k, k)
    with pytest.raises(ValueError, match="expected at least one key, found none"):
        attend(q, k[:, :, :0], k[:, :, :0])
    with pytest.raises(ValueError, match="splits: expected at least 1, found 0"):
        attend(q, k, k, splits=0)


TEXT = (
    "attn q=bhqd[b,h,s,{d}]:{t} k=bhkd[b,hkv,t,{d}]:{t} v=bhke[b,hkv,t,{e}]:{t} group=8 scale(0.125) "
    "mask=(causal(end) & {mask}) fill(replace,-inf) softmax with {operand}"
)
PADDED = {"mask": "padding(key,pad)", "operand": "pad=bk[b,t]:bool"}
DENSE = {"mask": "dense(m)", "operand": "m=bhqk[b,1,s,t]:bool"}


def check_compiled(spec: AttentionSpec, targets: tuple[str, ...], kind: str = "decode") -> None:
    rows = report_rows(emit(spec, name="site", kind=kind), targets)
    assert [row["program"] for row in rows] == ["kernel", "combine"] * len(targets)
    for row in rows:
        assert row["error"] is None, row
        assert not row["over_limit"], row
        assert (row["stack"], row["spills"]) == (0, 0), row
        assert 10 <= row["registers"] <= 512, row


def test_both_kernels_compile_for_hopper_without_spills() -> None:
    check_compiled(parse(TEXT.format(d=128, e=128, t="bfloat16", **PADDED)), ("sm_90",))


@pytest.mark.slow
@pytest.mark.parametrize("case", [PADDED, DENSE], ids=["padded", "dense"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("d", "e"), [(32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)]
)
def test_the_default_tiles_compile_for_every_target_without_spills(d, e, dtype, case) -> None:
    check_compiled(parse(TEXT.format(d=d, e=e, t=dtype, **case)), ("sm_80", "sm_90", "sm_100", "gfx942"))
