"""Below the table: equal layers are told once, a reason has a place and advice, masks say where they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnc
from attnc.codes.known import codes
from attnc.report.report import Report, SiteRecord
from attnc.report.text import blocks, names, notes, operands_text, validity


def site(module: str, status: str = "rewritten", **kw) -> SiteRecord:
    base = dict(spec="attn", mask="causal", form="", backend="", contract="SAME")
    return SiteRecord(module, module, "Attention model.py:10", **(base | kw), status=status)


def report(*sites: SiteRecord) -> Report:
    return Report("0", "M", "cpu", list(sites))


def layers(n: int, status: str, **kw) -> list[SiteRecord]:
    return [site(f"model.layers.{i}.attn", status, **kw) for i in range(n)]


def test_equal_reasons_make_one_block_and_others_their_own():
    kept = layers(12, "kept", code="two-masks", reason="two-masks: not joined", advice="Join them.",
                  blocking_op="aten.add.Tensor", blocking_source="model.py:7")  # fmt: skip
    odd = site("head", "missed", code="no-scores", reason="no-scores: no product", advice="Write one.")
    first, second = blocks(report(*kept, site("ok"), odd))
    assert first.lines() == [
        "kept two-masks: model.layers.*.attn (12 sites)",
        "  where  model.py:7 (aten.add.Tensor)",
        "  why    not joined",
        "  help   Join them.",
    ]
    assert second.head == "missed no-scores: head"
    assert dict(second.rows)["where"] == "Attention model.py:10"


def test_layers_stopped_by_different_lines_stay_apart():
    a = site("l.0", "kept", code="slower", reason="slower: 0.5x", blocking_source="m.py:1")
    b = site("l.1", "kept", code="slower", reason="slower: 0.5x", blocking_source="m.py:2")
    assert len(blocks(report(a, b))) == 2


def test_names_become_patterns_only_where_they_are_numbers():
    assert names([site("a.0.b"), site("a.11.b")]) == "a.*.b (2 sites)"
    assert names([site("conv2d.attn1")]) == "conv2d.attn1"
    assert names([site(f"x{c}.q") for c in "abcde"]) == "xa.q, xb.q, xc.q and 2 more (5 sites)"


def test_masks_say_for_which_sizes_they_hold():
    free, bound = site("l.0"), site("l.1", conditions=["k <= 512", "q == k"])
    assert validity(free) == "valid for all sizes"
    assert notes(report(free, bound, site("plain", mask="none"), site("m", "missed", reason="x"))) == [
        "mask: valid for all sizes: l.0",
        "mask: valid where k <= 512 and q == k: l.1",
    ]


SPEC = (
    "attn q=bhqd[2,4,{n},8]:float32 k=bhkd[2,4,{n},8]:float32 v=bhke[2,4,{n},8]:float32 group=1 mask={m} "
    "fill(replace,-inf) softmax"
)


def test_fixed_lengths_and_dense_parts_claim_no_more_than_is_known():
    assert validity(site("a", spec=SPEC.format(n="s77", m="causal"))) == "valid for all sizes"
    assert validity(site("a", spec=SPEC.format(n=64, m="causal"))) == (
        "valid at the captured lengths 64 x 64"
    )
    spec = SPEC.format(n="s77", m="dense(m)") + " with m=bhqk[2,1,s77,s77]:bool"
    assert validity(site("a", spec=spec, mask="dense")) == (
        "valid for all sizes; its dense parts are read as the model makes them"
    )


def test_operands_are_told_once_for_both_when_they_are_alike():
    assert operands_text(site("a", details={"operands": {"q": "rope(half)", "k": "rope(half)"}})) == (
        "q and k rope(half)"
    )
    text = operands_text(site("a", details={"operands": {"q": "rms-norm", "k": "rope(half)"}}))
    assert text == "q rms-norm; k rope(half)"
    assert operands_text(site("a", details={"operands": {"q": "l2-norm"}})) == "q l2-norm"


class Rolled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.roll(q @ k.transpose(-1, -2), 1, -1)
        return torch.softmax(scores, -1) @ v


class Returned(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights.mean(1)


@pytest.mark.parametrize(
    ("model", "code", "op"),
    [(Rolled, "score-step-unknown", "roll"), (Returned, "weights-in-use", "softmax")],
)
def test_a_site_left_alone_names_code_operation_line_and_advice(model, code, op):
    torch.manual_seed(0)
    found = attnc.inspect(model(), tuple(torch.randn(2, 3, 40, 8) for _ in range(3)))
    (record,) = found.sites
    assert (record.code, record.advice) == (code, codes()[code].advice)
    assert op in record.blocking_op
    assert record.reason.startswith(f"{code}: ")
    line = model.forward.__code__.co_firstlineno + 1
    assert record.blocking_source == f"test_report_text.py:{line}"
    (block,) = blocks(found)
    assert [label for label, _ in block.rows] == ["where", "why", "help"]


def test_frames_inside_torch_are_not_the_users_line():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    found = attnc.inspect(Block().train(), (torch.randn(2, 9, 16),))
    assert found.sites
    assert all("test_report_text.py:" in s.source for s in found.sites)


def test_a_node_without_a_trace_takes_the_nearest_one():
    from attnc.passes.analyze.source import blocking_source

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    bare = graph.call_function(torch.ops.aten.neg.default, (x,))
    traced = graph.call_function(torch.ops.aten.abs.default, (bare,))
    traced.meta["stack_trace"] = '  File "/home/me/net.py", line 12, in forward\n'
    assert blocking_source(traced) == "net.py:12"
    assert blocking_source(bare) == "near net.py:12"
    assert blocking_source(torch.fx.Graph().placeholder("y")) == ""
