"""A spec, executed, is the attention that its text says, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnc.ir import AttentionSpec, Bias, Fill, Gain, Operand, Scale, Softcap, Softmax
from attnc.masks import CAUSAL, Band, Dense, Mask, Padding, both

B, H, G, S, T, D, E = 2, 3, 2, 5, 7, 11, 13
EPS = torch.finfo(torch.float64).eps


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = randn(B, H * G, S, D), randn(B, H, T, D, seed=1), randn(B, H, T, E, seed=2)
BIAS, ROW, SINK = randn(1, H * G, S, T, seed=3), torch.arange(T).expand(B, T) < 4, randn(H * G, seed=4)


def spec(**changes: object) -> AttentionSpec:
    plain = AttentionSpec(
        Operand("q", "bhqd", tuple(Q.shape), Q.dtype),
        Operand("k", "bhkd", tuple(K.shape), K.dtype),
        Operand("v", "bhke", tuple(V.shape), V.dtype),
        G,
        (Scale(0.3),),
    )
    return replace(plain, **changes)


def bias_operand(name: str = "c0") -> Operand:
    return Operand(name, "bhqk", tuple(BIAS.shape), BIAS.dtype)


def plain_attention(scores: Tensor, hidden: float | Tensor = 0.0) -> Tensor:
    """Attention by exponentials, without anything of ours."""
    scores = scores + hidden
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ V.repeat_interleave(G, 1)


def raw_scores() -> Tensor:
    return torch.einsum("bhsd,bhtd->bhst", Q, K.repeat_interleave(G, 1))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Allow what roundings of sums of D and T terms may do."""
    tolerance = 16 * EPS * (D + T) * float(V.abs().max()) * float(raw_scores().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def test_scale_and_groups():
    out, lse = spec()(Q, K, V)
    assert out.shape == (B, H * G, S, E)
    assert_equal(out, plain_attention(0.3 * raw_scores()))
    assert_equal(lse, (0.3 * raw_scores()).exp().sum(-1).log())


def test_steps_run_in_order():
    steps = (Scale(0.3), Bias("c0"), Softcap(2.0), Gain("c0"), Bias("c0", -1))
    out, _ = spec(scores=steps, captured=(bias_operand(),))(Q, K, V, (BIAS,))
    scores = 2.0 * torch.tanh((0.3 * raw_scores() + BIAS) / 2.0) * BIAS - BIAS
    assert_equal(out, plain_attention(scores))


MASKS: list[tuple[Mask, Tensor]] = [
    (CAUSAL, torch.ones(S, T, dtype=torch.bool).tril()),
    (Band(None, 0, "end"), torch.ones(S, T, dtype=torch.bool).tril(T - S)),
    (Band(2, 1), torch.ones(S, T, dtype=torch.bool).tril(1).triu(-2)),
    (Padding("c0"), ROW[:, None, None, :]),
    (both(CAUSAL, Padding("c0")), ROW[:, None, None, :] & torch.ones(S, T, dtype=torch.bool).tril()),
]


@pytest.mark.parametrize("how", ["add", "replace"])
@pytest.mark.parametrize(("mask", "keep"), MASKS, ids=lambda x: str(x) if isinstance(x, Mask) else "")
def test_masks_hide(mask, keep, how):
    row = Operand("c0", "bk", (B, T), torch.bool)
    named = mask.operands
    masked = spec(mask=mask, fill=Fill(-math.inf, how), captured=(row,) if named else ())
    out, _ = masked(Q, K, V, (ROW,) if named else ())
    hidden = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -math.inf)
    assert_equal(out, plain_attention(0.3 * raw_scores(), hidden))


def hide_all(fill: Fill, norm: Softmax | None = None) -> Tensor:
    """Run with a mask that hides every key."""
    keep = Operand("c0", "bhqk", (1, 1, 1, 1), torch.bool)
    out, _ = spec(mask=Dense("c0"), fill=fill, norm=norm or Softmax(), captured=(keep,))(
        Q, K, V, (torch.zeros(1, 1, 1, 1, dtype=torch.bool),)
    )
    return out


def test_a_row_without_keys_is_what_its_fill_says():
    mean = V.mean(2, keepdim=True).repeat_interleave(G, 1).expand(B, H * G, S, E)
    assert hide_all(Fill()).isnan().all()
    assert_equal(hide_all(Fill(-1e9, "replace")), mean)
    assert_equal(hide_all(Fill(-1e300, "add")), mean)
    assert_equal(hide_all(Fill(-100.0, "add")), plain_attention(0.3 * raw_scores()))
    assert torch.equal(hide_all(Fill(), Softmax(safe=True)), torch.zeros_like(mean))
    assert torch.equal(hide_all(Fill(), Softmax(sink=0.0)), torch.zeros_like(mean))


def test_safe_hides_no_other_fault():
    poisoned = K.clone()
    poisoned[0, 0, 0, 0] = math.nan
    out, _ = spec(norm=Softmax(safe=True))(Q, poisoned, V)
    assert out[0, :G].isnan().all()
    assert not out[1].isnan().any()


def test_sinks_enter_the_denominator_only():
    sink = Operand("c0", "h", (H * G,), torch.float64)
    out, lse = spec(norm=Softmax(sink="c0"), captured=(sink,))(Q, K, V, (SINK,))
    column = SINK.view(1, -1, 1, 1).expand(B, -1, S, 1)
    scores = torch.cat([0.3 * raw_scores(), column], -1)
    weights = (scores.exp() / scores.exp().sum(-1, keepdim=True))[..., :-1]
    assert_equal(out, weights @ V.repeat_interleave(G, 1))
    assert_equal(lse, scores.exp().sum(-1).log())


def test_half_precision_is_computed_in_single():
    q, k, v = (x.to(torch.bfloat16) for x in (Q, K, V))
    out, lse = spec()(q, k, v)
    exact, _ = spec()(q.double(), k.double(), v.double())
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    half_unit = torch.finfo(torch.bfloat16).eps / 2
    assert ((out.double() - exact).abs() <= 1.01 * half_unit * exact.abs() + 1e-6).all()


def test_finite_fills_of_wide_types_fit_narrow_ones():
    row = Operand("c0", "bk", (B, T), torch.bool)
    masked = spec(mask=Padding("c0"), fill=Fill(torch.finfo(torch.float64).min, "replace"), captured=(row,))
    out, _ = masked(Q.float(), K.float(), V.float(), (ROW & False,))
    assert out.isfinite().all()


def test_the_number_of_captured_tensors_is_checked():
    with pytest.raises(ValueError, match="expected 1 captured tensors, found 0"):
        spec(scores=(Bias("c0"),), captured=(bias_operand(),))(Q, K, V)


def test_facts_of_a_spec():
    symbolic = replace(spec(), q=Operand("q", "bhqd", (2, 6, "s77", 11), torch.float64))
    assert symbolic.lengths() == (None, T)
    assert spec(scores=(Scale(2.0), Scale(3.0), Softcap(5.0), Scale(7.0))).scale == 6.0
    assert hash(spec()) == hash(spec())
    assert spec() != spec(group_size=1)
