"""Calls of torch's own fused attention become attend nodes that mean the same, where they say it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import attnc
import attnc.codegen.ops
from attnc.codegen.onnx.native import attend_natively
from attnc.codegen.onnx.translate import find_calls
from attnc.printer import parse


class Native(nn.Module):
    """One call of SDPA with ``options``, read through a view that wants torch's own layout."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return out.transpose(1, 2).flatten(2)


def program_of(model: nn.Module, mask: torch.Tensor | None = None, shared: int = 4) -> ExportedProgram:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 4, 8, generator=g)
    k, v = torch.randn(2, 2, 9, shared, 8, generator=g)
    shapes = {n: {0: Dim.AUTO, 1: Dim.AUTO} for n in "qkv"} | {"mask": None}
    args = (q, k, v) if mask is None else (q, k, v, mask)
    fixed = None if mask is not None else {n: shapes[n] for n in "qkv"}
    return torch.export.export(model.eval(), args, dynamic_shapes=fixed, strict=False)


HIDDEN = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(1)) > 0.4
HIDDEN[0, 0, 0] = False
CASES: dict[str, tuple[dict[str, Any], torch.Tensor | None, str]] = {
    "plain": ({}, None, "mask=none softmax(safe)"),
    "scale": ({"scale": 0.5}, None, "scale(0.5) mask=none"),
    "causal": ({"is_causal": True}, None, "mask=causal fill(replace,-inf) softmax(safe)"),
    "bool": ({}, HIDDEN, "mask=dense(c0) fill(replace,-inf) softmax(safe)"),
    "bool-2d": ({}, HIDDEN[1, 0], "mask=dense(c0)"),
    "bias": ({}, torch.where(HIDDEN, 0.3, -torch.inf), "bias(c0) mask=none softmax(safe)"),
    "grouped": ({"enable_gqa": True}, None, "group=2"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_spec_computes_what_the_call_does(name: str) -> None:
    options, mask, text = CASES[name]
    program = program_of(Native(**options), mask, 2 if name == "grouped" else 4)
    natively = attend_natively(program)
    assert [str(n.target) for n in natively.graph.nodes if "scaled_dot" in str(n.target)] == []
    (call,) = find_calls(natively)
    assert text in str(parse(call.text))
    args, kwargs = program.example_inputs or ((), {})
    expected = program.module()(*args, **kwargs)
    torch.testing.assert_close(natively.module()(*args, **kwargs), expected, rtol=1e-5, atol=1e-6)
    assert any("scaled_dot" in str(n.target) for n in program.graph.nodes), "the program given stays"


def test_what_the_call_does_not_say_stays_a_call() -> None:
    class Broad(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)  # one batch of keys for all queries

    class Flat(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 0])

    q, k = torch.randn(2, 4, 5, 8), torch.randn(1, 4, 6, 8)
    for model, keys in ((Broad(), k), (Flat(), k.expand(2, -1, -1, -1))):
        program = torch.export.export(model, (q, keys), strict=False)
        assert find_calls(attend_natively(program)) == []


class Encoder(nn.Module):
    """Attention without a mask, as image encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(32, 96), Native()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attend(*(p.unflatten(-1, (4, 8)) for p in self.qkv(x).chunk(3, -1)))
        return out


def test_a_site_that_optimize_leaves_to_torch_is_an_operator_in_the_file(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    fast = attnc.optimize(Encoder().eval(), (x,), cost_model=False)
    assert [s.status for s in fast.report.sites] == ["kept"]
    became = attnc.export_onnx(fast, tmp_path / "m.onnx")
    assert [(s.id, s.operator) for s in became] == [("attend", "MultiHeadAttention")]
