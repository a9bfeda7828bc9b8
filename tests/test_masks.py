"""Masks mean what they say: tiles, joins and the question of empty rows.

Each against the mask written out.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc import expr as E
from attnc.expr import Expr
from attnc.formula import POSITIONS, SK, SQ, is_closed
from attnc.formula_text import blocks, chunk, document, prefix, stride
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
    both,
    condition,
    either,
    may_hide_a_whole_row,
)
from attnc.printer import parse_mask

B, H = 2, 2
DATA = {"row": "bk", "rows": "bq", "tensor": "bhqk"}
IDS = {"ids": "bk", "own": "bq", "far": "b"}

ends = st.one_of(st.none(), st.integers(-3, 6))
bands = st.builds(Band, ends, ends, st.sampled_from(["start", "end"]))
ranges = st.builds(Range, st.sampled_from(["q", "k"]), st.integers(0, 4), st.integers(0, 7))
small = st.integers(-4, 6).map(E.integer)
places = st.sampled_from([*POSITIONS.values(), SQ, SK])
sums = st.tuples(small, places, small).map(lambda t: E.add(E.mul(t[0], t[1]), t[2]))
ids = st.sampled_from([E.load(name, tuple(POSITIONS[a] for a in axes), "int") for name, axes in IDS.items()])


def wider(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    divisors = st.integers(1, 5).map(E.integer)
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda t: E.add(*t)),
        pairs.map(lambda t: E.sub(*t)),
        st.tuples(inner, divisors).map(lambda t: E.floordiv(*t)),
        st.tuples(inner, divisors).map(lambda t: E.mod(*t)),
        st.tuples(inner, inner, inner).map(lambda t: E.where(E.le0(t[0]), t[1], t[2])),
    )


def formulas_of(leaf: st.SearchStrategy[Expr]) -> st.SearchStrategy[Mask]:
    terms = st.recursive(leaf, wider, max_leaves=4)
    conditions = st.one_of(terms.map(E.le0), terms.map(E.eq0))
    pairs = st.tuples(conditions, conditions)
    joined = st.one_of(conditions, pairs.map(lambda t: E.or_(*t)), pairs.map(lambda t: E.and_(*t)))
    return joined.map(Formula)


named = st.sampled_from([chunk(3), blocks(2), stride(2), stride(3, 1)]).map(Formula)
named_data = st.sampled_from([document("own", "ids"), prefix("far")]).map(Formula)
formulas = st.one_of(named, formulas_of(sums))
closed_atoms = st.one_of(bands, ranges, formulas, st.just(Full()))
atoms = st.one_of(
    closed_atoms,
    named_data,
    formulas_of(st.one_of(sums, ids)),
    st.sampled_from([Padding("row", "k"), Padding("rows", "q"), Dense("tensor")]),
)


def trees(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.one_of(several.map(And), several.map(Or), inner.map(Not))


masks = st.recursive(atoms, trees, max_leaves=4)
closed_masks = st.recursive(closed_atoms, trees, max_leaves=4)
lengths = st.tuples(st.integers(1, 7), st.integers(1, 7))


def captured(sq: int, sk: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"bk": (B, sk), "bq": (B, sq), "bhqk": (B, H, sq, sk)}
    bools = {name: torch.rand(shapes[axes], generator=g) < 0.5 for name, axes in DATA.items()}
    sizes = {"bk": (B, sk), "bq": (B, sq), "b": (B,)}
    return bools | {n: torch.randint(-1, 3, sizes[axes], generator=g) for n, axes in IDS.items()}


def evaluate(e: Expr, env: dict[str, int], data: dict[str, torch.Tensor]) -> int:
    """Return the value of a term or a condition (0 or 1), with Python's integers."""

    def go(x: Expr) -> int:
        return evaluate(x, env, data)

    if e.op == "poly":
        total = 0
        for m, c in E.terms(e):
            for g in m:
                c *= go(g)
            total += c
        return total
    match e.op:
        case "index" | "size":
            return env[e.args[0]]
        case "load":
            return int(data[e.args[0]][tuple(go(i) for i in e.args[1])])
        case "floordiv":
            return go(e.args[0]) // go(e.args[1])
        case "mod":
            return go(e.args[0]) % go(e.args[1])
        case "where":
            return go(e.args[1]) if go(e.args[0]) else go(e.args[2])
        case "true" | "false":
            return int(e.op == "true")
        case "le0":
            return int(go(e.args[0]) <= 0)
        case "eq0":
            return int(go(e.args[0]) == 0)
        case "not":
            return 1 - go(e.args[0])
    return (all if e.op == "and" else any)(go(x) for x in e.args[0])


