"""Which sizes vary in a captured program: all that can, but not the height and width of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnc
from attnc.capture.whole import Captured, capture_export
from attnc.session import session


class Patches(nn.Module):
    """Attention between the patches of an image ``[B, 3, H, W]``, as a vision transformer begins."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v


class Masked(nn.Module):
    """Scores ``[B, 1, S, S]`` under an added mask, after a convolution along the one axis of time."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.mix(x)[:, None]
        return torch.softmax(x.transpose(2, 3) @ x + mask, -1) @ x.transpose(2, 3)


class Spectrogram(nn.Module):
    """Speech: features ``[B, T, F]`` convolved as if they were an image."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(1, 1, 3, stride=(1, 2), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x[:, None])[:, 0]
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def sizes(captured: Captured, name: str) -> list[str]:
    node = next(n for n in captured.graph.nodes if n.op == "placeholder" and n.name == name)
    texts = [str(n.node.expr) if isinstance(n, torch.SymInt) else str(n) for n in node.meta["val"].shape]
    return [text if text.isdigit() else "free" for text in texts]


def test_height_and_width_of_an_image_are_fixed_with_a_note():
    captured = capture_export(Patches(), (), {"image": torch.randn(2, 3, 16, 24)})
    assert sizes(captured, "image") == ["free", "3", "16", "24"]
    (note,) = captured.warnings
    assert "16 x 24 of input image are fixed, because conv2d slides over them" in note


def test_an_image_of_another_size_is_captured_anew():
    model = Patches().eval()
    fast = attnc.optimize(model, (torch.randn(2, 3, 16, 24),), cost_model=False)
    other = torch.randn(3, 3, 20, 12)
    with torch.no_grad():
        torch.testing.assert_close(fast(other), model(other))
    assert [o.rewritten for o in session(fast).outcomes] == [1, 1]


def test_a_mask_with_four_axes_keeps_its_sizes_free():
    captured = capture_export(Masked(), (torch.randn(2, 8, 11), torch.randn(2, 1, 11, 11)))
    assert sizes(captured, "mask") == ["free", "1", "free", "free"]
    assert captured.warnings == []


def test_features_of_speech_keep_their_length_free():
    captured = capture_export(Spectrogram(), (torch.randn(2, 13, 16),))
    assert sizes(captured, "x")[:2] == ["free", "free"]
    assert captured.warnings == []


def test_shapes_of_the_user_are_taken_as_they_are():
    shapes = {"image": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    captured = capture_export(Patches(), (), {"image": torch.randn(2, 3, 16, 24)}, dynamic_shapes=shapes)
    assert sizes(captured, "image") == ["2", "3", "free", "free"]
    assert captured.warnings == []
