from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnc.codegen.triton import tiles
from attnc.codegen.triton.inputs import name_inputs
from attnc.formula_text import named
from attnc.ir import AttentionSpec, Fill, Operand
from attnc.masks import (
    CAUSAL,
    And,
    Band,
    Dense,
    Formula,
    Full,
    Grid,
    Mask,
    Not,
    Or,
    Padding,
    Range,
    may_hide_a_whole_row,
)

offsets = st.one_of(st.none(), st.integers(-9, 9))
bands = st.builds(Band, offsets, offsets, st.sampled_from(["start", "end"]))
ranges = st.builds(Range, st.sampled_from(["q", "k"]), st.integers(-2, 20), st.integers(-2, 30))
coarse = st.builds(
    lambda form, n: Formula(named(form, [str(n)])), st.sampled_from(["chunk", "blocks"]), st.integers(2, 9)
)
leaves = st.one_of(bands, ranges, coarse, st.just(Full()), st.just(Padding("pad")), st.just(Dense("dense")))


def trees(parts: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    pair = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(st.builds(And, pair), st.builds(Or, pair), st.builds(Not, parts))


masks = st.recursive(leaves, trees, max_leaves=4)
fills = st.sampled_from([Fill(), Fill(-3.4e38), Fill(-3.4e38, "add"), Fill(-1e4), Fill(-1e4, "add")])
shapes = st.tuples(
    st.integers(1, 30), st.integers(1, 30), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8])
)


