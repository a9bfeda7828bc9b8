"""What cannot be captured whole goes through Dynamo, then by submodules; the report says what was covered."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import attnc

# Dynamo and export warn about their own internals; no test here is about those.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return (torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Looks at values between attention and output, which no single graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(x)
        if y.sum().item() > 1e9:
            y = y * 2
        return self.out(y) + x


class Stack(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Hidden(nn.Module):
    """Keeps Dynamo out of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(16, 16), Stack()

    @torch.compiler.disable
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(self.first(x))


class RoundFunction(torch.autograd.Function):
    """Rounds, and passes gradients through as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(RoundFunction.apply(self.attention(x) * 10))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(model: nn.Module, fast: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Outputs and gradients of an original and its result, at several sizes, within fp32's rounding."""
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-4)
        want, got = gradients(model, x), gradients(fast, x)
        assert want.keys() == got.keys()
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, atol=1e-3, rtol=1e-3, msg=name)


def ways(fast: nn.Module) -> set[tuple[str, str]]:
    return {(c["module"], c["how"]) for c in json.loads(fast.report.to_json())["coverage"]}


def test_a_model_that_is_captured_whole_says_so() -> None:
    fast = attnc.optimize(Attention().eval(), (torch.randn(2, 5, 16),), cost_model=False)
    assert ways(fast) == {("", "whole")}
    assert "coverage" not in str(fast.report)


def test_sites_that_dynamo_finds_are_in_the_report_under_their_own_names() -> None:
    model = Stack(3).eval()
    fast = attnc.optimize(model, (torch.randn(2, 5, 16),), cost_model=False)
    # One compiled frame serves all layers: each is a site all the same.
    names = [f"layers.{i}.attention" for i in range(3)]
    assert sorted((s.id, s.status) for s in fast.report.sites) == [(n, "rewritten") for n in names]
    assert ways(fast) == {("", "dynamo")}
    assert "coverage: by Dynamo: the model" in str(fast.report)
    assert_same(model, fast, (2, 5, 16), (3, 7, 16))


def test_more_layers_than_dynamo_recompiles_are_all_served() -> None:
    class Numbered(Layer):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.number  # a constant that each compiled frame is guarded by

    class Deep(Stack):
        def __init__(self) -> None:
            super().__init__(0)
            self.layers = nn.ModuleList(Numbered(i) for i in range(12))

    assert torch._dynamo.config.recompile_limit < 12, "this test needs more layers than the limit"
    fast = attnc.optimize(Deep().eval(), (torch.randn(2, 5, 16),), cost_model=False, verify=False)
    assert {s.id for s in fast.report.sites} == {f"layers.{i}.attention" for i in range(12)}


def test_what_dynamo_may_not_enter_is_captured_by_the_largest_submodules() -> None:
    model = Hidden().eval()
    fast = attnc.optimize(model, (torch.randn(2, 5, 16),), cost_model=False)
    names = [f"encoder.layers.{i}.attention" for i in range(2)]
    assert [(s.id, s.status) for s in fast.report.sites] == [(n, "rewritten") for n in names]
    assert ways(fast) == {("", "dynamo"), *((n, "piece") for n in names)}
    assert_same(model, fast, (2, 5, 16), (3, 7, 16))
    assert all("forward" not in vars(m) for m in model.modules()), "the model itself is never changed"
    twin = copy.deepcopy(fast)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(twin(x), model(x), atol=2e-5, rtol=1e-4)
    twin.encoder.layers[0].attention.qkv.weight.data.zero_()
    torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-4)


def test_where_dynamo_raises_submodules_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> Any:
        def call(*inputs: Any, **named: Any) -> Any:
            raise torch._dynamo.exc.InternalTorchDynamoError("out of order")

        return call

    monkeypatch.setattr("attnc.result_lazy.compiled", refuses)
    model = Stack().eval()
    fast = attnc.optimize(model, (torch.randn(2, 5, 16),), cost_model=False)
    assert ways(fast) == {(f"layers.{i}.attention", "piece") for i in range(2)}
    assert {s.status for s in fast.report.sites} == {"rewritten"}
    assert any("Dynamo failed" in w and "out of order" in w for w in fast.report.warnings)
    assert_same(model, fast, (2, 5, 16), (3, 7, 16))


def test_what_cannot_be_captured_at_all_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peeks(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = Attention(), Peeks()

        @torch.compiler.disable
        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.bad(self.good(x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x)

    model = Model().eval()
    fast = attnc.optimize(model, (torch.randn(2, 5, 16),), cost_model=False)
    assert ways(fast) == {("good", "piece"), ("bad", "none")}
    assert "not: bad (GuardOnDataDependentSymNode" in str(fast.report)
    assert_same(model, fast, (2, 5, 16))


def test_a_backward_of_the_models_own_is_kept() -> None:
    model = StraightThrough().eval()
    fast = attnc.optimize(model, (torch.randn(2, 5, 16),), cost_model=False)
    assert_same(model, fast, (2, 5, 16))
    with torch.no_grad():
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-4)
    assert {s.status for s in fast.report.sites} == {"rewritten"}
    assert any("RoundFunction" in w for w in fast.report.warnings)
    lazy = attnc.optimize(model, cost_model=False)
    assert_same(model, lazy, (2, 5, 16))


def test_forms_are_checked_against_all_pieces_together() -> None:
    forms = {"layers.1.*": "sliding_window(window=2)", "*": "fused"}
    fast = attnc.optimize(Stack().eval(), (torch.randn(2, 5, 16),), forms=forms, cost_model=False)
    assert fast.report.sites
    with pytest.raises(attnc.RewriteError, match=r"layers\.0\.attention"):
        attnc.optimize(Stack().eval(), (torch.randn(2, 5, 16),), forms={"layers.7.*": "fused"})


@pytest.mark.parametrize("stage", ["detect", "_plan", "lower", "checks.check_sites", "Rewriter.apply"])
@pytest.mark.parametrize("door", ["ahead", "lazy"])
def test_a_stage_that_raises_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, stage: str, door: str
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(f"attnc.pipeline.{stage}", broken)
    model, x = Attention().eval(), torch.randn(2, 5, 16)
    fast = attnc.optimize(model, (x,) if door == "ahead" else (), cost_model=False)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert fast.report.counts()["rewritten"] == 0
    assert any("internal-error: ZeroDivisionError: a mistake of ours" in w for w in fast.report.warnings)


def test_one_site_on_which_a_stage_raises_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnc import pipeline

    real = pipeline.Rewriter.apply

    def apply(self: Any, found: Any, *rest: Any) -> str:
        if found.match.site.id == "0":
            raise ZeroDivisionError("a mistake of ours")
        return real(self, found, *rest)

    monkeypatch.setattr(pipeline.Rewriter, "apply", apply)
    model, x = nn.Sequential(Attention(), Attention()).eval(), torch.randn(2, 5, 16)
    fast = attnc.optimize(model, (x,), cost_model=False)
    assert [(s.id, s.status) for s in fast.report.sites] == [("0", "kept"), ("1", "rewritten")]
    assert "internal-error" in fast.report.sites[0].reason
    torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-4)
