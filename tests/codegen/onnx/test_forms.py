"""Forms over positions are exported as the masks they are, for any runtime and for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import attnc

FORMS = (
    attnc.SlidingWindow(3, 1),
    attnc.Chunked(4),
    attnc.Neighborhood((3, 4), (2, 3), (2, 1), causal=(True, False)),
    attnc.PowerAttention(2, 1, 1),
    attnc.S2(2, 1, 2),
    attnc.ViewTime(2, 3, 2),
)


class Causal(nn.Module):
    """Two layers of attention, spelled out, over 12 tokens of 16 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, ``[B, 12, 16]``."""
        hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
        for layer in self.layers:
            q, k, v = layer(x).view(x.shape[0], 12, 3, 4, 4).permute(2, 0, 3, 1, 4)
            w = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
            x = x + (w @ v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("target", ["standard", "ort-cpu"])
@pytest.mark.parametrize("form", FORMS, ids=lambda x: x.name)
def test_forms_over_positions_are_exported(form, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Causal().eval(), torch.randn(2, 12, 16)
    fast = attnc.optimize(model, (x,), forms=form, dynamic_shapes=None, cost_model=False)
    assert [s.status for s in fast.report.sites] == ["rewritten"] * 2
    attnc.export_onnx(fast, tmp_path / "model.onnx", target=target)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, fast(x), atol=1e-5, rtol=1e-5)
        assert (found - model(x)).abs().max() > 1e-3
