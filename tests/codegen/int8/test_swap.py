"""Swapping layers: what changes, what must not, what is refused, and saving."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attnc.codegen.int8 import W8A8Linear, prepare_modules, quantize_modules
from attnc.errors import RewriteError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def sharing_clone(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


def test_swap_changes_the_clone_only() -> None:
    model = Block().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(3, 8)
    y = model(x)
    clone = sharing_clone(model)
    assert quantize_modules(clone, ["a", "b.0", "a"]) == ["a", "b.0"]
    assert type(model.a) is nn.Linear
    assert type(model.b[0]) is nn.Linear
    assert type(clone.a) is W8A8Linear
    assert type(clone.b[0]) is W8A8Linear
    assert clone.a.bias is model.a.bias
    assert clone.b[0].bias is None
    assert not clone.a.training
    assert torch.equal(model(x), y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(clone(x), y)
    assert torch.nn.functional.cosine_similarity(clone(x), y).min() > 0.99


def test_nothing_is_swapped_when_one_name_is_wrong() -> None:
    model = Block()
    with pytest.raises(RewriteError, match=r"'b\.7'.*a, b\.0.*no such module"):
        quantize_modules(model, ["a", "b.7"])
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize(
    ("name", "found"), [("b.1", "a LayerNorm"), ("b", "a Sequential"), ("", "the model itself")]
)
def test_other_modules_are_refused(name: str, found: str) -> None:
    with pytest.raises(RewriteError, match=found):
        quantize_modules(Block(), [name])


def test_subclasses_are_refused() -> None:
    with pytest.raises(RewriteError, match="NonDynamicallyQuantizableLinear"):
        quantize_modules(nn.MultiheadAttention(8, 2), ["out_proj"])


def test_tied_weights_are_refused() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(10, 4), "head": nn.Linear(4, 10), "free": nn.Linear(4, 4)})
    model["head"].weight = model["emb"].weight
    with pytest.raises(RewriteError, match=r"tied to emb\.weight"):
        quantize_modules(model, ["head"])
    assert quantize_modules(model, ["free"]) == ["free"]


def test_a_module_reached_by_two_names_is_refused() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(RewriteError, match=r"tied to 1\.weight"):
        quantize_modules(nn.Sequential(linear, linear), ["0"])


def test_hooks_are_refused() -> None:
    model = Block()
    model.a.register_forward_hook(lambda *_: None)
    with pytest.raises(RewriteError, match="hooks"):
        quantize_modules(model, ["a"])


def test_state_dict_goes_through_safetensors(tmp_path: Path) -> None:
    model = Block().eval()
    quantize_modules(model, ["a", "b.0"])
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    stored = load_file(file)
    assert stored["a.weight"].dtype == torch.int8
    assert stored["a.weight_scale"].dtype == torch.float32
    assert set(stored) == {
        "a.weight",
        "a.weight_scale",
        "a.bias",
        "b.0.weight",
        "b.0.weight_scale",
        "b.1.weight",
        "b.1.bias",
    }
    fresh = Block().eval()
    assert prepare_modules(fresh, ["a", "b.0"]) == ["a", "b.0"]
    fresh.load_state_dict(stored, strict=True)
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), model(x))


def test_prepare_works_without_data_and_loads_by_assignment() -> None:
    model = Block().eval()
    quantize_modules(model, ["a"])
    with torch.device("meta"):
        fresh = Block().eval()
    prepare_modules(fresh, ["a"])
    fresh.load_state_dict(model.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), model(x))


def test_scales_stay_float32_when_the_model_is_cast() -> None:
    layer = W8A8Linear.from_linear(nn.Linear(8, 4))
    scale = layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale)
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_repr_and_copies() -> None:
    layer = W8A8Linear.from_linear(nn.Linear(8, 4))
    assert repr(layer) == "W8A8Linear(in_features=8, out_features=4, bias=True)"
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 8)
    assert torch.equal(twin(x), layer(x))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
