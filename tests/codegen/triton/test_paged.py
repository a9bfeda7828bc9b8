"""Decode from a cache in pages; the plain execution is tested in tests/codegen/test_caches.py."""

from __future__ import annotations

import ast

import pytest
import torch

from attnc.codegen.triton import attend_paged, can_run, emit, launch
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.kinds import KINDS
from attnc.codegen.triton.store import load
from tests.codegen.triton.test_decode import (
    CACHES,
    CORPUS,
    PADDED,
    TEXT,
    UNSERVED,
    check,
    check_compiled,
    interpret,
    parse,
)

QUICK = ("cache", "window_of_a_cache", "padded_cache", "head_biases", "sigmoid_cache")
ALONE = ("packed", "angles")
"""One tensor as long as the queries and the keys, which cannot be here; and the number of a batch entry."""


@pytest.fixture(scope="session")
def paged(tmp_path_factory) -> dict[str, dict[str, object]]:
    return interpret(tmp_path_factory.mktemp("kernels"), "paged", *QUICK, "broken")


@pytest.mark.parametrize("name", QUICK)
def test_pages_of_two_sizes_and_sequences_of_any_length_equal_the_executed_spec(name: str, paged) -> None:
    check(name, paged, runs=4)


def test_the_self_test_notices_every_broken_kernel(paged) -> None:
    broken = {run: row for run, row in paged.items() if run.startswith("broken ")}
    assert len(broken) >= 6
    assert [run for run, row in broken.items() if row["code"] == 0] == []


@pytest.mark.slow
def test_every_spec_of_the_corpus_in_pages(tmp_path) -> None:
    names = [n for n in (*CACHES, *CORPUS) if n not in (*ALONE, *UNSERVED)]
    rows = interpret(tmp_path, "paged", *names)
    for name in names:
        check(name, rows, runs=4)


def test_the_file_is_the_one_that_was_reviewed(golden) -> None:
    kernel = emit(CACHES["padded_cache"], name="padded_cache", kind="paged")
    golden("kernel/paged_padded_cache.py", kernel.source.replace(kernel.key, "<key>"))


def test_files_stand_alone_and_the_type_of_every_argument_is_known() -> None:
    kind = KINDS["paged"]
    for name, spec in CACHES.items():
        source = emit(spec, name=name, kind="paged").source
        tree = ast.parse(source)
        imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imports <= {"os", "sys", "torch", "triton", "triton.language", "numpy"}
        assert (spec_of(source), kind_of(source)) == (canonical(spec), "paged")
        assert not [x for x in source.splitlines() if x != x.rstrip() or (len(x) > 120 and x[:5] != "spec ")]
        types, ones = kind.types(canonical(spec))
        for program in kind.programs:
            fn = next(n for n in ast.walk(tree) if getattr(n, "name", "") == f"{name}_{program.kernel}")
            names = {a.arg for a in fn.args.args} - {"BLOCK_M", "BLOCK_N", *program.constants}
            assert names <= set(types) | set(ones)


def test_a_tensor_that_is_as_long_as_queries_and_keys_is_refused() -> None:
    found = {name: can_run(spec, "paged") for name, spec in {**CACHES, **CORPUS}.items()}
    assert {name for name, miss in found.items() if miss} == {*ALONE, *UNSERVED}
    miss = found["packed"]
    assert miss is not None
    assert miss.code == "triton-captured"
    assert "expected each captured tensor in one role where keys lie in pages, found p in two" in miss.why


def inputs(spec, *, batch: int = 2, sq: int = 1) -> list[torch.Tensor]:
    group, dtype = spec.group_size, spec.q.dtype
    d, e = spec.q.shape[3], spec.v.shape[3]
    q = torch.randn(batch, 2 * group, sq, d).to(dtype)
    caches = [torch.randn(5, 4, 2, x).to(dtype) for x in (d, e)]
    return [q, *caches, torch.tensor([[3, 1], [0, 4]]), torch.tensor([7, 8], dtype=torch.int32)]


@pytest.mark.parametrize(
    ("at", "change", "why"),
    [
        (
            0,
            lambda x: x[:, :3],
            r"q: expected torch\.float16 \[2, 4, 1, 32\], found torch\.float16 \[2, 3, 1, 32\]",
        ),
        (1, lambda x: x.float(), r"k_cache: expected torch\.float16 \[5, 4, 2, 32\], found torch\.float32"),
        (
            2,
            lambda x: x[:, :2],
            r"v_cache: expected torch\.float16 \[5, 4, 2, 32\], found .* \[5, 2, 2, 32\]",
        ),
        (3, lambda x: x[:1], r"block_table: expected torch\.int64 \[2, 2\], found torch\.int64 \[1, 2\]"),
        (3, lambda x: x.short(), r"block_table: expected torch\.int32 or torch\.int64, found torch\.int16"),
        (3, lambda x: x[:, :0], "block_table: expected room for at least one key, found none"),
        (4, lambda x: x.long(), r"seqlens: expected torch\.int32 \[2\], found torch\.int64 \[2\]"),
    ],
)
def test_wrong_inputs_of_a_kernel_are_named(at: int, change, why: str) -> None:
    attend = load(emit(CACHES["cache"], name="cache", kind="paged")).attend
    tensors = inputs(CACHES["cache"])
    tensors[at] = change(tensors[at])
    with pytest.raises(ValueError, match=why):
        attend(*tensors)


def test_the_kernel_serves_where_triton_runs_and_plain_torch_elsewhere(monkeypatch) -> None:
    spec = CACHES["cache"]
    tensors = inputs(spec)
    plain = attend_paged(spec, *tensors)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "launcher", lambda spec, kind: lambda *x: (kind, len(x)))
    assert attend_paged(spec, *tensors) == ("paged", 5)
    monkeypatch.setattr(launch, "launcher", lambda spec, kind: None)
    for got, want in zip(attend_paged(spec, *tensors), plain, strict=True):
        assert torch.equal(got, want)


def test_both_kernels_compile_for_hopper_without_spills() -> None:
    check_compiled(parse(TEXT.format(d=64, e=64, t="bfloat16", **PADDED)), ("sm_90",), "paged")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("d", "e"), [(32, 32), (64, 64), (80, 80), (128, 128), (256, 256), (576, 512)])
def test_the_default_tiles_compile_for_every_target_without_spills(d: int, e: int, dtype: str) -> None:
    spec = parse(TEXT.format(d=d, e=e, t=dtype, **PADDED))
    check_compiled(spec, ("sm_80", "sm_90", "sm_100", "gfx942"), "paged")


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUICK)
def test_the_self_test_passes_on_a_gpu(name: str) -> None:
    for kind in ("decode", "paged"):
        assert load(emit(CACHES[name], name=name, kind=kind)).main() == 0
