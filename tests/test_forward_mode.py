"""Forward mode through optimized models: the same tangents and the same gradients of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnc

WIDTH, HEADS, LENGTH = 16, 4, 6


class Norm(nn.Module):
    """RMSNorm spelled out: ``torch.compile`` fails on a LayerNorm in forward mode (torch 2.13)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """One layer of a causal transformer, its attention spelled out, or as a call of SDPA."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.before, self.after = Norm(), Norm()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v, ~hidden)
        scores = q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.after(x))))


class Velocity(nn.Module):
    """A field over sequences and time, as flow matching trains."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.Sequential(Block(False), Block(fused))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.blocks(x + self.time(t)[:, None])
        return out


class Calls(TorchDispatchMode):
    """Counts the operators of ours that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnc":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> Velocity:
    torch.manual_seed(0)
    return Velocity().double()


@pytest.fixture(scope="module")
def fast(model: Velocity) -> nn.Module:
    return attnc.optimize(model, inputs()[0])


def inputs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 2, LENGTH, WIDTH, generator=g, dtype=torch.float64)
    return (x, torch.tensor([[0.3], [0.8]]).double()), (v, torch.ones(2, 1).double())


def loss(model: nn.Module) -> Tensor:
    """Return a loss over a derivative along the flow."""
    point, direction = inputs()
    velocity, change = torch.func.jvp(model, point, direction)
    return (velocity + 0.5 * change).square().mean()


def test_tangents_through_an_optimized_model_are_its_own(model: Velocity, fast: nn.Module) -> None:
    point, direction = inputs()
    assert [s.status for s in fast.report.sites] == ["rewritten"] * 2
    found = torch.func.jvp(fast, point, direction)
    with Calls() as seen:
        again = torch.func.jvp(fast, point, direction)
    assert seen.counts == {"attend_tangent": 2}
    torch.testing.assert_close(found, again)
    torch.testing.assert_close(found, torch.func.jvp(model, point, direction))
    assert fast.report.warnings == []
    with Calls() as seen:
        fast(*point)  # without tangents the lowered program
    assert seen.counts == {}


def test_a_loss_over_tangents_trains_an_optimized_model_alike(model: Velocity, fast: nn.Module) -> None:
    loss(fast)
    found: list[list[Tensor]] = []
    for each in (fast, model):
        with Calls() as seen:
            loss(each).backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
        each.zero_grad()
        assert seen.counts == ({"attend_tangent": 2, "attend_tangent_backward": 2} if each is fast else {})
    assert len(found[1]) == len(list(model.parameters()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def before_it_is_captured(model: nn.Module) -> nn.Module:
    return attnc.optimize(model)


def of_another_kind(model: nn.Module) -> nn.Module:
    """Capture for one sequence: that program is not valid for two."""
    return attnc.optimize(model, tuple(x[:1] for x in inputs()[0]), verify=False, dynamic_shapes=None)


@pytest.mark.parametrize("way", [before_it_is_captured, of_another_kind])
def test_a_call_without_a_program_has_tangents(way: Callable[..., nn.Module], model: Velocity) -> None:
    point, direction = inputs()
    fast = way(model)
    for each in (point, tuple(x[:, :3] if x.dim() == 3 else x for x in point)):
        along = tuple(t[:, : x.shape[1]] for t, x in zip(direction, each, strict=True))
        torch.testing.assert_close(torch.func.jvp(fast, each, along), torch.func.jvp(model, each, along))
    torch.testing.assert_close(fast(*point), model(*point))


def test_tangents_of_weights_flow_too(model: Velocity, fast: nn.Module) -> None:
    point, _ = inputs()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    moves = {n: p.flip(0) for n, p in weights.items()}

    def call(module: nn.Module) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda w: torch.func.functional_call(module, w, point), (weights,), (moves,))

    torch.testing.assert_close(call(fast), call(model))


def test_a_call_of_sdpa_that_has_tangents_as_a_mask_lifted_from_it() -> None:
    torch.manual_seed(0)
    model = Velocity(fused=True).double()
    point, direction = inputs()
    fast = attnc.optimize(model, point, verify=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = torch.func.jvp(model, point, direction)
    torch.testing.assert_close(torch.func.jvp(fast, point, direction), wanted)


def test_an_outer_compile_takes_tangents(model: Velocity, fast: nn.Module) -> None:
    loss(fast)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(fast), loss(model))
