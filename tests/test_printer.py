"""The text of a spec says all of it: what is printed is parsed back, and what is no spec is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Fill,
    Gain,
    Normalized,
    Operand,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
)
from attnc.masks import And, Band, Dense, Full, Mask, Not, Or, Padding, Range
from attnc.pointwise import text
from attnc.printer import parse, parse_mask
from tests.test_pointwise import expressions

names = st.sampled_from(["c0", "c1", "c12"])
numbers = st.floats(allow_nan=False)
ends = st.one_of(st.none(), st.integers(-9, 10**6))
atoms = st.one_of(
    st.just(Full()),
    st.builds(Band, ends, ends, st.sampled_from(["start", "end"])),
    st.builds(Range, st.sampled_from(["q", "k"]), st.integers(0, 9), st.integers(0, 9)),
    st.builds(Padding, names, st.sampled_from(["k", "q"])),
    st.builds(Dense, names),
)


def trees(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.one_of(several.map(And), several.map(Or), inner.map(Not))


masks = st.recursive(atoms, trees, max_leaves=6)
dims = st.one_of(
    st.integers(0, 2**40),
    st.sampled_from(
        [
            "s77",
            "s0+8",
            "2*s0",
            "s0*s1-1",
            "Mod(s0,8)",
            "Max(1,Mod(s0,8)+2)",
            "(s0//2)",
            "u0",
            "((((s0//80)-3)//2)-1)//2+1",
        ]
    ),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool])


def operands(name: str, axes: str) -> st.SearchStrategy[Operand]:
    return st.builds(Operand, st.just(name), st.just(axes), st.tuples(*[dims] * len(axes)), dtypes)


steps = st.one_of(
    numbers.map(Scale),
    st.floats(1e-3, 1e3).map(Softcap),
    expressions.map(lambda t: Pointwise(text(t))),
    st.builds(Bias, names, st.sampled_from([1, -1])),
    names.map(Gain),
)
sinks = st.one_of(st.none(), names, numbers)
specs = st.builds(
    AttentionSpec,
    operands("q", "bhqd"),
    operands("k", "bhkd"),
    operands("v", "bhke"),
    st.integers(1, 64),
    st.lists(steps, max_size=4).map(tuple),
    masks,
    st.just(Fill()),
    st.one_of(
        st.builds(Softmax, sinks, st.booleans(), st.booleans()),
        st.just(SignedSoftmax()),
        st.just(RoundedSoftmax()),
        expressions.map(lambda t: Elementwise(text(t))),
        st.builds(
            lambda t, added, least: Normalized(text(t), added, least),
            expressions,
            numbers,
            st.one_of(st.just(-math.inf), numbers),
        ),
    ),
    st.lists(operands("c0", "bhqk"), max_size=2).map(tuple),
    st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=120, deadline=None)
@given(masks)
def test_masks_read_back(mask):
    assert parse_mask(str(mask)) == mask


@settings(max_examples=120, deadline=None)
@given(specs, st.builds(Fill, numbers, st.sampled_from(["add", "replace"])))
def test_specs_read_back(spec, fill):
    assert parse(str(spec)) == spec
    if not isinstance(spec.mask, Full):
        filled = AttentionSpec(spec.q, spec.k, spec.v, 1, (), spec.mask, fill)
        assert parse(str(filled)) == filled


def test_one_line_says_it_all():
    spec = AttentionSpec(
        Operand("q", "bhqd", (2, 8, "s77", 64), torch.bfloat16),
        Operand("k", "bhkd", (2, 4, "s77", 64), torch.bfloat16),
        Operand("v", "bhke", (2, 4, "s77", 64), torch.bfloat16),
        2,
        (Scale(0.125), Softcap(50.0)),
        And((Band(4095, 0), Padding("c0"))),
        Fill(-math.inf, "add"),
        Softmax("c1"),
        (Operand("c0", "bk", (2, "s77"), torch.bool), Operand("c1", "h", (8,), torch.bfloat16)),
    )
    assert str(spec) == (
        "attn q=bhqd[2,8,s77,64]:bfloat16 k=bhkd[2,4,s77,64]:bfloat16 v=bhke[2,4,s77,64]:bfloat16 group=2 "
        "scale(0.125) softcap(50.0) mask=(window(left=4095,right=0) & padding(key,c0)) fill(add,-inf) "
        "softmax(sink=c1) with c0=bk[2,s77]:bool with c1=h[8]:bfloat16"
    )
    assert parse(str(spec)) == spec


GOOD = "attn q=bhqd[1,1,2,4]:float32 k=bhkd[1,1,2,4]:float32 v=bhke[1,1,2,4]:float32 group=1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected 'attn"),
        (GOOD, "expected 'attn"),
        (f"{GOOD} mask=none", "expected a normalizer"),
        (f"{GOOD} mask=none sigmoid", "expected softmax"),
        (f"{GOOD} mask=none softmax(loud)", "expected sink=, upcast or safe, found 'loud'"),
        (
            f"{GOOD} tanh(3) mask=none softmax",
            "expected scale, softcap, bias, gain or pointwise, found 'tanh",
        ),
        (f"{GOOD} pointwise(lgamma(s)) mask=none softmax", "expected a name, a number or a known"),
        (f"{GOOD} pointwise(relu(s,s)) mask=none softmax", "expected a name, a number or a known"),
        (f"{GOOD} pointwise(s+) mask=none softmax", "expected an elementwise expression"),
        (f"{GOOD} mask=banana softmax", "expected none, causal, window"),
        (f"{GOOD} mask=(causal & dense(a) | dense(b)) softmax", "expected one kind of operator"),
        (f"{GOOD} mask=causal fill(put,-1.0) softmax", "expected fill"),
        (GOOD.replace("float32", "float33") + " mask=none softmax", "expected an operand such as"),
    ],
)
def test_what_is_no_spec_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected.replace("(", r"\(")):
        parse(text)


def test_text_after_a_mask_is_refused():
    with pytest.raises(ValueError, match="expected the end of the mask, found ' softmax'"):
        parse_mask("causal softmax")