def written_out(mask: Mask, sq: int, sk: int, seed: int = 0) -> torch.Tensor:
    """Return the mask as bool ``[B, H, Sq, Sk]``."""
    grid = Grid(sq, sk, torch.device("cpu"), captured(sq, sk, seed), B, H)
    return mask.keep(grid).expand(B, H, sq, sk)


def by_definition(mask: Mask, sq: int, sk: int, seed: int = 0) -> torch.Tensor:
    """Return the same, pair by pair, from the definitions in the docstrings."""
    data = captured(sq, sk, seed)

    def keeps(m: Mask, b: int, h: int, q: int, k: int) -> bool:
        match m:
            case Full():
                return True
            case Band(left, right, align):
                d = q + (sk - sq if align == "end" else 0) - k
                return (left is None or d <= left) and (right is None or -right <= d)
            case Range(axis, lo, hi):
                return lo <= (q if axis == "q" else k) < hi
            case Formula(value):
                return bool(evaluate(value, {"b": b, "h": h, "q": q, "k": k, "Sq": sq, "Sk": sk}, data))
            case Padding(name, axis):
                return bool(data[name][b, k if axis == "k" else q])
            case Dense(name):
                return bool(data[name][b, h, q, k])
            case And(parts):
                return all(keeps(p, b, h, q, k) for p in parts)
            case Or(parts):
                return any(keeps(p, b, h, q, k) for p in parts)
            case Not(part):
                return not keeps(part, b, h, q, k)
        raise AssertionError(m)

    flat = [keeps(mask, b, h, q, k) for b in range(B) for h in range(H) for q in range(sq) for k in range(sk)]
    return torch.tensor(flat).view(B, H, sq, sk)


@settings(max_examples=150, deadline=None)
@given(masks, lengths, st.integers(0, 5))
def test_keep_follows_the_definitions(mask, n, seed):
    assert torch.equal(written_out(mask, *n, seed), by_definition(mask, *n, seed))


@settings(max_examples=100, deadline=None)
@given(masks, lengths, st.data())
def test_a_tile_that_is_skipped_is_empty_and_a_full_one_is_full(mask, n, data):
    sq, sk = n
    q = sorted(data.draw(st.tuples(st.integers(0, sq - 1), st.integers(0, sq - 1))))
    k = sorted(data.draw(st.tuples(st.integers(0, sk - 1), st.integers(0, sk - 1))))
    tile = written_out(mask, sq, sk)[..., q[0] : q[1] + 1, k[0] : k[1] + 1]
    found = mask.classify((q[0], q[1]), (k[0], k[1]), sq, sk)
    assert found == "mixed" or bool(tile.any()) == bool(tile.all()) == (found == "full")


@settings(max_examples=100, deadline=None)
@given(bands.filter(lambda b: (b.left or 9) + (b.right or 9) >= 0), lengths, st.data())
def test_one_band_is_classed_exactly(band, n, data):
    sq, sk = n
    q = sorted(data.draw(st.tuples(st.integers(0, sq - 1), st.integers(0, sq - 1))))
    k = sorted(data.draw(st.tuples(st.integers(0, sk - 1), st.integers(0, sk - 1))))
    tile = written_out(band, sq, sk)[..., q[0] : q[1] + 1, k[0] : k[1] + 1]
    expected = "full" if tile.all() else "mixed" if tile.any() else "skip"
    low, high = -(band.right if band.right is not None else 99), band.left if band.left is not None else 99
    if low <= high:
        assert band.classify((q[0], q[1]), (k[0], k[1]), sq, sk) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(masks, min_size=1, max_size=4), lengths)
def test_joins_keep_what_all_or_any_part_keeps(parts, n):
    tensors = torch.stack([written_out(p, *n) for p in parts])
    assert torch.equal(written_out(both(*parts), *n), tensors.all(0))
    assert torch.equal(written_out(either(*parts), *n), tensors.any(0))


@settings(max_examples=120, deadline=None)
@given(closed_masks, lengths, st.booleans(), st.booleans())
def test_a_row_without_keys_is_never_denied(mask, n, know_q, know_k):
    sq, sk = n
    answer = may_hide_a_whole_row(mask, sq if know_q else None, sk if know_k else None)
    hidden = bool((~written_out(mask, sq, sk).any(-1)).any())
    assert answer or not hidden


