"""Example inputs: from configs of several kinds, and again from recipes that hold no data."""

from __future__ import annotations

import json

import pytest
import torch

from attnc.errors import CheckpointError
from attnc.examples import Sizes, example_inputs, from_recipe, odd_length, recipe

transformers = pytest.importorskip("transformers")

TEXT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip
IMAGE = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
)


def models():
    t = transformers
    t5 = t.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=99, decoder_start_token_id=0
    )
    whisper = t.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99, num_mel_bins=8, max_source_positions=10,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    clip = t.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 98}, vision_config=IMAGE, projection_dim=8,
    )  # fmt: skip
    return {
        "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
        "t5": lambda: t.T5ForConditionalGeneration(t5),
        "vit": lambda: t.ViTModel(t.ViTConfig(**IMAGE)),
        "whisper": lambda: t.WhisperModel(whisper),
        "clip": lambda: t.CLIPModel(clip),
    }


@pytest.mark.parametrize("name", list(models()))
def test_models_run_on_their_examples(name):
    model = models()[name]().eval()
    kwargs = example_inputs(model)
    assert model.main_input_name in kwargs
    assert all(v.shape[0] == 2 for v in kwargs.values() if isinstance(v, torch.Tensor))
    with torch.no_grad():
        out = model(**kwargs)
    assert out[0].isfinite().all()
    assert getattr(out, "past_key_values", None) is None


def test_examples_repeat_and_follow_the_sizes_asked_for():
    model = models()["bert"]()
    one, two = example_inputs(model), example_inputs(model)
    assert all(torch.equal(one[k], two[k]) for k in one)
    kwargs = example_inputs(model, Sizes(batch=3, length=17))
    assert kwargs["input_ids"].shape == kwargs["attention_mask"].shape == (3, 17)
    assert kwargs["input_ids"].min() >= 1
    assert kwargs["attention_mask"].sum(1).tolist() == [17, 17, 9]


def test_length_is_no_size_of_the_config():
    config = transformers.BertConfig(**(TEXT | {"max_position_embeddings": 23, "intermediate_size": 58}))
    assert odd_length(config) == 31


def test_unknown_main_input_says_what_to_do():
    model = models()["bert"]()
    model.main_input_name = "molecules"
    with pytest.raises(CheckpointError, match=r"found 'molecules'; pass a file.py:callable"):
        example_inputs(model)


def test_recipe_rebuilds_shapes_and_kinds_but_not_data():
    secret = torch.full((2, 5), 41)
    secret[0, 0] = 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    value = {
        "ids": secret, "mask": mask, "x": torch.full((3,), 0.625), "flag": mask.bool(),
        "offsets": torch.tensor([0, 2, 7]),
        "deep": [(1, "a", None), {"y": torch.zeros(2, dtype=torch.bfloat16)}],
    }  # fmt: skip
    made = json.loads(json.dumps(recipe(value), sort_keys=True))
    assert "0.625" not in json.dumps(made)
    back = from_recipe(made)
    assert list(back) == list(value)
    assert back["ids"].shape == (2, 5)
    assert back["ids"].min() >= 3
    assert back["ids"].max() <= 41
    assert back["mask"].tolist() == back["flag"].int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert back["offsets"].tolist() == [0, 3, 7]
    assert back["x"].dtype == torch.float32
    assert back["deep"][0] == (1, "a", None)
    assert back["deep"][1]["y"].dtype == torch.bfloat16
    assert torch.equal(from_recipe(made)["x"], back["x"])


def test_recipe_refuses_what_it_cannot_describe():
    with pytest.raises(CheckpointError, match="expected inputs of tensors and plain values, found object"):
        recipe([object()])
    with pytest.raises(CheckpointError, match="expected a recipe"):
        from_recipe({"tensors": 1})
