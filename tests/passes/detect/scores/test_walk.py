"""Where two score tensors meet, one is the main one and the other is read where it stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.ir import Bias, Gain, Pointwise
from tests.rewriting import Traced, only_spec, rounding, traced

B, H, S, D, E = 2, 3, 7, 11, 13
SPAN = 4


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (randn(B, H, S, d, seed=i) for i, d in enumerate((D, D, E)))
R = randn(B, H, 2 * S - 1, D, seed=4)
R2 = randn(B, H, 2 * SPAN, D, seed=5)


def shifted(x: Tensor) -> Tensor:
    """Transformer-XL (arXiv:1901.02860), appendix B: pad, view, drop a row."""
    b, h, s, t = x.shape
    x = F.pad(x, (1, 0)).view(b, h, t + 1, s)[:, :, 1:]
    return x.reshape(b, h, s, t)[..., :S]


def transformer_xl(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return ((q @ k.mT + shifted(q @ r.mT)) * D**-0.5).softmax(-1) @ v


def conformer(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    position = shifted(q @ r.mT)
    return ((position + q @ k.mT) * D**-0.5).softmax(-1) @ v


def deberta(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """DeBERTa (arXiv:2006.03654), equation 4."""
    at = (torch.arange(S)[:, None] - torch.arange(S) + SPAN).clamp(0, 2 * SPAN - 1).expand(B, H, S, S)
    content = torch.gather(q @ r.mT, -1, at)
    place = torch.gather(k @ r.mT, -1, at).mT
    return ((q @ k.mT + content + place) * (3 * D) ** -0.5).softmax(-1) @ v


def tapa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token-aware phase attention (arXiv:2509.12635), section 3."""
    far = (torch.arange(S)[:, None] - torch.arange(S)).abs().to(q.dtype) ** 0.1
    amplitude = q[..., :5] @ k[..., :5].mT / 5**0.5
    phase = q[..., 5:] @ k[..., 5:].mT / 6**0.5
    return (amplitude * torch.cos(2 * torch.pi * far * phase)).softmax(-1) @ v


def phase_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    phase = q[..., 5:] @ k[..., 5:].mT
    return (torch.cos(phase) * (q[..., :5] @ k[..., :5].mT)).softmax(-1) @ v


def latent_and_rope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[..., :5] @ k[..., :5].mT + q[..., 5:] @ k[..., 5:].mT).softmax(-1) @ v


def greatest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(q[..., :5] @ k[..., :5].mT, q[..., 5:] @ k[..., 5:].mT).softmax(-1) @ v


CASES = {
    transformer_xl: ((Q, K, V, R), Bias),
    conformer: ((Q, K, V, R), Bias),
    deberta: ((Q, K, V, R2), Bias),
    tapa: ((Q, K, V), Gain),
    phase_first: ((Q, K, V), Gain),
    latent_and_rope: ((Q, K, V), Bias),
    greatest: ((Q, K, V), Pointwise),
}


@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_second_score_is_an_operand(f):
    args, kind = CASES[f]
    t = traced(f, args)
    spec = only_spec(t)
    assert any(isinstance(step, kind) for step in spec.scores), spec
    assert spec.captured[-1].shape == (B, H, S, S)
    found, _ = t.detect()
    assert not found[0].match.escapes
    t.rewrite(found)
    torch.testing.assert_close(t.run(*args), f(*args), rtol=1e-10, atol=64 * rounding(args, D + S))


@pytest.mark.parametrize("f", [transformer_xl, conformer])
def test_the_shifted_term_is_the_second(f):
    t = traced(f, CASES[f][0])
    found, _ = t.detect()
    assert found[0].operands["k"].source.startswith("k")


def refused(t: Traced) -> str:
    found, missed = t.detect()
    assert not found
    return missed[0][0].code


def test_three_scores_under_one_function_are_refused():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [q[..., i::3][..., :3] @ k[..., i::3][..., :3].mT for i in range(3)]
        return torch.where(parts[0] > 0, parts[1], parts[2]).softmax(-1) @ v

    assert refused(traced(f, (Q, K, V))) == "scores-combined"


def test_scores_of_shifted_keys_are_refused():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        return (s + F.pad(s, (1, 0))[..., :-1]).softmax(-1) @ v

    assert refused(traced(f, (Q, K, V))) == "scores-combined"
