from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.codegen.flex import can_run, lower, probe, runtime
from attnc.codegen.ops import execute
from attnc.editing import Builder
from attnc.ir import AttentionSpec, Bias, Fill, Operand, Scale, Softcap
from attnc.masks import CAUSAL, Mask, Padding, both

F32 = torch.float32


def make_spec(dtype=F32, d: int | str = 16, keep=torch.bool, rel=F32, **rest) -> AttentionSpec:
    q = Operand("q", "bhqd", ("b", 4, "s", d), dtype)
    k, v = (Operand(n, a, ("b", 2, "s", d), dtype) for n, a in (("k", "bhkd"), ("v", "bhke")))
    captured = (Operand("keep", "bk", ("b", "s"), keep), Operand("rel", "bhqk", (1, 4, "s", "s"), rel))
    rest = {"mask": both(CAUSAL, Padding("keep")), "scores": (Scale(0.25), Softcap(9.0), Bias("rel")), **rest}
    return AttentionSpec(q, k, v, 2, captured=captured, **rest)


class Odd(Mask):
    def __str__(self) -> str:
        return "odd"


REFUSED = {
    "flex-dropout": (make_spec(dropout=0.1), "cpu"),
    "flex-dtype": (make_spec(dtype=torch.float64), "cpu"),
    "flex-head-dim": (make_spec(d=8), "cuda"),
    "flex-mask-dtype": (make_spec(keep=torch.int64), "cpu"),
    "flex-score-dtype": (make_spec(rel=torch.int64), "cpu"),
    "flex-unknown-part": (make_spec(mask=Odd()), "cpu"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_flex_has_not_is_refused_before_any_compiler_is_asked(code, monkeypatch):
    monkeypatch.setattr(probe, "why_not", None)
    miss = can_run(*REFUSED[code])
    assert miss is not None
    assert miss.code == code


def test_head_dims_must_be_known():
    miss = can_run(make_spec(d="s9"), "cpu")
    assert miss is not None
    assert miss.why == "FlexAttention needs head dims that are known, found s9 and s9"


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_the_rest_depends_on_the_compiler(dtype, monkeypatch):
    monkeypatch.setattr(probe, "why_not", lambda device: "")
    for fill in (Fill(), Fill(-1e9), Fill(-1.0, "add")):
        assert can_run(make_spec(dtype, fill=fill), "cpu") is None
    assert can_run(make_spec(d=8), "cpu") is None
    monkeypatch.setattr(probe, "why_not", lambda device: f"no compiler for {device}")
    miss = can_run(make_spec(), "cpu")
    assert miss is not None
    assert (miss.code, miss.why) == ("flex-no-compiler", "no compiler for cpu")


def test_a_plan_becomes_one_node_that_runs(monkeypatch):
    monkeypatch.setattr(runtime, "run", lambda *args: None)
    spec = dataclasses.replace(make_spec(), fill=Fill(-1e9))
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    keep, rel = torch.arange(9).expand(2, 9) > 1, torch.randn(1, 4, 9, 9)

    def model(q, k, v, keep, rel):
        return (q * 1.0).flatten(2)

    gm = make_fx(model, tracing_mode="symbolic")(q, k, v, keep, rel)
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    out = next(n for n in gm.graph.nodes if n.op == "output")
    build = Builder(gm.graph).before(out, {"backend": "flex"})
    made = lower(spec, build, *nodes[:3], nodes[3:])
    out.args = (made,)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.attnc.flex_attend.default]
    assert made.meta["attnc"] == {"backend": "flex"}
    assert made.meta["val"].shape == nodes[0].meta["val"].shape
    torch.testing.assert_close(gm(q, k, v, keep, rel), execute(spec, q, k, v, [keep, rel])[0])
