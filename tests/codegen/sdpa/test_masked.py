"""Rows that see no key, under the masked call: values and gradients are those of the spelled-out model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnc  # noqa: F401  (registers the calls)

B, H, N, D = 2, 3, 9, 8
BLIND = (0, 4)
"""Batch and query that see nothing."""


def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor, empty: str) -> Tensor:
    """Attend as people write it: the fill takes the place of a hidden score, or is added to it."""
    scores = q @ k.transpose(-2, -1) * 0.25
    scores = scores if bias is None else scores + bias
    least = torch.finfo(scores.dtype).min
    if empty == "uniform":
        return torch.softmax(scores + torch.zeros(()).masked_fill(~keep, least), -1) @ v
    if empty == "replaced":
        return torch.softmax(scores.masked_fill(~keep, least), -1) @ v
    return torch.softmax(scores.masked_fill(~keep, -torch.inf), -1).masked_fill(~keep, 0.0) @ v


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("empty", ["uniform", "replaced", "zero"])
def test_values_and_gradients_are_the_models(empty: str, blind: bool, with_bias: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(B, H, N, D, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, H, N, N, requires_grad=True) if with_bias else None
    leaves += [bias] if bias is not None else []
    keep = torch.rand(B, 1, N, N) > 0.3
    keep[..., 0] = True
    if blind:
        keep[BLIND[0], :, BLIND[1]] = False
    fill = -torch.inf if empty == "zero" else torch.finfo(torch.float32).min
    q, k, v = leaves[:3]
    want = model(q, k, v, bias, keep, empty)
    got = torch.ops.attnc.masked_sdpa(q, k, v, keep, bias, fill, empty, False, 0.25, False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert theirs.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
