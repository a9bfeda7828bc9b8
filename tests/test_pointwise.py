"""Expressions over a score: the text reads back, and derivatives are those of torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.flex.pointwise import written
from attnc.duals import Dual
from attnc.pointwise import (
    FUNCTIONS,
    Call,
    evaluate,
    names,
    parse_term,
    pull_back,
    pull_back_duals,
    push_forward,
    rename,
    text,
)

X = torch.tensor([-2.5, -0.9, -0.3, 0.2, 0.7, 1.9], dtype=torch.float64)
Y = torch.tensor([[0.4], [1.3]], dtype=torch.float64)
POSITIVE = frozenset({"log", "sqrt", "rsqrt", "pow", "log1p"})


def calls(inner: st.SearchStrategy) -> st.SearchStrategy:
    kinds = [
        st.tuples(*[inner] * len(f.slopes)).map(lambda args, name=name: Call(name, args))
        for name, f in FUNCTIONS.items()
    ]
    return st.one_of(kinds)


leaves = st.one_of(st.sampled_from(["s", "q", "k", "c0", "c12"]), st.floats(allow_nan=False))
expressions = st.recursive(leaves, calls, max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(expressions)
def test_text_reads_back(term):
    assert parse_term(text(term)) == term
    assert " " not in text(term)


def one_call(name: str) -> Call:
    """Apply a function to the score, and to c0 where it takes two."""
    if name == "where":
        return Call("where", (Call("lt", ("s", "c0")), Call("mul", ("s", "s")), "c0"))
    return Call(name, ("s", "c0")[: len(FUNCTIONS[name].slopes)])


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("lt", "le", "gt", "ge", "eq", "ne")])
def test_derivatives_are_those_of_torch(name):
    term = one_call(name)
    s = (X.abs() if name in POSITIVE else X).clone().requires_grad_()
    c = Y.clone().requires_grad_()
    values = {"s": s, "c0": c}
    out = evaluate(term, values)
    grad = torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    read = [values[n] for n in names(term)]
    expected = torch.autograd.grad(out, read, grad)
    found = pull_back(term, {n: x.detach() for n, x in values.items()}, grad)
    for n, want in zip(names(term), expected, strict=True):
        torch.testing.assert_close(found[n], want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_of_values_and_of_gradients_are_those_of_torch(name):
    term = one_call(name)
    read = names(term)
    points = {"s": X.abs() if name in POSITIVE else X, "c0": Y}
    g = torch.Generator().manual_seed(0)
    moves = {n: torch.randn(x.shape, generator=g, dtype=x.dtype) for n, x in points.items()}

    def value(*x: torch.Tensor) -> torch.Tensor:
        return evaluate(term, dict(zip(read, x, strict=True)) | {"s": x[0]}).double()

    x, t = ([of[n] for n in read] for of in (points, moves))
    want, want_tangent = torch.func.jvp(value, tuple(x), tuple(t))
    found = push_forward(term, {n: Dual(points[n], moves[n]) for n in points})
    assert torch.equal(found.value.double(), want)
    tangent = torch.zeros_like(want) if found.tangent is None else found.tangent.expand_as(want)
    torch.testing.assert_close(tangent, want_tangent, rtol=1e-13, atol=1e-13)
    if found.value.dtype == torch.bool:
        return
    grad = Dual(*torch.randn(2, *want.shape, generator=g, dtype=want.dtype))

    def gradients(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.vjp(value, *x[1:])[1](x[0])

    pulled = pull_back_duals(term, {n: Dual(points[n], moves[n]) for n in points}, grad)
    want_grads = torch.func.jvp(gradients, (grad.value, *x), (grad.tangent, *t))
    for n, *each in zip(read, *want_grads, strict=True):
        for got, expected in zip((pulled[n].value, pulled[n].tangent), each, strict=True):
            got = torch.zeros_like(expected) if got is None else got
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_tangents_at_kinks_and_infinite_slopes_are_exact_zeros():
    s = Dual(torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64), torch.tensor([3.0, 3.0, 8.0]).double())
    chosen = push_forward(parse_term("where((s>0.0),sqrt(s),0.0)"), {"s": s})
    assert chosen.tangent.tolist() == [0.0, 0.0, 2.0]
    power = push_forward(parse_term("pow(s,c)"), {"s": s, "c": Dual(torch.zeros(3).double())})
    assert power.tangent.tolist() == [0.0, 0.0, 0.0]


def test_an_arm_that_is_not_chosen_adds_no_gradient():
    term = parse_term("where((s>0.0),sqrt(s),0.0)")
    s = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    assert pull_back(term, {"s": s}, torch.ones_like(s))["s"].tolist() == [0.0, 0.0, 0.25]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_text_for_flex_computes_the_same(name):
    term = one_call(name)
    s = (X.abs() if name in POSITIVE else X).float()
    found = eval(written(term, lambda n: n), {"torch": torch, "score": s, "c0": Y.float()})
    expected = evaluate(term, {"s": s, "c0": Y.float()})
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-6, atol=1e-6)


def test_numbers_in_the_text_for_flex():
    term = parse_term("minimum(maximum(s,-inf),(2.0+maximum(0.5,c0)))")
    found = eval(written(term, lambda n: n), {"torch": torch, "score": X, "c0": Y})
    torch.testing.assert_close(found, evaluate(term, {"s": X, "c0": Y}), rtol=0, atol=0)


def test_rename_leaves_other_names():
    assert text(rename(parse_term("(s*t0)+t1"), {"t0": "c3"})) == "((s*c3)+t1)"


@pytest.mark.parametrize(
    "wrong", ["s+", "lgamma(s)", "relu(s,s)", "s if s else s", "s.x", "relu(x=s)", "'s'", "-s"]
)
def test_what_is_no_expression_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        parse_term(wrong)


def test_infinities_are_numbers():
    assert parse_term("where(c0,s,-inf)") == Call("where", ("c0", "s", -math.inf))
