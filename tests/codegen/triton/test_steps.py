from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.steps import (
    LOG2E,
    fill_text,
    hidden,
    kernel_steps,
    overflows,
    reference_fill,
    reference_steps,
)
from attnc.ir import AttentionSpec, Bias, Fill, Gain, Operand, Scale, Softcap

factors = st.floats(-3, 3).filter(lambda x: abs(x) > 0.01)
steps = st.one_of(
    st.builds(Scale, factors),
    st.builds(Softcap, st.floats(0.5, 60)),
    st.builds(Bias, st.just("b"), st.sampled_from([1, -1])),
    st.builds(Gain, st.just("g")),
)
SHAPE = (1, 2, 3, 4)


def spec_with(found) -> AttentionSpec:
    q, k, v = (
        Operand(n, a, ("b", 2, s, 16), torch.float32)
        for n, a, s in (("q", "bhqd", "s"), ("k", "bhkd", "t"), ("v", "bhke", "t"))
    )
    names = dict.fromkeys(n for s in found for n in s.operands)
    return AttentionSpec(
        q,
        k,
        v,
        1,
        tuple(found),
        captured=tuple(Operand(n, "bhqk", ("b", 2, "s", "t"), torch.float32) for n in names),
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=6))
def test_steps_as_text_compute_the_steps_the_kernel_in_base_2(found) -> None:
    spec = spec_with(found)
    inputs = name_inputs(spec)
    g = torch.Generator().manual_seed(0)
    s, b, t = (torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(3))
    want = s
    for step in found:
        want = step.apply(want, {"b": b, "g": t})
    tensors = {x.name: {"b": b, "g": t}[x.operand.name] for x in inputs}
    scope = {
        "s": s,
        "_tanh": torch.tanh,
        "_base2": lambda x: x * LOG2E,
        "torch": torch,
        "work": torch.float64,
        **tensors,
    }
    for lines, unit in (
        (kernel_steps(spec.scores, inputs), LOG2E),
        (reference_steps(spec.scores, inputs), 1.0),
    ):
        space = dict(scope)
        exec("\n".join(lines), space)
        torch.testing.assert_close(space["s"], want * unit, rtol=1e-12, atol=1e-12)


def test_a_scale_alone_is_one_product() -> None:
    assert kernel_steps((Scale(0.5),), ()) == [f"s = s * {0.5 * LOG2E!r}  # 0.5 * log2(e)"]
    assert kernel_steps((Scale(0.5), Scale(2.0)), ()) == [f"s = s * {LOG2E!r}  # log2(e)"]


def test_a_scale_before_a_cap_goes_into_the_tanh() -> None:
    lines = kernel_steps((Scale(0.5), Softcap(50.0)), ())
    assert lines == [
        f"s = _tanh(s * {0.5 / 50!r})  # softcap(50.0)",
        f"s = s * {50 * LOG2E!r}  # 50.0 * log2(e)",
    ]


def test_the_fp32_minimum_stands_for_itself_because_base_2_cannot_hold_it() -> None:
    low = torch.finfo(torch.float32).min
    assert hidden(Fill(low)) == low
    assert overflows(Fill(low))
    assert not overflows(Fill(-1e9))
    assert not overflows(Fill())
    assert hidden(Fill()) == -math.inf


def test_a_bias_that_may_be_a_mask_keeps_its_least_values_finite() -> None:
    wide = name_inputs(spec_with([Bias("b")]))
    assert kernel_steps((Bias("b"),), wide) == [f"s = s * {LOG2E!r} + _base2(bias)"]
    half = tuple(
        dataclasses.replace(x, operand=dataclasses.replace(x.operand, dtype=torch.float16)) for x in wide
    )
    assert kernel_steps((Bias("b", -1),), half) == [f"s = s * {LOG2E!r} + bias * {-LOG2E!r}"]


def test_a_factor_after_a_bias_that_may_be_a_mask_comes_before_base_2() -> None:
    wide = name_inputs(spec_with([Bias("b")]))
    assert kernel_steps((Bias("b"), Scale(0.5)), wide) == ["s = s + bias", "s = _base2(s * 0.5)"]
    capped = kernel_steps((Bias("b"), Softcap(5.0)), wide)
    assert capped[-1] == f"s = s * {5 * LOG2E!r}  # 5.0 * log2(e)"  # a cap leaves nothing low


def test_fills_as_text() -> None:
    assert fill_text(Fill()) == 'tl.where(keep, s, float("-inf"))'
    assert fill_text(Fill(-1.0, "add")) == f"tl.where(keep, s, s + {-LOG2E!r})"
    s, keep = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    for fill in (Fill(), Fill(-1e4, "add"), Fill(-1e4), Fill(-math.inf, "add")):
        got = eval(reference_fill(fill), {"s": s, "keep": keep, "torch": torch, "math": math})
        torch.testing.assert_close(got, fill.apply(s, keep), rtol=0, atol=0)
