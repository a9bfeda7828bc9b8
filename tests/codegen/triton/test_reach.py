"""Bounds by ids: right for ids in any order, tight for documents one after the other, and used by kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.triton import emit
from attnc.codegen.triton.reach import reach
from attnc.codegen.triton.store import load
from attnc.formula_text import chunk, document, prefix
from attnc.ir import AttentionSpec
from attnc.masks import And, Band, Formula, Full, Not, Or
from attnc.printer import parse

DOCUMENTS = Formula(document("own", "ids"))
CAUSAL = Band(None, 0, "start")
CHUNKS, PREFIX = Formula(chunk(16)), Formula(prefix("lengths"))


@pytest.mark.parametrize(
    "mask", [DOCUMENTS, And((CAUSAL, DOCUMENTS)), Or((PREFIX, And((CAUSAL, DOCUMENTS)))), Not(DOCUMENTS)]
)
def test_the_atom_that_compares_ids_is_found(mask) -> None:
    assert reach(mask, "reach").ids == DOCUMENTS


@pytest.mark.parametrize("mask", [Full(), CAUSAL, CHUNKS, And((CAUSAL, PREFIX))])
def test_other_masks_have_none(mask) -> None:
    assert reach(mask, "reach") is None


@pytest.fixture(scope="module")
def emitted() -> ModuleType:
    spec = (
        "attn q=bhqd[b,2,s,16]:float16 k=bhkd[b,2,t,16]:float16 v=bhke[b,2,t,16]:float16 group=1"
        " mask=document(own,ids) fill(replace,-inf) softmax with own=bq[b,s]:int64 with ids=bk[b,t]:int64"
    )
    return load(emit(parse(spec), name="by_ids"))


def tiles_of(ids: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(ids.split(size, 1))


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    size=st.sampled_from([1, 4, 16]),
    step=st.sampled_from([1, 2, 8]),
    ordered=st.booleans(),
)
def test_bounds_hold_for_any_ids(emitted: ModuleType, data, size: int, step: int, ordered: bool) -> None:
    rows = st.lists(st.integers(-3, 3), min_size=1, max_size=40)
    own, others = (torch.tensor([data.draw(rows)]) for _ in range(2))
    if ordered:  # documents one after the other, numbered without gaps
        own, others = ((x > 0).long().cumsum(1) for x in (own, others))
    found = emitted._reach(own, others, size, step)
    assert found.shape == (1, -(-own.shape[1] // size), 4)
    assert found.dtype == torch.int32
    at = torch.arange(others.shape[1])
    for tile, (lo, hi, same_lo, same_hi) in zip(tiles_of(own, size), found[0].tolist(), strict=True):
        equal = tile[0, :, None] == others[0]
        inside = (at >= lo) & (at < hi)
        assert not (equal & ~inside).any(), "a pair with one id lies outside"
        same = (at >= same_lo) & (at < same_hi)
        assert equal[:, same].all(), "a pair with two ids counts as one document"
        if ordered:
            wanted = tiles_of(((others >= tile.min()) & (others <= tile.max())), step)
            some = [x.any().item() for x in wanted]
            assert max(hi - lo, 0) == step * sum(some), "a tile is visited in vain"
            whole = [x.all().item() for x in tiles_of(equal.all(0)[None], step)]
            assert max(same_hi - same_lo, 0) == step * sum(whole), "a whole tile is masked"


@pytest.mark.parametrize("kind", ["varlen", "varlen_backward", "decode"])
def test_kinds_without_bounds_compare_pair_by_pair(kind: str, corpus: dict[str, AttentionSpec]) -> None:
    assert "_reach" not in emit(corpus["documents"], kind=kind).source


@pytest.mark.slow
def test_kernels_visit_no_other_document(interpret: Callable[..., dict[str, dict[str, object]]]) -> None:
    found = interpret("interpret_reach.py")
    for run, row in found.items():
        if run.startswith("strays"):
            assert {x: row[x] for x in ("out", "dq", "dk", "dv")} == dict.fromkeys(
                ("out", "dq", "dk", "dv"), 0
            )
        elif run.startswith("broken"):
            assert row["noticed"], run
        else:
            assert row["code"] == 0, row
    assert len(found) == 2 + 6 + 8
