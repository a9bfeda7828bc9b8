"""Sites in the bodies of higher-order calls are found, rewritten and verified, at both doors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnc
from attnc.api import session
from attnc.capture.bodies import higher_order_calls, may_attend
from attnc.capture.whole import capture_export

# Dynamo and export warn about their own internals; no test here is about those.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
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
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.3 + mask, -1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(16, 16)


class Frozen(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.attention(x)
        return self.out(y)


class Autocast(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.attention(x)
        return self.out(y.float())


class Nested(Body):
    """fp32 inside bf16.  (Export forgets a no_grad inside autocast: torch 2.13, without us.)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.out(x)
            with torch.autocast("cpu", enabled=False):
                z = self.attention(y.float())
            return self.out(y + z).float()


class Checkpointed(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(checkpoint(self.attention, x, use_reentrant=False))


class Branch(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda t: self.attention(t), lambda t: t * 1.0, (x,))
        return self.out(y)


KINDS: dict[str, type[Body]] = {
    "no_grad": Frozen,
    "autocast": Autocast,
    "nested": Nested,
    "checkpoint": Checkpointed,
    "cond": Branch,
}


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), grads


@pytest.mark.parametrize("door", ["ahead", "lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_site_in_a_body_is_rewritten_and_trains_as_before(kind: str, door: str) -> None:
    model, x = KINDS[kind](), torch.randn(2, 7, 16).abs()
    fast = attnc.optimize(model, (x,) if door == "ahead" else (), cost_model=False)
    for shape in ((2, 7, 16), (3, 9, 16)):
        x = torch.randn(shape).abs()
        want, want_grads = outputs_and_gradients(model, x)
        got, grads = outputs_and_gradients(fast, x)
        # Autocast: scores rounded to bf16 once more or less, half a unit of 2**-8 each, through one linear.
        loose = kind in ("autocast", "nested")
        torch.testing.assert_close(got, want, atol=3e-2 if loose else 1e-5, rtol=0)
        assert grads.keys() == want_grads.keys(), "the same weights train"
        for name, grad in want_grads.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(grads[name], grad, atol=scale * (5e-2 if loose else 1e-4), rtol=0)
    assert fast.report.sites
    for site in fast.report.sites:  # a condition's branch is captured again at other sizes
        assert (site.status, site.mask) == ("rewritten", "causal")
        assert site.error is not None
        assert site.tolerance is not None
        assert site.error <= site.tolerance


def test_a_written_out_body_is_gone_and_one_without_attention_stays() -> None:
    class Table(Frozen):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                table = x.cos() * 2
            with torch.autocast("cpu", torch.bfloat16):
                other = x.sin() * 2
            return super().forward(x) + table + other

    captured = capture_export(Table(), (torch.randn(2, 7, 16),))
    calls = [str(c.target) for c in higher_order_calls(captured.graph)]
    assert calls == ["wrap_with_autocast"]
    assert not may_attend(captured.graph) or any("softmax" in str(n.target) for n in captured.graph.nodes)
    assert captured.exported is not None
    captured.exported.validate()


def test_under_ambient_autocast_a_body_stays_as_it_is() -> None:
    model, x = Nested().eval(), torch.randn(2, 7, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast = attnc.optimize(model, (x,), cost_model=False)
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert {s.status for s in fast.report.sites} <= {"missed", "kept"}


def test_a_saved_model_with_a_written_out_body_loads(tmp_path: Any) -> None:
    for kind in (Frozen, Autocast):
        model, x = kind().eval(), torch.randn(2, 7, 16)
        fast = attnc.optimize(model, (x,), cost_model=False)
        attnc.save(fast, tmp_path / kind.__name__)
        with torch.no_grad():
            torch.testing.assert_close(attnc.load(tmp_path / kind.__name__)(x), fast(x))


def test_only_the_rewritten_branch_of_a_condition_is_new() -> None:
    model, x = Branch().eval(), torch.randn(2, 7, 16).abs()
    fast = attnc.optimize(model, (x,), cost_model=False)
    program = session(fast).outcomes[0].runtime
    assert program is not None
    names = {n: str(m.graph) for n, m in program.graph_module.named_children()}
    assert "scaled_dot_product_attention" in names["true_graph_0"]
    assert "softmax" not in names["true_graph_0"]
    for sign in (1, -1):
        torch.testing.assert_close(fast(sign * x), model(sign * x), atol=1e-5, rtol=0)


class Flex(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def causal(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
            return torch.where(i >= j, score, -float("inf"))

        return flex_attention(q, q, q, score_mod=causal)


@pytest.mark.parametrize("door", ["ahead", "lazy"])
def test_flex_attention_is_named_and_runs_as_it_was(door: str) -> None:
    q = torch.randn(2, 2, 7, 8)
    fast = attnc.optimize(Flex(), (q,) if door == "ahead" else (), cost_model=False)
    with torch.no_grad():
        torch.testing.assert_close(fast(q), Flex()(q))
    (site,) = fast.report.sites
    assert (site.status, site.reason.partition(":")[0]) == ("kept", "already-fused")


@pytest.mark.parametrize("door", ["ahead", "lazy"])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_is_recognised_with_weights_and_without(door: str, weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.attention(x, x, x, need_weights=weights)

    model, x = Model().eval(), torch.randn(2, 7, 16)
    with torch.no_grad():
        fast = attnc.optimize(model, (x,) if door == "ahead" else (), cost_model=False)
        for got, want in zip(fast(x), model(x), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    (site,) = fast.report.sites
    if weights:  # they are returned, so that they must still be computed, whatever becomes of the output
        assert site.status == "rewritten" or site.reason.startswith("weights-in-use")
    else:
        assert site.reason.startswith("already-fused")


@pytest.mark.parametrize("door", ["ahead", "lazy"])
def test_every_layer_of_a_transformer_encoder_is_a_site(door: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 7, 16)
    hide = torch.zeros(2, 7, dtype=torch.bool)
    hide[1, 5:] = True
    inputs = {"src_key_padding_mask": hide}
    with torch.no_grad():
        fast = attnc.optimize(model, *((x,), inputs) if door == "ahead" else (), cost_model=False)
        want = model(x, **inputs)
        got = fast(x, **inputs)
    keep = ~hide  # the fast path gives zeros at padded places, where the exported graph gives values
    torch.testing.assert_close(got[keep], want[keep], atol=1e-5, rtol=1e-4)
    assert len(fast.report.sites) == 2
    assert {s.status for s in fast.report.sites} <= {"rewritten", "kept"}
