"""A lifted predicate keeps exactly the pairs that the condition keeps, at every length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc import expr as E
from attnc.expr import Expr
from attnc.masks import CAUSAL, And, Band, Dense, Full, Grid, Mask, Not, Or, Padding, Range
from attnc.passes.detect.masks import lift
from attnc.passes.detect.masks.lift import Positions

B, H = 2, 3


def positions(sq: Expr, sk: Expr) -> Positions:
    names = {"b": E.integer(B), "h": E.integer(H), "q": sq, "k": sk}
    index = {name: E.index(name, n) for name, n in names.items()}
    atoms = [E.only_index(index[name]) for name in "bhqk"]
    return Positions(index["q"], index["k"], sq, sk, tuple((a,) for a in atoms if a is not None))


FIXED = positions(E.integer(5), E.integer(7))
FREE = positions(E.size("s"), E.size("t"))
Q, K = FREE.q, FREE.k
ATOM = {g[0].args[0]: E.generator(g[0]) for g in FREE.roles}


def load(name: str, axes: str) -> Expr:
    return E.load(name, tuple(ATOM[a] for a in axes), "bool")


def evaluate(e: Expr, env: dict[str, int], data: dict[str, Tensor]) -> int | bool:
    if e.op == "poly":
        total = 0
        for mono, c in E.terms(e):
            for g in mono:
                c *= evaluate(g, env, data)
            total += c
        return total
    if e.op in ("index", "size"):
        return env[e.args[0]]
    if e.op == "load":
        return bool(data[e.args[0]][tuple(evaluate(i, env, data) for i in e.args[1])])
    if e.op in ("true", "false"):
        return e.op == "true"
    if e.op in ("le0", "eq0"):
        value = evaluate(e.args[0], env, data)
        return value <= 0 if e.op == "le0" else value == 0
    parts = [evaluate(x, env, data) for x in (e.args[0] if e.op != "not" else e.args)]
    return not parts[0] if e.op == "not" else all(parts) if e.op == "and" else any(parts)


def written_out(e: Expr, sq: int, sk: int, data: dict[str, Tensor]) -> Tensor:
    places = [(b, h, q, k) for b in range(B) for h in range(H) for q in range(sq) for k in range(sk)]
    flat = [evaluate(e, dict(zip("bhqk", p, strict=True), s=sq, t=sk), data) for p in places]
    return torch.tensor(flat).view(B, H, sq, sk)


AXES = {"bk": ("b", "k"), "bq": ("b", "q"), "bhqk": ("b", "h", "q", "k")}


def evaluated(mask: Mask, operands: dict[str, tuple[str, Expr]], sq: int, sk: int, data) -> Tensor:
    """Evaluate a lifted mask, its operands computed from their own conditions."""
    captured = {}
    for name, (axes, value) in operands.items():
        whole = written_out(value, sq, sk, data)
        captured[name] = {"bk": whole[:, 0, 0], "bq": whole[:, 0, :, 0], "bhqk": whole}[axes]
    return mask.keep(Grid(sq, sk, torch.device("cpu"), captured)).expand(B, H, sq, sk)


comparisons = st.one_of(
    st.tuples(st.sampled_from([1, -1, 2]), st.integers(-5, 5)).map(
        lambda p: E.le0(E.add(E.mul(E.integer(p[0]), E.sub(K, Q)), E.integer(p[1])))
    ),
    st.integers(-5, 5).map(lambda n: E.eq0(E.add(E.sub(K, Q), E.integer(n)))),
    st.tuples(st.sampled_from([Q, K]), st.sampled_from([1, -1]), st.integers(-5, 5)).map(
        lambda p: E.le0(E.add(E.mul(E.integer(p[1]), p[0]), E.integer(p[2])))
    ),
    st.integers(-3, 3).map(
        lambda n: E.le0(E.add(E.sub(K, Q), E.sub(E.size("s"), E.size("t")), E.integer(n)))
    ),
)
loads = st.sampled_from([load("row", "bk"), load("rows", "bq"), load("tensor", "bhqk"), load("pairs", "qk")])
leaves = st.one_of(comparisons, comparisons, loads)


def connected(inner):
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(inner.map(E.not_), several.map(lambda x: E.and_(*x)), several.map(lambda x: E.or_(*x)))


conditions = st.recursive(leaves, connected, max_leaves=6)


def data_for(sq: int, sk: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(sq * 100 + sk)
    shapes = {"row": (B, sk), "rows": (B, sq), "tensor": (B, H, sq, sk), "pairs": (sq, sk)}
    return {name: torch.rand(shape, generator=g) < 0.5 for name, shape in shapes.items()}


@settings(max_examples=120, deadline=None)
@given(conditions, st.integers(1, 6), st.integers(1, 6))
def test_lifted_masks_keep_what_the_condition_keeps(condition, sq, sk):
    lifted = lift(condition, FREE, 0)
    operands = {name: (axes, value) for name, axes, value in lifted.operands}
    assert set(lifted.mask.operands) == set(operands)
    data = data_for(sq, sk)
    found = evaluated(lifted.mask, operands, sq, sk, data)
    assert torch.equal(found, written_out(condition, sq, sk, data))


def le(a: Expr, b: Expr) -> Expr:
    return E.le0(E.sub(a, b))


n = E.integer


@pytest.mark.parametrize(
    ("condition", "mask"),
    [
        (E.TRUE, Full()),
        (le(K, Q), CAUSAL),
        (E.and_(le(K, Q), le(Q, E.add(K, n(7)))), Band(7, 0)),
        (E.and_(le(K, E.add(Q, n(2))), le(Q, E.add(K, n(2)))), Band(2, 2)),
        (le(K, E.add(Q, E.sub(E.size("t"), E.size("s")))), Band(None, 0, "end")),
        (le(K, n(3)), Range("k", 0, 4)),
        (E.not_(le(Q, n(3))), Not(Range("q", 0, 4))),
        (E.or_(le(K, Q), le(K, n(1))), Or((CAUSAL, Range("k", 0, 2)))),
        (load("row", "bk"), Padding("c0")),
        (E.not_(load("rows", "bq")), Padding("c0", "q")),
        (load("tensor", "bhqk"), Dense("c0")),
        (load("pairs", "qk"), Dense("c0")),
        (E.eq0(E.sub(Q, K)), Band(0, 0)),
    ],
    ids=str,
)
def test_closed_forms(condition, mask):
    found = lift(condition, FREE, 0).mask
    if isinstance(mask, Or):
        assert isinstance(found, Or)
        assert set(found.parts) == set(mask.parts)
    else:
        assert found == mask


def test_data_on_the_same_axes_becomes_one_operand():
    both = E.and_(le(K, Q), load("row", "bk"), load("other", "bk"), load("rows", "bq"))
    lifted = lift(both, FREE, 2)
    assert sorted(axes for _, axes, _ in lifted.operands) == ["bk", "bq"]
    assert {name for name, _, _ in lifted.operands} == {"c2", "c3"}
    assert isinstance(lifted.mask, And)
    assert CAUSAL in lifted.mask.parts


def test_a_band_at_the_end_is_named_so_where_lengths_are_fixed():
    q, k = FIXED.q, FIXED.k
    assert lift(le(k, E.add(q, n(2))), FIXED, 0).mask == Band(None, 0, "end")
    window = E.and_(le(k, E.add(q, n(2))), le(q, E.add(k, n(1))))
    assert lift(window, FIXED, 0).mask == Band(3, 0, "end")
    assert lift(le(k, q), FIXED, 0).mask == CAUSAL
