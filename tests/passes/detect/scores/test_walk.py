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


GRID = (3, 5)


def decomposed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Decomposed relative positions of MViTv2 and SAM: rows and columns of the grid of keys apart."""
    n = GRID[0] * GRID[1]
    w = (q @ k.mT * 0.3).view(-1, n, *GRID)
    w = w + rows[:, :, :, None] + columns[:, :, None, :]
    return w.view(-1, n, n).softmax(-1) @ v


def decomposed_queries(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    n = GRID[0] * GRID[1]
    w = (q @ k.mT * 0.3).view(-1, *GRID, *GRID)
    w = w + rows.view(-1, *GRID, GRID[0])[..., None] + columns.view(-1, *GRID, GRID[1])[..., None, :]
    return w.reshape(-1, n, n).softmax(-1) @ v


@pytest.mark.parametrize("f", [decomposed, decomposed_queries], ids=lambda f: f.__name__)
def test_tables_of_a_part_of_the_keys_are_repeated_along_the_rest(f):
    n = GRID[0] * GRID[1]
    args = tuple(randn(6, n, d, seed=d) for d in (4, 6, 7, *GRID))
    args = (args[0], randn(6, n, 4, seed=9), *args[2:])
    t = traced(f, args)
    spec = only_spec(t)
    assert [type(s).__name__ for s in spec.scores] == ["Scale", "Bias", "Bias"]
    found, _ = t.detect()
    t.rewrite(found)
    torch.testing.assert_close(t.run(*args), f(*args), rtol=1e-10, atol=64 * rounding(args, 4 + n))
