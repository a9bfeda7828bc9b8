from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from attnc.block_list import BlockList
from attnc.codegen.ops import execute
from attnc.codegen.triton import can_run, emit, run_blocks
from attnc.codegen.triton.aot import compile_for, report_rows
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import blocks as kind
from attnc.codegen.triton.launch import launcher
from attnc.codegen.triton.store import load
from attnc.masks import Grid
from attnc.printer import parse

LINES = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith(("#", "mixed "))]
SOME = NAMES[1::3]


@pytest.fixture(scope="module")
def rows(interpret):
    """Return what the interpreter made of a third of the corpus."""
    return interpret("interpret_blocks.py", *SOME)


@pytest.fixture(scope="module")
def more_rows(interpret):
    """Return what the interpreter made of the rest."""
    return interpret("interpret_blocks.py", *(n for n in NAMES if n not in SOME))


def check(name: str, rows) -> None:
    row = rows[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    assert row["text"].count("\n") == 5  # four cases and the verdict
    found = {run: row for run, row in rows.items() if run.startswith(f"{name} torch.")}
    assert len(found) == (2 if name == "packed" else 3)
    for run, row in found.items():
        assert row["out"] <= 1, run
        assert row["lse"] <= 1, run
        assert row["strange"], f"{run}: rows that see no key"
        assert row["strange_lse"], f"{run}: log-sum-exp of rows that see no key"
        assert row["hidden_rows"] < row["rows"], run


@pytest.mark.parametrize("name", SOME)
def test_listed_blocks_give_what_the_spec_gives_over_them(name: str, rows) -> None:
    check(name, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in SOME])
def test_listed_blocks_give_what_the_spec_gives_over_them_in_the_rest(name: str, more_rows) -> None:
    check(name, more_rows)


def test_rows_without_a_block_were_among_them(rows) -> None:
    assert all(row["hidden_rows"] >= 32 for run, row in rows.items() if run.startswith("causal"))


@pytest.mark.parametrize("name", ["causal", "biases"])
def test_disjoint_lists_merge_by_their_log_sum_exp(name: str, rows) -> None:
    row = rows[f"merged {name}"]
    assert row["out"] <= 2  # two calls went into it, each within its limit
    assert row["lse"] <= 2
    assert row["strange"]
    assert row["hidden_rows"] >= 32
    assert sum(row["one_sided"]) > 0  # rows to which one list alone shows something


def test_the_self_test_notices_every_broken_kernel(rows) -> None:
    broken = {run: row for run, row in rows.items() if run.startswith("broken ")}
    assert len(broken) >= 8
    assert [run for run, row in broken.items() if row["code"] == 0] == []


def test_the_file_is_the_one_that_was_reviewed(corpus, golden) -> None:
    kernel = emit(corpus["causal"], name="causal_blocks", kind="blocks")
    golden("kernel/causal_blocks.py", kernel.source.replace(kernel.key, "<key>"))


def test_the_whole_corpus_can_run_but_for_mixed_dtypes(corpus) -> None:
    assert {name for name, spec in corpus.items() if can_run(spec, "blocks")} == {"mixed"}


def test_the_file_stands_alone_and_names_its_spec_and_kind(corpus) -> None:
    for name in SOME:
        spec = corpus[name]
        source = emit(spec, name=name, kind="blocks").source
        assert (spec_of(source), kind_of(source)) == (canonical(spec), "blocks")
        assert not [line for line in source.splitlines() if line != line.rstrip()]
        assert "\n\n\n\n" not in source
        assert not [x for x in source.splitlines() if len(x) > 120 and not x.startswith("spec ")]
        kernel = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == f"{name}_kernel")
        types, ones = kind.KIND.types(canonical(spec))
        constants = {"DESCRIPTORS", "UPCAST", "ROWS", "COLUMNS", "BLOCK_M", "BLOCK_N"}
        assert {a.arg for a in kernel.args.args} - constants <= set(types) | set(ones)


def test_the_reference_in_the_file_is_the_executed_spec_over_the_list(corpus) -> None:
    for name in SOME:
        spec = corpus[name]
        module = load(emit(spec, name=name, kind="blocks"))
        inputs = module._sample(3, "cpu")
        (ranges, columns, block, _), live = module._lists(3, inputs)
        blocks = BlockList(ranges, columns, live.shape[3], block)
        blocks.check()
        assert torch.equal(blocks.to_dense(), live)
        q, k, v, *captured = (x.double() if x.is_floating_point() else x for x in inputs)
        pairs = blocks.to_pairs(q.shape[2], k.shape[2])
        found, want = module.reference(q, k, v, *captured, pairs), execute(spec, q, k, v, captured, pairs)
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y.double(), rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def test_full_blocks_in_the_self_test_are_those_that_the_mask_leaves_alone(corpus) -> None:
    spec = corpus["causal"]
    module = load(emit(spec, name="causal", kind="blocks"))
    inputs = module._sample(3, "cpu")
    (ranges, columns, block, _), live = module._lists(3, inputs)
    full = BlockList(ranges, columns, live.shape[3], block).to_dense_full()
    sizes = inputs[0].shape[2], inputs[1].shape[2]
    keep = spec.mask.keep(Grid(*sizes, torch.device("cpu"), {}))
    assert full.any()
    assert not (BlockList.from_dense(full, block=block).to_pairs(*sizes) & ~keep).any()


