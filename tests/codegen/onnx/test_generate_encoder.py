"""Encoder-decoders generate in ONNX Runtime, from one decoder file with caches, what PyTorch generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import attnc
from attnc.codegen.onnx.runtime import Session

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
TOKENS, VOCABULARY = 40, 97
LOUD = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
}
SHAPES: dict[str, dict[str, Any]] = {
    "T5": {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0},
    "Bart": {**LAYERS, "max_position_embeddings": 128, "forced_eos_token_id": None},
    "Whisper": {**LAYERS, "max_source_positions": 30, "max_target_positions": 128, "num_mel_bins": 16},
}


@pytest.fixture(scope="module", params=SHAPES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, list[Any]]:
    name = request.param
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPES[name], **LOUD)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    path = tmp_path_factory.mktemp(name) / "decoder.onnx"
    return model, path, attnc.export_onnx(model, path, cache=True)


def source(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return encoder states and their mask; the second source is shorter."""
    g = torch.Generator().manual_seed(4)
    if hasattr(model.config, "num_mel_bins"):
        given, mask = torch.randn(2, 16, 60, generator=g), torch.ones(2, 30, dtype=torch.long)
        inputs = {"input_features": given}
    else:
        given, mask = torch.randint(1, VOCABULARY, (2, 17), generator=g), torch.ones(2, 17, dtype=torch.long)
        mask[1, 11:] = 0
        inputs = {"input_ids": given, "attention_mask": mask}
    with torch.no_grad():
        return model.get_encoder()(**inputs).last_hidden_state, mask


def greedy(model: Any, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[B, TOKENS, V]`` of PyTorch, with the model's own caches."""
    tokens, past, out = torch.ones(2, 1, dtype=torch.long), None, []
    seen = {} if hasattr(model.config, "num_mel_bins") else {"attention_mask": mask}
    for _ in range(TOKENS):
        with torch.no_grad():
            found = model(
                decoder_input_ids=tokens,
                encoder_outputs=(states,),
                past_key_values=past,
                use_cache=True,
                **seen,
            )
        past, tokens = found.past_key_values, found.logits[:, -1:].argmax(-1)
        out.append(found.logits[:, -1:])
    return torch.cat(out, 1)


def test_greedy_tokens_are_those_of_the_model(exported: tuple[Any, Path, list[Any]]) -> None:
    """In later steps no encoder states are given: all of them are in the past."""
    model, path, became = exported
    states, mask = source(model)
    session = Session(path)
    past = {}
    for value in onnx.load(str(path)).graph.input:
        if value.name.startswith("past_key_values"):
            _, heads, _, size = (d.dim_value for d in value.type.tensor_type.shape.dim)
            past[value.name] = torch.zeros(2, heads, 0, size)
    tokens, given, found = torch.ones(2, 1, dtype=torch.long), states, []
    for _ in range(TOKENS):
        feeds = {"decoder_input_ids": tokens, "encoder_hidden_states": given, "encoder_attention_mask": mask}
        made = dict(zip(session.outputs, session(feeds | past), strict=True))
        logits = made.pop("logits")
        tokens, given = logits[:, -1:].argmax(-1), states[:, :0]
        past = {n.replace("present", "past_key_values"): x for n, x in made.items()}
        found.append(logits)
    expected, logits = greedy(model, states, mask), torch.cat(found, 1)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert past["past_key_values.0.encoder.key"].shape[2] == states.shape[1]
    assert past["past_key_values.0.decoder.key"].shape[2] == TOKENS
    assert [s.operator for s in became] == ["MultiHeadAttention"] * 4


def test_command_line_exports_an_encoder_decoder_with_its_past(tmp_path: Path) -> None:
    from attnc import cli

    torch.manual_seed(0)
    config = transformers.BartConfig(**SHAPES["Bart"], **LOUD)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    path = tmp_path / "m.onnx"
    assert cli.main(["export", str(tmp_path / "model"), "-o", str(path), "--with-past"]) == 0
    session = Session(path)
    given = {"decoder_input_ids", "encoder_hidden_states", "past_key_values.0.encoder.key"}
    assert given <= set(session.inputs)
    assert "present.1.decoder.value" in session.outputs