class Int(int):
    """An integer of the GPU: division rounds towards zero."""

    def __floordiv__(self, other):
        return Int(abs(int(self)) // other * (1 if self >= 0 else -1))

    def __add__(self, other):
        return Int(int(self) + int(other))

    def __sub__(self, other):
        return Int(int(self) - int(other))

    def __mul__(self, other):
        return Int(int(self) * int(other))


def kernel_functions(number: type) -> SimpleNamespace:
    return SimpleNamespace(
        maximum=lambda a, b: number(max(a, b)),
        minimum=lambda a, b: number(min(a, b)),
        where=lambda c, a, b: number(a if c else b),
        cdiv=lambda a, b: number(number(a) + b - 1) // b,
    )


def visit(
    mask: Mask, fill: Fill, first: int, sq: int, sk: int, bm: int, bn: int, number: type
) -> list[tuple[int, bool]]:
    """Run the emitted loops; return the tiles of keys in order, and whether each gets the mask."""
    seen: list[tuple[int, bool]] = []
    scope = {
        "tl": kernel_functions(number),
        "first": number(first),
        "last": number(min(first + bm, sq) - 1),
        "sq": number(sq),
        "sk": number(sk),
    }
    exec(
        "\n".join(tiles.loops(mask, fill, lambda m: [f"see(int(n), {m})"])),
        {**scope, "BLOCK_N": bn, "see": lambda *x: seen.append(x)},
    )
    return seen


def visit_queries(mask: Mask, fill: Fill, n: int, sq: int, sk: int, bm: int, bn: int, number: type):
    """Run the emitted loops over queries for keys ``n ..``; return the tiles, and those said to be missed."""
    seen: list[tuple[int, bool]] = []
    scope = {
        "tl": kernel_functions(number),
        "n": number(n),
        "n_last": number(min(n + bn, sk) - 1),
        "sq": number(sq),
        "sk": number(sk),
        "BLOCK_M": bm,
        "BLOCK_N": bn,
        "see": lambda *x: seen.append(x),
    }
    lines = tiles.loops(mask, fill, lambda m: [f"see(int(first), {m})"], tiles.QUERIES)
    exec("\n".join(lines), scope)
    missed = tiles.missed(mask, fill, tiles.QUERIES) or "True"
    return seen, [q for q in range(0, sq, bm) if eval(missed, scope, {"first": q})]


def kept(mask: Mask, sq: int, sk: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = {n for n in mask.operands}
    captured = {}
    for n in rows:
        captured[n] = torch.rand((1, max(sq, sk)) if n == "pad" else (1, 1, sq, sk), generator=g) < 0.5
    if "pad" in captured:
        captured["pad"] = captured["pad"][:, :sk]
    return mask.keep(Grid(sq, sk, torch.device("cpu"), captured)).expand(1, 1, sq, sk)[0, 0]


def test_equal_bounds_are_written_once_and_many_are_not_nested_deep() -> None:
    assert tiles.fold("f", ["a", "b", "a", "c"]) == "f(a, f(b, c))"
    many = tiles.fold("f", [f"x{i}" for i in range(64)])
    assert max(many[:i].count("(") - many[:i].count(")") for i in range(len(many))) == 6
    parted = Not(Not(Or(tuple(Range("k", 1, n) for n in (0, 0, 1)))))
    assert tiles.outer(parted) == tuple(dict.fromkeys(tiles.outer(parted)))
    assert visit(parted, Fill(), 0, 1, 2, 1, 2, int) is not None


@settings(max_examples=200, deadline=None)
@given(masks, fills, shapes, st.sampled_from([int, Int]))
@example(Not(Not(Or((Range("k", 1, 0), Range("k", 1, 0), Range("k", 1, 1))))), Fill(), (1, 1, 2, 2), int)
def test_loops_visit_every_visible_key_once_and_leave_the_mask_out_only_where_all_is_visible(
    mask, fill, shape, number
) -> None:
    sq, sk, bm, bn = shape
    keep = kept(mask, sq, sk)
    for first in range(0, sq, bm):
        seen = visit(mask, fill, first, sq, sk, bm, bn, number)
        starts = [n for n, _ in seen]
        assert len(set(starts)) == len(starts), "a tile is visited twice"
        assert all(n % bn == 0 for n in starts), "tiles overlap"
        rows = keep[first : first + bm]
        visible = {int(k) // bn * bn for k in rows.any(0).nonzero()}
        assert visible <= set(starts), "a visible key is left out"
        for n in (n for n, masked in seen if not masked):
            assert n + bn <= sk, "a tile without a mask runs past the end"
            assert rows[:, n : n + bn].all(), "a tile without a mask hides something"


@settings(max_examples=200, deadline=None)
@given(masks, fills, shapes, st.sampled_from([int, Int]))
def test_loops_over_queries_visit_every_query_that_sees_some_key_and_know_what_they_miss(
    mask, fill, shape, number
) -> None:
    sq, sk, bm, bn = shape
    keep = kept(mask, sq, sk)
    for n in range(0, sk, bn):
        seen, missed = visit_queries(mask, fill, n, sq, sk, bm, bn, number)
        starts = [q for q, _ in seen]
        assert len(set(starts)) == len(starts), "a tile is visited twice"
        assert sorted([*starts, *missed]) == list(range(0, sq, bm)), "what is missed is not what is left"
        columns = keep[:, n : n + bn]
        assert {int(q) // bm * bm for q in columns.any(1).nonzero()} <= set(starts), "a query is left out"
        for q in (q for q, masked in seen if not masked):
            assert n + bn <= sk, "a tile without a mask runs past the last key"
            assert columns[q : q + bm].all(), "a tile without a mask hides something"


@settings(max_examples=60, deadline=None)
@given(masks, shapes)
def test_a_fill_added_to_the_score_that_is_not_far_leaves_no_key_out(mask, shape) -> None:
    sq, sk, bm, bn = shape
    for first in range(0, sq, bm):
        seen = visit(mask, Fill(-1e4, "add"), first, sq, sk, bm, bn, int)
        assert {n for n, _ in seen} >= set(range(0, sk, bn))


@settings(max_examples=80, deadline=None)
@given(masks, st.sampled_from([Fill(-3.4e38), Fill(-3.4e38, "add"), Fill(-1e4), Fill(-3.0)]), shapes)
def test_a_finite_fill_has_a_floor_wherever_a_tile_is_left_out_and_a_row_may_need_it(
    mask, fill, shape
) -> None:
    sq, sk, bm, bn = shape
    skips = any(
        {n for n, _ in visit(mask, fill, first, sq, sk, bm, bn, int)} < set(range(0, sk, bn))
        for first in range(0, sq, bm)
    )
    if skips and (may_hide_a_whole_row(mask) or fill.value > tiles.FAR):
        assert tiles.floor(mask, fill) is not None


def test_causal_stops_at_the_diagonal_and_a_window_starts_at_its_edge() -> None:
    # queries 8..11 of 16, tiles of 4 keys
    assert visit(CAUSAL, Fill(), 8, 16, 16, 4, 4, int) == [(0, False), (4, False), (8, True)]
    assert visit(Band(5, 0), Fill(), 8, 16, 16, 4, 4, int) == [(0, True), (4, True), (8, True)]
    assert visit(Band(9, 0), Fill(), 12, 16, 16, 4, 4, int) == [(0, True), (4, True), (8, False), (12, True)]
    with_sinks = And((CAUSAL, Or((Band(3, 0), Range("k", 0, 2)))))
    assert visit(with_sinks, Fill(), 12, 16, 16, 4, 4, int) == [(0, True), (8, True), (12, True)]


def test_queries_begin_at_the_diagonal_and_end_with_the_window() -> None:
    # keys 8..11 of 16, tiles of 4 queries
    seen = [(8, True), (12, False)]
    assert visit_queries(CAUSAL, Fill(), 8, 16, 16, 4, 4, int) == (seen, [0, 4])
    assert visit_queries(Band(5, 0), Fill(), 4, 16, 16, 4, 4, int)[0] == [(4, True), (8, True), (12, True)]
    in_blocks = Formula(named("blocks", ["4"]))
    assert visit_queries(in_blocks, Fill(), 8, 16, 16, 4, 4, int) == ([(8, False), (12, False)], [0, 4])
    in_chunks = Formula(named("chunk", ["4"]))
    assert visit_queries(in_chunks, Fill(), 8, 16, 16, 4, 4, int) == ([(8, False)], [0, 4, 12])


def test_a_full_mask_needs_no_predicate_but_at_the_end() -> None:
    assert visit(Full(), Fill(), 0, 4, 10, 4, 4, int) == [(0, False), (4, False), (8, True)]


def spec_with(mask: Mask) -> AttentionSpec:
    q, k, v = (
        Operand(n, a, ("b", 1, s, 16), torch.float32)
        for n, a, s in (("q", "bhqd", "s"), ("k", "bhkd", "t"), ("v", "bhke", "t"))
    )
    pad, dense = (
        Operand("pad", "bk", ("b", "t"), torch.bool),
        Operand("dense", "bhqk", ("b", 1, "s", "t"), torch.bool),
    )
    return AttentionSpec(
        q, k, v, 1, (), mask, captured=tuple(o for o in (pad, dense) if o.name in mask.operands)
    )


@settings(max_examples=100, deadline=None)
@given(masks, st.integers(1, 12), st.integers(1, 12))
def test_predicates_as_text_are_the_predicates(mask: Mask, sq: int, sk: int) -> None:
    inputs = name_inputs(spec_with(mask))
    g = torch.Generator().manual_seed(1)
    captured = {
        "pad": torch.rand(1, sk, generator=g) < 0.5,
        "dense": torch.rand(1, 1, sq, sk, generator=g) < 0.5,
    }
    want = mask.keep(Grid(sq, sk, torch.device("cpu"), captured)).expand(1, 1, sq, sk)
    scope = {"qi": torch.arange(sq)[:, None], "ki": torch.arange(sk)[None, :], "sq": sq, "sk": sk}
    tensors = {x.tensor: captured[x.operand.name] for x in inputs}
    for text, values in (
        (tiles.reference_keep(mask, inputs), tensors),
        (
            tiles.keep(mask, inputs),
            {n: t if t.dim() == 4 else t[:, None, None, :] for n, t in tensors.items()},
        ),
    ):
        assert torch.equal(eval(text, {**scope, **values}).expand(1, 1, sq, sk), want)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (CAUSAL, "ki <= qi"),
        (Band(127, 0), "(ki >= qi - 127) & (ki <= qi)"),
        (Band(None, 2, "end"), "ki <= qi + (sk - sq) + 2"),
        (And((CAUSAL, Padding("pad"))), "(ki <= qi) & valid"),
        (Not(Range("k", 0, 4)), "~(ki < 4)"),
    ],
)
def test_predicates_read_like_the_formula(mask: Mask, text: str) -> None:
    assert tiles.keep(mask, name_inputs(spec_with(mask))) == text
