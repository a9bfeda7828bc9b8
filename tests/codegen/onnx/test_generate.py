"""Decoders of four shapes generate in ONNX Runtime, from one file with a cache, what PyTorch generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import attnc
from attnc.codegen.onnx.runtime import Session
from attnc.past import positions

transformers = pytest.importorskip("transformers")

TOKENS, VOCABULARY, WINDOW = 64, 97, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "gemma2": ("Gemma2", {**SIZES, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0}),
    "gpt_oss": (
        "GptOss",
        {**SIZES, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": ("GPT2", GPT2),
}
SLOW = pytest.mark.slow
MODELS = [
    pytest.param(("llama", "sdpa"), id="llama-sdpa"),
    pytest.param(("llama", "eager"), id="llama-eager", marks=SLOW),
    pytest.param(("gemma2", "eager"), id="gemma2-eager"),
    pytest.param(("gpt_oss", "eager"), id="gpt_oss-eager"),
    pytest.param(("gpt2", "sdpa"), id="gpt2-sdpa", marks=SLOW),
    pytest.param(("gpt2", "eager"), id="gpt2-eager"),
]


def model_of(shape: str, attention: str) -> Any:
    name, sizes = SHAPES[shape]
    loud = {"initializer_range": 0.2, "tie_word_embeddings": False}  # or a text repeats one token
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{name}Config")(**sizes, **loud, **none, attn_implementation=attention)
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    assert model.config._attn_implementation == attention
    return model


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, list[Any]]:
    model = model_of(*request.param)
    path = tmp_path_factory.mktemp("generate") / "m.onnx"
    return model, path, attnc.export_onnx(model, path, cache=True)


def prompt(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of two texts; the first is padded on the left by a third."""
    g = torch.Generator().manual_seed(length)
    ids, mask = (
        torch.randint(1, VOCABULARY, (2, length), generator=g),
        torch.ones(2, length, dtype=torch.long),
    )
    mask[0, : length // 3] = 0
    return ids, mask


def empty(session: Session, path: Path, batch: int) -> dict[str, torch.Tensor]:
    """Return a past of no positions for every input that asks for one."""
    out = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        if value.name.startswith("past_key_values"):
            _, heads, _, size = (d.dim_value for d in value.type.tensor_type.shape.dim)
            out[value.name] = torch.zeros(batch, heads, 0, size)
    return out


def step(
    session: Session, ids: torch.Tensor, mask: torch.Tensor, past: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run the tokens ``ids`` after ``past``; ``mask`` covers both. Return the logits and the new past."""
    places = positions(mask)[:, -ids.shape[1] :]
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **past}
    found = dict(zip(session.outputs, session(feeds), strict=True))
    logits = found.pop("logits")
    return logits, {n.replace("present", "past_key_values"): x for n, x in found.items()}


def grown(mask: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask, torch.ones(mask.shape[0], 1, dtype=torch.long)], 1)


@pytest.mark.parametrize("length", [2, 11, 38])
def test_64_greedy_tokens_are_those_of_generate(exported: tuple[Any, Path, list[Any]], length: int) -> None:
    """PyTorch's own generate has its own cache, which forgets what a window has passed."""
    model, path, _ = exported
    ids, mask = prompt(length)
    expected = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
    )[:, length:]
    session = Session(path)
    tokens, past, found = ids, empty(session, path, 2), []
    for _ in range(TOKENS):
        logits, past = step(session, tokens, mask, past)
        tokens = logits[:, -1:].argmax(-1)
        mask = grown(mask)
        found.append(tokens)
    assert torch.equal(torch.cat(found, 1), expected)
    assert len(expected.unique()) > 8, "a text that repeats itself shows little"


def test_prompt_in_pieces_gives_the_logits_of_the_prompt(exported: tuple[Any, Path, list[Any]]) -> None:
    """Several new tokens after a past, batch 2 with padding: what a cached operator may not do."""
    model, path, _ = exported
    ids, mask = prompt(38)
    with torch.no_grad():
        whole = model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits
    session, past, out = Session(path), empty(Session(path), path, 2), []
    for start, end in ((0, 20), (20, 21), (21, 38)):
        logits, past = step(session, ids[:, start:end], mask[:, :end], past)
        out.append(logits)
    found = torch.cat(out, 1)
    torch.testing.assert_close(found[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


def test_sites_are_fused_and_every_layer_is_one(exported: tuple[Any, Path, list[Any]]) -> None:
    model, _, became = exported
    layers = model.config.num_hidden_layers
    assert [s.is_fused for s in became] == [True] * layers, [s.reason for s in became]
    assert all("layers." in s.id or "h." in s.id for s in became), "sites keep the model's own module paths"


def test_names_and_sizes_are_those_of_files_with_a_past(exported: tuple[Any, Path, list[Any]]) -> None:
    model, path, _ = exported
    graph = onnx.load(str(path)).graph
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)

    def shape(v: onnx.ValueInfoProto) -> list[str | int]:
        return [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]

    past = ["batch", heads, "past_sequence", 8]
    whole = "past_sequence + sequence"
    inputs = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", whole],
        "position_ids": ["batch", "sequence"],
    }
    layers = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert {v.name: shape(v) for v in graph.input} == inputs | {
        f"past_key_values.{layer}": past for layer in layers
    }
    assert {v.name: shape(v) for v in graph.output} == {"logits": ["batch", "sequence", VOCABULARY]} | {
        f"present.{layer}": ["batch", heads, whole, 8] for layer in layers
    }


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_is_as_near_to_single_as_pytorch_is(shape: str, tmp_path: Path) -> None:
    exact = model_of(shape, "eager")
    model, path = model_of(shape, "eager").half(), tmp_path / "m.onnx"
    attnc.export_onnx(model, path, cache=True)
    exact.load_state_dict({n: x.float() for n, x in model.state_dict().items()})
    ids, mask = prompt(21)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    with torch.no_grad():
        expected, own = exact(**given).logits, model(**given).logits
    session, past, out = Session(path), empty(Session(path), path, 2), []
    past = {n: x.half() for n, x in past.items()}
    for start, end in ((0, 15), (15, 16), (16, 21)):
        logits, past = step(session, ids[:, start:end], mask[:, :end], past)
        out.append(logits)
    seen = mask.bool()
    error = (torch.cat(out, 1).float() - expected)[seen].abs().max()
    assert error <= 4 * (own.float() - expected)[seen].abs().max(), "four times PyTorch's own error"


@pytest.mark.slow
def test_command_line_exports_a_folder_with_its_past(tmp_path: Path) -> None:
    from attnc import cli

    model_of("gpt2", "sdpa").save_pretrained(tmp_path / "model")
    path = tmp_path / "m.onnx"
    assert cli.main(["export", str(tmp_path / "model"), "-o", str(path), "--with-past"]) == 0
    session = Session(path)
    assert session.inputs[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    logits, past = step(session, *prompt(9), empty(session, path, 2))
    assert logits.shape == (2, 9, VOCABULARY)
    assert past["past_key_values.1.value"].shape == (2, 4, 9, 8)
