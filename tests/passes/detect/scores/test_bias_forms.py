"""A bias is named by what its value is made of, and by nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnc.ir import Bias
from attnc.printer import parse
from tests.rewriting import Forward, exported, rounding

B, H, S, D = 2, 4, 6, 8
SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(H)], dtype=torch.float64)


class Attention(nn.Module):
    """Attention with a table of biases and layers that subclasses add to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, H)
        self.grid = nn.Parameter(torch.randn(49, H))
        self.layer = nn.Linear(D, D)
        rows = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")).flatten(1)
        apart = rows[:, :, None] - rows[:, None]
        self.register_buffer("places", apart[0] * 3 + apart[1] + 7)
        self.register_buffer("sines", torch.randn(2 * S - 1, D))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + self.bias(q, k)).softmax(-1) @ v

    def bias(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


def distance() -> Tensor:
    at = torch.arange(S)
    return at[None] - at[:, None]


def named(bias: Callable[[Attention, Tensor, Tensor], Tensor]) -> list[str]:
    """Return the names of the biases, after checking that the rewritten model computes the same."""
    torch.manual_seed(0)
    module = type("Named", (Attention,), {"bias": bias})().double()
    args = tuple(torch.randn(B, H, S, D, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        expected, t = module(*args), exported(module, args)
        found, missed = t.detect()
        assert not missed
        (site,) = found
        assert parse(str(site.match.spec)) == site.match.spec
        t.rewrite(found)
        # A bias is a sum of D products as well; its size is that of the scores.
        torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=3 * rounding(args, 2 * D))
    return [step.form for step in site.match.spec.scores if isinstance(step, Bias)]


def buckets() -> Tensor:
    """T5's: exact up to 8, then logarithmic (arXiv:1910.10683, section 2.1)."""
    n = -distance()
    far = 8 + (torch.log(n.float().clamp(min=1) / 8) / math.log(16) * 8).long()
    return torch.where(n < 8, n.clamp(min=0), far.clamp(max=15))


def skewed(scores: Tensor, columns: int) -> Tensor:
    x = torch.cat([scores.new_zeros(B, H, S, 1), scores], -1)
    return x.view(B, H, columns + 1, S)[:, :, 1:].reshape(B, H, S, columns)[..., :S]


def read_along(scores: Tensor, place: Tensor) -> Tensor:
    return torch.gather(scores, -1, place.expand(B, H, S, S))


FORMS = {
    "alibi by distance": (lambda m, q, k: SLOPES[:, None, None] * distance(), "alibi"),
    "alibi by position": (lambda m, q, k: SLOPES[:, None, None] * torch.arange(S), "alibi"),
    "alibi on both sides": (lambda m, q, k: -distance().abs() * SLOPES.view(H, 1, 1), "alibi"),
    "alibi of a learned slope": (lambda m, q, k: m.grid[0][:, None, None] * distance(), "alibi"),
    "buckets": (lambda m, q, k: m.table(buckets()).permute(2, 0, 1)[None], "relative"),
    "clamped": (lambda m, q, k: m.table(distance().clamp(-3, 3) + 3).permute(2, 0, 1)[None], "relative"),
    "every distance": (lambda m, q, k: m.grid[distance() + S - 1].permute(2, 0, 1), "relative"),
    "windows": (lambda m, q, k: m.grid[m.places.view(-1)].view(S, S, H).permute(2, 0, 1), "table"),
    "listed": (lambda m, q, k: m.grid.mT[:, m.places], "table"),
    "shifted": (lambda m, q, k: skewed(q @ m.layer(m.sines).mT, 2 * S - 1), "relative-shift"),
    "short shift": (lambda m, q, k: skewed(q @ m.layer(m.sines[:S]).mT, S), "relative-shift"),
    "content to place": (
        lambda m, q, k: read_along(q @ m.layer(m.sines).mT, (distance() + 5).clamp(0, 10)),
        "disentangled",
    ),
    "place to content": (
        lambda m, q, k: read_along(k @ m.layer(m.sines).mT, (5 - distance()).clamp(0, 10)).mT,
        "disentangled",
    ),
    "rows of a grid": (
        lambda m, q, k: (q @ m.layer(m.sines[:3]).mT)[..., None].expand(B, H, S, 3, 2).reshape(B, H, S, S),
        "decomposed-relative",
    ),
    "another product": (lambda m, q, k: q @ m.layer(m.sines[:S]).mT, "second-contraction"),
}


@pytest.mark.parametrize(("bias", "form"), FORMS.values(), ids=FORMS)
def test_a_bias_is_named_by_what_it_is_made_of(bias, form):
    assert named(bias) == [form]


NAMELESS = {
    "slope of a query": lambda m, q, k: torch.arange(S, dtype=torch.float64)[:, None] * distance(),
    "distance squared": lambda m, q, k: SLOPES[:, None, None] * distance() * distance(),
    "slope of an input": lambda m, q, k: q.sum((0, 2, 3))[:, None, None] * distance(),
    "a table as it is": lambda m, q, k: m.grid[:S, :1] + m.grid[:S, :1].mT,
    "places from an input": lambda m, q, k: m.table(
        (q.sum(-1) > 0).long()[0, 0][:, None] + 0 * distance()
    ).permute(2, 0, 1),
}


@pytest.mark.parametrize("bias", NAMELESS.values(), ids=NAMELESS)
def test_what_fits_no_form_has_no_name(bias):
    assert named(bias) == [""]


def test_an_input_has_no_name():
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    args = (*(torch.randn(B, H, S, D) for _ in range(3)), torch.randn(B, H, S, S))
    ((site,), _) = exported(Forward(f), args).detect()
    assert "bias(c0)" in str(site.match.spec)


def test_positions_counted_from_a_mask_make_an_alibi():
    """BLOOM's: the key's position is how many tokens before it are not padding."""

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        place = ((mask.cumsum(-1) - 1) * mask)[:, None]
        return (q @ k.mT + (SLOPES[:, None] * place)[:, :, None]).softmax(-1) @ v

    args = (*(torch.randn(B, H, S, D, dtype=torch.float64) for _ in range(3)), torch.ones(B, S))
    ((site,), _) = exported(Forward(f), args).detect()
    assert "bias(c0:alibi)" in str(site.match.spec)
