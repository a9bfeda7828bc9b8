"""An open cache computes what a closed one does, and what cannot be opened is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnc
from attnc import past
from attnc.codegen.onnx.runtime import Session
from attnc.errors import CaptureError
from attnc.past import holds_cache, positions, with_past

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def model_of(name: str = "Llama", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | sizes, attn_implementation="eager")
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 97, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def filled(model: Any, length: int) -> Any:
    """Return the model's own cache after ``length`` tokens."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**{n: x[:, :length] for n, x in tokens(30).items()}, past_key_values=cache, use_cache=True)
    return cache


def test_the_model_is_not_changed_and_shares_its_tensors() -> None:
    model = model_of()
    opened, step = with_past(model)
    assert type(model).__name__ == type(opened).__name__
    assert isinstance(opened, type(model))
    assert not isinstance(model, type(opened))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {
        n: p.data_ptr() for n, p in opened.named_parameters()
    }
    assert list(step) == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    assert min(step["input_ids"].shape) >= 2


def test_steps_over_a_window_equal_one_call_over_all_tokens() -> None:
    """The open cache holds all positions; a window of 4 hides most of them."""
    model = model_of("Gemma2", sliding_window=4)
    opened, _ = with_past(model)
    given = tokens(30)
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits
        heads = [(torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8))] * 2
        first = opened(**{n: x[:, :20] for n, x in given.items()}, past_key_values=heads)
        rest = {n: x if n == "attention_mask" else x[:, 20:] for n, x in given.items()}
        second = opened(**rest, past_key_values=first["present"])
    torch.testing.assert_close(second["logits"], whole[:, 20:], rtol=1e-4, atol=1e-5)
    assert second["present"][0][0].shape[2] == 30


def test_a_cache_that_forgot_what_its_window_passed_is_filled_up() -> None:
    model = model_of("Gemma2", sliding_window=4)
    cache = filled(model, 20)
    assert cache.layers[0].keys.shape[2] == 3
    rest = {n: x if n == "attention_mask" else x[:, 20:] for n, x in tokens(30).items()}
    opened, step = with_past(model, (), rest | {"past_key_values": cache, "use_cache": True})
    assert step["past_key_values"][0][0].shape[2] == 20
    with torch.no_grad():
        found = opened(**step)["logits"]
        expected = model(**rest, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_among_the_inputs_is_opened_on_export(tmp_path: Path) -> None:
    model = model_of(num_hidden_layers=1)
    rest = {n: x if n == "attention_mask" else x[:, 20:] for n, x in tokens(25).items()}
    del rest["position_ids"]
    cache, path = filled(model, 20), tmp_path / "m.onnx"
    assert holds_cache((), {"past_key_values": cache})
    attnc.export_onnx(model, path, (), rest | {"past_key_values": cache, "use_cache": True})
    session = Session(path)
    assert session.inputs[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert session.outputs[:2] == ["logits", "present.0.key"]
    assert cache.get_seq_length() == 20, "the user's cache is not written to"


def test_what_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    step = {n: x if n == "attention_mask" else x[:, 20:] for n, x in tokens(25).items()}
    with pytest.raises(CaptureError, match="expected a decoder of transformers"):
        with_past(nn.Linear(2, 2))
    with pytest.raises(CaptureError, match="at least 2 positions, found none in layer 0"):
        with_past(model, (), step | {"past_key_values": transformers.DynamicCache(config=model.config)})
    one = {n: x if n == "attention_mask" else x[:, 24:] for n, x in tokens(25).items()}
    with pytest.raises(CaptureError, match="2 new tokens, found 24 and 1"):
        with_past(model, (), one | {"past_key_values": filled(model, 24)})
    static = transformers.StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(CaptureError, match="expected layers that grow token by token"):
        with_past(model, (), step | {"past_key_values": static})
    monkeypatch.setattr(past, "closed", lambda pairs: transformers.DynamicCache(pairs[1:] + pairs[:1]))
    with pytest.raises(CaptureError, match="to compute what one call over all tokens does"):
        with_past(model)