def draw(spec, sq: int, sk: int):
    sizes = {"b": 1, "h": 2 * spec.group_size, "hkv": 2, "s": sq, "t": sk}
    return [torch.randn([sizes.get(d, d) for d in o.shape]) for o in (spec.q, spec.k, spec.v, *spec.captured)]


def brute(spec, q, k, v, blocks: BlockList):
    """Compute row by row from the definition: visible keys, and hidden ones of listed blocks by the fill."""
    seen = spec.mask.keep(Grid(q.shape[2], k.shape[2], q.device, {})).expand(1, 1, q.shape[2], k.shape[2])
    live = blocks.to_dense().expand(1, q.shape[1], -1, -1)
    rows = []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            keys = [j for j in range(k.shape[2]) if live[0, h, i // blocks.block[0], j // blocks.block[1]]]
            s = 0.125 * q[0, h, i] @ k[0, h // spec.group_size, keys].mT
            s = torch.where(seen[0, 0, i, keys], s, spec.fill.value)
            rows.append(
                torch.softmax(s, 0) @ v[0, h // spec.group_size, keys]
                if keys
                else v.new_full((32,), torch.nan)
            )
    return torch.stack(rows).view(1, q.shape[1], q.shape[2], -1)


@pytest.mark.parametrize("fill", ["-inf", "-3.0"])
def test_off_the_gpu_the_definition_is_computed_in_plain_torch(fill: str, corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = parse(str(corpus["causal"]).replace("fill(replace,-inf)", f"fill(replace,{fill})"))
    q, k, v = draw(spec, 50, 70)
    live = torch.rand(1, 4, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    live[:, :, 1] = False
    blocks = BlockList.from_dense(live, block=(16, 16))
    out, lse = run_blocks(spec, q, k, v, (), blocks)
    torch.testing.assert_close(out, brute(spec, q, k, v, blocks), equal_nan=True)
    nothing = ~blocks.to_pairs(50, 70).any(-1)
    assert nothing.any()
    assert (lse[nothing] == -torch.inf).all()


@pytest.mark.parametrize(
    ("norm", "empty"), [("elementwise(tanh(s))", 0.0), ("normalized((square(s)+1.0))", torch.nan)]
)
def test_weights_that_a_score_of_minus_infinity_keeps_are_zero_outside_the_list(norm, empty, corpus) -> None:
    text = str(corpus["weighed_by_tanh"])
    text = text.replace("mask=window(left=15,right=0) fill(add,-4.0)", "mask=none")
    spec = parse(text.replace("elementwise(tanh(s))", norm))
    q, k, v = draw(spec, 20, 40)
    middle = [[[[0, 1, 0]], [[0, 0, 0]], [[0, 1, 0]], [[0, 0, 0]]]]
    blocks = BlockList.from_dense(torch.tensor(middle) > 0, block=(32, 16))
    out, lse = run_blocks(spec, q, k, v, (), blocks)
    want, want_lse = execute(spec, q, k[:, :, 16:32], v[:, :, 16:32])
    torch.testing.assert_close(out[:, ::2], want[:, ::2])
    torch.testing.assert_close(lse[:, ::2], want_lse[:, ::2])
    torch.testing.assert_close(out[:, 1::2], torch.full_like(want[:, 1::2], empty), equal_nan=True)


def test_a_list_of_other_sizes_is_refused(corpus) -> None:
    spec = corpus["causal"]
    q, k, v = draw(spec, 50, 70)
    with pytest.raises(ValueError, match=r"expected \[4, 5\] blocks of \(16, 16\) in 50 queries and 70 keys"):
        run_blocks(spec, q, k, v, (), BlockList.from_mask(spec.mask, 50, 90, block=(16, 16)))


def test_wrong_lists_are_named_by_the_launcher(corpus) -> None:
    attend = launcher(corpus["causal"], kind="blocks")
    q, k, v = draw(corpus["causal"], 50, 70)
    blocks = BlockList.from_mask(corpus["causal"].mask, 50, 70, block=(32, 32))
    lists = (blocks.ranges, blocks.columns, blocks.block)
    with pytest.raises(
        ValueError, match=r"ranges: expected torch.int32 \[1, 1, 2, 3\], found torch.int32 \[1, 1, 1, 3\]"
    ):
        attend(q, k, v, blocks.ranges[:, :, :1], *lists[1:])
    with pytest.raises(ValueError, match=r"ranges: expected torch.int32 .*, found torch.int64"):
        attend(q, k, v, blocks.ranges.long(), *lists[1:])
    with pytest.raises(ValueError, match=r"ranges: expected what broadcasts to \[1, 4, 2, 3\]"):
        attend(q, k, v, blocks.ranges.expand(1, 3, -1, -1), *lists[1:])
    with pytest.raises(ValueError, match=r"columns: expected torch.int32 \[3\], found torch.float32"):
        attend(q, k, v, blocks.ranges, blocks.columns.float(), blocks.block)
    with pytest.raises(ValueError, match=r"order: expected torch.int32 \[8\], found torch.int32 \[2\]"):
        attend(q, k, v, *lists, blocks.order(1, 1))
    with pytest.raises(ValueError, match=r"block: expected multiples of 16, found \(32, 40\)"):
        attend(q, k, v, blocks.ranges, blocks.columns, (32, 40))
    with pytest.raises(ValueError, match="expected at least one key"):
        attend(q, k[:, :, :0], v[:, :, :0], *lists)


@pytest.mark.parametrize(
    ("block", "tiles", "expected"),
    [
        ((128, 128), (128, 64, 8), (128, 64, 8)),
        ((64, 128), (128, 128, 8), (64, 64, 4)),
        ((48, 96), (128, 64, 8), (16, 32, 4)),
        ((64, 128), (128, 32, 8), (64, 32, 4)),
        ((256, 16), (64, 32, 4), (64, 16, 4)),
    ],
)
def test_tiles_divide_blocks_and_smaller_ones_get_fewer_warps(block, tiles, expected, corpus) -> None:
    assert load(emit(corpus["causal"], name="causal", kind="blocks"))._divide(block, *tiles) == expected


TEXT = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) mask={mask}"
)
CAUSAL = "causal fill(replace,-inf) softmax"
LEAST = torch.finfo(torch.float32).min
PADDED = f"(causal & padding(key,pad)) fill(replace,{LEAST}) softmax with pad=bk[b,t]:bool"


def compiles(spec, rows: int = 128, around: int = 0) -> None:
    """Compile for every target, with the tiles of blocks that have so many queries, and look for spills.

    None may lie in a loop over keys; ``around`` bytes of stack may be used beside these.
    """
    own = canonical(spec)
    divide = load(emit(spec, name="site", kind="blocks"))._divide

    def of_block(found: Config) -> Config:
        return Config(*divide((rows, 128), found.block_m, found.block_n, found.warps), found.stages)

    configs = {arch: of_block(found) for arch, found in kind.choose(own).items()}
    for row in report_rows(emit(spec, name="site", kind="blocks", configs=configs)):
        assert row["error"] is None, row
        assert not row["over_limit"], row
        if (
            row["target"] == "sm_100" and row["warps"] == 4 and own.q.shape[3] == 128
        ):  # kinds/blocks.py says why
            assert row["stack"] <= 16, row
        else:
            assert not row["loop_spills"], row
            assert row["stack"] <= around, row
            assert around or not row["spills"], row


@pytest.mark.parametrize("at", [1, 2], ids=["descriptors", "pointers"])
def test_a_list_is_walked_with_loads_ahead_of_the_products(at: int) -> None:
    kernel = emit(parse(TEXT.format(d=64, mask=CAUSAL)), name="site", kind="blocks")
    compiled = compile_for(kernel, load(kernel), "sm_90", kind.KIND.programs[at])
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<3x", compiled.asm["ttgir"])
    assert len(buffers) >= 4  # three tiles of keys and of values at a time, in both loops


@pytest.mark.slow
@pytest.mark.parametrize("rows", [128, 64, 32, 16])
@pytest.mark.parametrize("mask", ["none softmax", CAUSAL, PADDED], ids=["full", "causal", "padded"])
@pytest.mark.parametrize("d", [64, 128])
def test_the_tiles_of_every_block_size_compile_without_spills(d: int, mask: str, rows: int) -> None:
    compiles(parse(TEXT.format(d=d, mask=mask)), rows)


@pytest.mark.slow
def test_the_whole_corpus_compiles(corpus) -> None:
    for name in NAMES:
        compiles(corpus[name], around=24)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "left_padded", "window_and_sinks", "biases", "sink_logits"])
def test_listed_blocks_on_a_gpu_equal_the_executed_spec(name: str, corpus) -> None:
    spec = corpus[name]
    sizes = {"b": 2, "h": 2 * spec.group_size, "hkv": 2, "s": 1000, "t": 1000}
    tensors = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        x = torch.randn([sizes.get(d, d) for d in o.shape])
        tensors.append((x > 0 if o.dtype == torch.bool else x.to(o.dtype)).cuda())
    q, k, v, *captured = tensors
    chosen = torch.rand(2, q.shape[1], 8, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    blocks = BlockList.from_mask(spec.mask, 1000, 1000, block=(128, 64), chosen=chosen.cuda())
    blocks.check()
    out, lse = run_blocks(spec, q, k, v, captured, blocks, blocks.order(2, q.shape[1]))
    pairs = blocks.to_pairs(1000, 1000)
    want, want_lse = execute(spec, *(x.double() for x in (q, k, v)), captured, pairs)
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(
        out.double(), want, rtol=0, atol=4 * eps * v.abs().max().item(), equal_nan=True
    )
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