def test_rows_that_surely_see_a_key_are_known():
    assert not may_hide_a_whole_row(CAUSAL)
    assert not may_hide_a_whole_row(Full())
    assert not may_hide_a_whole_row(Band(3, 0), 8, 8)
    assert not may_hide_a_whole_row(Band(None, 0, "end"), 3, 8)
    assert not may_hide_a_whole_row(Range("k", 0, 2))
    assert not may_hide_a_whole_row(either(Band(0, 0), Range("k", 0, 1)))
    assert may_hide_a_whole_row(Band(3, 0), 8, 4)
    assert may_hide_a_whole_row(Band(None, 0, "end"), 8, 3)
    assert may_hide_a_whole_row(both(CAUSAL, Padding("row")))


def test_joins_are_flat_and_short():
    row, window = Padding("row"), Band(7, 0)
    assert both(CAUSAL, Full()) == CAUSAL
    assert both(both(CAUSAL, row), window) == And((window, row))
    assert both(Band(None, 0), Band(7, None)) == window
    assert both(Band(None, 0), Band(7, None, "end")) == And((CAUSAL, Band(7, None, "end")))
    assert both() == Full()
    assert either(row, Full()) == Full()
    assert either(either(CAUSAL, row), row) == Or((CAUSAL, row))
    assert either(Band(2, -1), Band(0, 2)) == Band(2, 2)
    assert either(Band(None, 0), Band(0, None)) == Full()
    assert either(Band(9, -5), Band(1, 1)) == Or((Band(9, -5), Band(1, 1)))


def test_report_names_roles_and_text_names_operands():
    mask = both(CAUSAL, Padding("c0"))
    assert mask.describe() == "causal & padding(key)"
    assert str(mask) == "(causal & padding(key,c0))"
    assert Padding("c1", "q").describe() == "padding(query)"
    assert And((CAUSAL, Or((Dense("a"), Range("k", 0, 4))))).describe() == "causal & (dense | range(k,0,4))"
    assert Not(Dense("a")).describe() == "~(dense)"
    assert both(CAUSAL, Padding("b"), Dense("a"), Padding("b")).operands == ("b", "a")


@settings(max_examples=150, deadline=None)
@given(masks)
def test_texts_are_read_back(mask):
    assert parse_mask(str(mask)) == mask


@settings(max_examples=50, deadline=None)
@given(masks, lengths)
def test_the_condition_of_a_mask_is_the_mask(mask, n):
    whole = Formula(condition(mask))
    if is_closed(whole.value):
        assert torch.equal(written_out(whole, *n), written_out(mask, *n))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("chunk(16)", "chunk(16)"),
        ("blocks(4)", "blocks(4)"),
        ("stride(2)", "stride(2)"),
        ("stride(3,1)", "stride(3,1)"),
        ("document(c0,c1)", "document"),
        ("document(c1,c0)", "document"),
        ("document(c0)", "document"),
        ("prefix(c2)", "prefix"),
        ("{q//4==k//8}", "{q//4==k//8}"),
    ],
)
def test_usual_formulas_have_short_names(text, told):
    mask = parse_mask(text)
    assert isinstance(mask, Formula)
    assert str(mask) == text
    assert mask.describe() == told


def test_tiles_of_chunks_are_exact():
    mask = both(CAUSAL, Formula(chunk(4)))
    assert mask.classify((0, 3), (4, 7), 16, 16) == "skip"
    assert mask.classify((4, 7), (4, 7), 16, 16) == "mixed"
    assert Formula(chunk(4)).classify((8, 11), (8, 11), 16, 16) == "full"


def test_rows_of_formulas_that_see_their_own_key_are_known():
    assert not may_hide_a_whole_row(both(CAUSAL, Formula(chunk(4))), 9, 9)
    assert not may_hide_a_whole_row(Formula(document("ids")), 9, 9)
    assert not may_hide_a_whole_row(either(CAUSAL, Formula(prefix("far"))))
    assert may_hide_a_whole_row(Formula(chunk(4)), 9, 4)
    assert may_hide_a_whole_row(Formula(stride(3, 1)), 9, 9)
    assert may_hide_a_whole_row(Formula(document("own", "ids")), 9, 9)
