"""The real checkpoint, its attention called as attend nodes by transformers' own extension point."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.export import Dim

import attnc.codegen.ops  # noqa: F401  (registers the operator)
from attnc.codegen.onnx.export import export_model
from attnc.ir import AttentionSpec, Fill, Operand, Scale
from attnc.masks import Padding

if TYPE_CHECKING:
    from transformers import BertModel

F32 = torch.float32
VALID = Operand("m", "bk", ("b", "s"), torch.bool)


def attention(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stand for an attention function of transformers; ``mask`` is the validity row ``[B, S]``."""
    shape = ("b", q.shape[1], "s", q.shape[3])
    operands = (
        Operand("q", "bhqd", shape, F32),
        Operand("k", "bhkd", shape, F32),
        Operand("v", "bhke", shape, F32),
    )
    fill = Fill(torch.finfo(F32).min, "add")
    spec = AttentionSpec(*operands, 1, (Scale(scaling),), Padding("m"), fill, captured=(VALID,))
    out, _lse = torch.ops.attnc.attend(q, k, v, [mask], str(spec))
    return out.transpose(1, 2), None


@pytest.fixture
def sites(minilm: BertModel) -> Iterator[BertModel]:
    """Give the checkpoint with attend nodes; the shared model's implementation is put back."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("attnc_test", attention)
    AttentionMaskInterface.register("attnc_test", lambda *_, attention_mask=None, **__: attention_mask)
    before = minilm.config._attn_implementation
    minilm.config._attn_implementation = "attnc_test"
    yield minilm
    minilm.config._attn_implementation = before


def test_minilm_has_six_fused_operators_and_no_layout_changes(sites: BertModel, tmp_path: Path) -> None:
    import onnx

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (4, 21), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[1, 13:], mask[2] = 0, 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    shapes = {n: {0: Dim.AUTO, 1: Dim.AUTO} for n in inputs}
    program = torch.export.export(sites, (), inputs, dynamic_shapes=shapes, strict=False)
    original = copy.deepcopy(sites)
    original.config._attn_implementation = "eager"

    path = tmp_path / "m.onnx"
    done = export_model(program, path, check_inputs=[((), inputs)], reference=original, tolerance=1e-4)
    found = Counter(n.op_type for n in onnx.load(str(path)).graph.node)
    assert [s.operator for s in done.sites] == ["Attention"] * 6, "the projections are inside"
    assert (found["Attention"], found["Softmax"], found["Transpose"]) == (6, 0, 0)
    assert [c.shape for c in done.checks] == [(4, 21), (3, 11), (4, 21)], "the last with other masks"
    assert all(c.ok for c in done.checks)
