"""Rotary embeddings and norms of tiny transformers models, built from their configs with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc.capture.whole import capture_export
from attnc.passes.analyze.operands import Namer
from attnc.passes.detect import detect

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=128,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", SMALL | GROUPED, "rope(half)"),
    "gpt_neox": (
        "GPTNeoX",
        SMALL | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
        "rope(half, 4 of 8)",
    ),
    "glm": (
        "Glm",
        SMALL | GROUPED | dict(head_dim=8, pad_token_id=0, eos_token_id=1),
        "rope(interleaved, 4 of 8)",
    ),
    "cohere": ("Cohere", SMALL | GROUPED | dict(use_qk_norm=True), "layer-norm, rope(interleaved)"),
    "qwen3": ("Qwen3", SMALL | GROUPED | dict(head_dim=8), "rms-norm, rope(half)"),
    "olmo2": ("Olmo2", SMALL | GROUPED, "rms-norm over all heads, rope(half)"),
    "gptj": (
        "GPTJ",
        dict(n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=4, vocab_size=64),
        "rope(interleaved, 4 of 8)",
    ),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=64), ""),
}


def build(name: str, options: dict[str, Any]) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


def names(model: torch.nn.Module, dynamic: bool, **inputs: torch.Tensor) -> list[dict[str, str]]:
    shapes = "auto" if dynamic else None
    with torch.no_grad():
        captured = capture_export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes)
    found, missed = detect(captured.work, captured.tensors, captured.links)
    assert found, missed
    namer = Namer(captured.work, captured.tensors)
    return [namer.names(f) for f in found]


@pytest.mark.parametrize("name", MODELS)
def test_model_is_named(name):
    kind, options, text = MODELS[name]
    ids = torch.arange(18).reshape(2, 9)
    expected = {"q": text, "k": text} if text else {}
    assert names(build(kind, options), False, input_ids=ids) == [expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model_is_named_with_free_sizes(name):
    kind, options, text = MODELS[name]
    expected = {"q": text, "k": text} if text else {}
    assert names(build(kind, options), True, input_ids=torch.arange(18).reshape(2, 9)) == [expected]


def qwen2_vl() -> torch.nn.Module:
    text = SMALL | GROUPED | dict(hidden_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    config = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig(
        **text, rope_parameters=rope, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(config).eval()


def test_sections_are_seen_where_the_three_axes_differ_and_not_where_they_are_one():
    ids = torch.arange(18).reshape(2, 9)
    places = torch.arange(54).reshape(3, 2, 9)
    text = "m-rope(half, sections 2+3+3)"
    assert names(qwen2_vl(), False, input_ids=ids, position_ids=places) == [{"q": text, "k": text}]
    assert names(qwen2_vl(), False, input_ids=ids) == [{"q": "rope(half)", "k": "rope(half)"}]
