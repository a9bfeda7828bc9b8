"""Derivatives as kernel text are those of autograd, function by function and through chains of steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.pointwise import _INFIX, _KERNEL
from attnc.codegen.triton.slopes import RULES, chain, gradients, is_steep, weigh_slope
from attnc.codegen.triton.steps import LOG2E
from attnc.ir import AttentionSpec, Bias, Elementwise, Gain, Operand, Pointwise, Scale, Softcap
from attnc.pointwise import FUNCTIONS, parse_term

SHAPE = (1, 2, 9, 7)
_SAME = [
    "abs",
    "exp",
    "exp2",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "sigmoid",
    "erf",
    "floor",
    "ceil",
]


def _beside(f):
    return lambda a, b: f(*torch.broadcast_tensors(torch.as_tensor(a).double(), torch.as_tensor(b).double()))


def _where(c, a, b):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.where(c, a, b)


TL = SimpleNamespace(
    **{n: getattr(torch, n) for n in _SAME},
    zeros_like=torch.zeros_like,
    where=_where,
    maximum=_beside(torch.maximum),
    minimum=_beside(torch.minimum),
    float32=torch.float64,
)
FUNCTIONS_OF_FILES = {
    "_tanh": torch.tanh,
    "_atan": torch.atan,
    "_pow": torch.pow,
    "_base2": lambda x: x * LOG2E,
    "_times": lambda g, x: torch.where(g == 0, 0.0, g * x),
}
factors = st.floats(-3, 3).filter(lambda x: abs(x) > 0.01)
EXPRESSIONS = (
    "relu((s+c))",
    "(s*sigmoid(c))",
    "where(flag,(s*s),(c-s))",
    "gelu_tanh((s*0.5))",
    "maximum(s,(c*0.1))",
    "(s-softplus(abs((q-k))))",
    "pow((abs(s)+1.0),c)",
    "(c*2.0)",
)
steps = st.one_of(
    st.builds(Scale, factors),
    st.builds(Softcap, st.floats(0.5, 60)),
    st.builds(Bias, st.just("c"), st.sampled_from([1, -1])),
    st.builds(Gain, st.just("g")),
    st.builds(Pointwise, st.sampled_from(EXPRESSIONS)),
)


def run(lines, **scope):
    space = {"tl": TL, **FUNCTIONS_OF_FILES, **scope}
    exec("\n".join(lines), space)
    return space


def call(name: str) -> Pointwise:
    """Return an expression that calls a function where it is defined and smooth."""
    first = "((s*s)+0.125)" if name in ("log", "sqrt", "rsqrt", "log1p", "pow") else "(s*1.5)"
    args = [first, "t", "0.25"][: len(FUNCTIONS[name].slopes)]
    if name == "where":
        args[0] = "(s>0.1)"
    return Pointwise(f"({args[0]}{_INFIX[name]}{args[1]})" if name in _INFIX else f"{name}({','.join(args)})")


def spec_with(found) -> AttentionSpec:
    q, k, v = (
        Operand(n, a, ("b", 2, s, 16), torch.float32)
        for n, a, s in (("q", "bhqd", "s"), ("k", "bhkd", "t"), ("v", "bhke", "t"))
    )
    names = dict.fromkeys(n for s in found for n in s.operands)
    dtypes = {n: torch.bool if n == "flag" else torch.float32 for n in names}
    captured = (Operand(n, "bhqk", ("b", 2, "s", "t"), dtypes[n]) for n in names)
    return AttentionSpec(q, k, v, 1, tuple(found), captured=tuple(captured))


def pulled(found, tensors, ds, *, base2=True):
    """Return the score, and what the text makes of ``ds``: gradients of the contraction and of tensors."""
    inputs = name_inputs(spec_with(found))
    text = chain(found, inputs, base2=base2)
    named = {x.name: tensors[x.operand.name] for x in inputs}
    places = {"qi": torch.arange(9.0)[:, None].double(), "ki": torch.arange(7.0)[None, :].double()}
    space = run([*text.lines, "score = s", *text.pulls], s=tensors["s"], ds=ds, dp=ds, **places, **named)
    grads = {x.operand.name: space[f"d_{x.name}"] for x in inputs if not x.is_bool}
    return space["score"], space["ds"] * text.factor, grads


def draw(seed: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, c, t, gain, ds = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(5))
    return {"s": s, "c": c, "t": t, "g": gain, "ds": ds, "flag": torch.rand(SHAPE, generator=g) < 0.5}


def test_every_function_of_kernels_has_a_rule() -> None:
    assert set(RULES) == set(_KERNEL) | set(_INFIX) | {"pow"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_rule_of_a_function_is_its_derivative(name: str) -> None:
    tensors = draw()
    step = call(name)
    want = step.pull_back(tensors["s"], tensors, tensors["ds"])
    _, ds, grads = pulled([step], tensors, tensors["ds"])
    torch.testing.assert_close(ds, want.get("s", torch.zeros(SHAPE).double()), rtol=1e-11, atol=1e-11)
    if "t" in step.operands:
        torch.testing.assert_close(grads["t"], want["t"], rtol=1e-11, atol=1e-11)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=5), st.booleans())
@example([Bias("c", 1), Scale(-1.0625)], False)
def test_chains_of_steps_pull_back_as_autograd_does(found, base2: bool) -> None:
    tensors = draw()
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if n in ("s", "c", "g")}
    want = leaves["s"]
    for step in found:
        want = step.apply(want, {**tensors, **leaves})
    score, ds, grads = pulled(found, tensors, tensors["ds"], base2=base2)
    torch.testing.assert_close(score, want.detach() * (LOG2E if base2 else 1.0), rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(want, leaves.values(), tensors["ds"], allow_unused=True)
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    for (name, _), g in zip(leaves.items(), wanted, strict=True):
        got = ds if name == "s" else grads.get(name, zero)
        torch.testing.assert_close(got.expand(SHAPE), zero if g is None else g, rtol=1e-9, atol=1e-9)


def test_an_arm_that_is_not_chosen_adds_an_exact_zero() -> None:
    s = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    for text, want in (
        ("where((s>0.0),sqrt(s),s)", [1.0, 1.0, 0.25]),
        ("sqrt(relu(s))", [0.0, 0.0, 0.25]),
        ("maximum(log(s),0.0)", [0.0, 0.0, 0.25]),
    ):
        _, ds, _ = pulled([Pointwise(text)], {"s": s}, torch.ones_like(s))
        assert ds.tolist() == want, text


def test_a_zero_gradient_stays_zero_next_to_an_infinite_slope() -> None:
    s = torch.tensor([0.0, 0.0], dtype=torch.float64)
    _, ds, _ = pulled([Pointwise("sqrt(s)")], {"s": s}, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ds.tolist() == [0.0, float("inf")]
    assert is_steep(parse_term("sqrt(s)"))
    assert not is_steep(parse_term("(tanh(s)/4.0)"))


def test_numbers_that_choose_nothing_are_left_out() -> None:
    assert gradients(parse_term("((s+1.0)-0.0)")) == {"s": "ds"}
    assert gradients(parse_term("floor(s)")) == {}
    text = chain((Scale(0.5), Pointwise("(s-3.0)")), (), base2=True)
    assert text.pulls == ()
    assert text.factor == 0.5


def test_a_soft_cap_reads_the_tanh_that_the_score_has() -> None:
    text = chain((Scale(0.5), Softcap(50.0), Scale(2.0)), (), base2=True)
    assert text.lines[:2] == ("s = _tanh(s * 0.01)  # softcap(50.0)", "t1 = s")
    assert text.pulls == ("ds = ds * (1.0 - t1 * t1)  # softcap(50.0)",)
    assert text.factor == 1.0


def test_what_is_read_again_is_computed_once() -> None:
    expr = "silu((s+gelu((s*2.0))))"
    text = chain((Pointwise(expr),), (), base2=True)
    assert max(line.count("tl.erf") for line in text.pulls) == 1
    assert sum(line.count("tl.erf") for line in text.pulls) <= 2  # its value, and inside its slope


@pytest.mark.parametrize("expr", ["sigmoid(s)", "(square(relu(s))/64.0)", "tanh(s)", "(s*0.1)", "gelu(s)"])
def test_the_slope_of_weights_element_by_element(expr: str) -> None:
    tensors = draw()
    s = tensors["s"].requires_grad_()
    p, _ = Elementwise(expr).apply(s, {})
    lines, _ = weigh_slope(Elementwise(expr))
    got = run(lines, s=s.detach(), p=p.detach(), dp=tensors["ds"])["ds"]
    (want,) = torch.autograd.grad(p, s, tensors["ds"])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
