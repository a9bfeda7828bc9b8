"""What is found in models of transformers, as text: one line per site, without names of nodes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.rewriting import Traced, exported

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "use_cache": False}
LEFT_PADDED = torch.tensor([[1] * 11, [0] * 5 + [1] * 6])


def bert() -> torch.nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def llama() -> torch.nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**GROUPED))


def mistral() -> torch.nn.Module:
    return transformers.MistralModel(transformers.MistralConfig(**GROUPED, sliding_window=4))


def gpt2() -> torch.nn.Module:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(**sizes, **tokens, attn_implementation="eager", use_cache=False)
    return transformers.GPT2Model(config)


def gemma2() -> torch.nn.Module:
    return transformers.Gemma2Model(transformers.Gemma2Config(**GROUPED, head_dim=6, sliding_window=4))


def gpt_oss() -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(
        **GROUPED, **experts, head_dim=6, sliding_window=4, rope_parameters=rope
    )
    return transformers.GptOssModel(config)


def t5() -> torch.nn.Module:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, attn_implementation="eager"))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "bert": (bert, True),
    "llama": (llama, True),
    "mistral": (mistral, False),
    "gpt2": (gpt2, False),
    "gemma2": (gemma2, False),
    "gpt_oss": (gpt_oss, False),
    "t5_encoder": (t5, True),
}


@cache
def prepare(name: str, dynamic: bool = False) -> tuple[torch.nn.Module, Traced, dict[str, torch.Tensor]]:
    make, padded = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"attention_mask": LEFT_PADDED} if padded else {})}
    return model, exported(model, (), dynamic, **inputs), inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_specs_of_a_model(name, golden):
    _, t, _ = prepare(name)
    found, missed = t.detect()
    lines = [f"{x.match.site.id} | {x.match.spec}" for x in found]
    lines += [f"{where} | missed {miss.code}: {miss.why}" for miss, where in missed]
    assert len(found) == 2
    assert not re.search(r"\b(args?_\d|softmax_\d|add_\d|mul_\d|view_\d)", "\n".join(lines))
    golden(f"spec/{name}.txt", "\n".join(lines))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_rewritten_model_computes_the_same(name):
    model, t, inputs = prepare(name)
    t.rewrite(t.detect()[0])
    with torch.no_grad():
        expected, found = model(**inputs).last_hidden_state, t.run(**inputs).last_hidden_state
    # Two layers of sums of 24 to 40 terms each, of values of size 4 after a normalization.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * 40 * 4 * torch.finfo(torch.float32).eps)
