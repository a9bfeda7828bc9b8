"""Kernels of real model families, through the public door: each file that is written passes its own test.

The models are tiny and random, but true to form in what decides the kernel: head sizes, groups, masks, caps,
sinks, biases.  MiniLM is the real checkpoint, through the command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import attnc
from attnc.codegen.triton.emit import spec_of
from attnc.errors import UnsupportedError
from tests.codegen.triton.owner import assert_passes

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "use_cache": False,
}
TOKENS = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))
LEFT_PADDED = {"input_ids": TOKENS, "attention_mask": (torch.arange(20) >= torch.tensor([[0], [6]])).long()}
PATCHES = {"pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))}


def llama(attn: str) -> torch.nn.Module:
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    config = transformers.LlamaConfig(**{**SMALL, **sizes}, attn_implementation=attn)
    return transformers.LlamaForCausalLM(config)


def gemma2(attn: str) -> torch.nn.Module:
    sizes = {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 8}
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, **sizes, attn_implementation=attn)
    )


def gpt_oss(attn: str) -> torch.nn.Module:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(
        **{**SMALL, **sizes}, **experts, rope_parameters=rope, attn_implementation=attn
    )
    return transformers.GptOssForCausalLM(config)


def t5(attn: str) -> torch.nn.Module:
    sizes = {"d_model": 64, "d_kv": 64, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 97}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, attn_implementation=attn))


def deepseek_v3(attn: str) -> torch.nn.Module:
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32}
    sizes = {"num_key_value_heads": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = transformers.DeepseekV3Config(
        **SMALL, **ranks, **sizes, first_k_dense_replace=2, attn_implementation=attn
    )
    return transformers.DeepseekV3ForCausalLM(config)


def swin(attn: str) -> torch.nn.Module:
    sizes = {"image_size": 56, "patch_size": 4, "embed_dim": 64, "depths": [2], "num_heads": [2]}
    return transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=7, attn_implementation=attn))


@dataclass(frozen=True)
class Family:
    """How to build a model, its inputs, and words that the specs of its kernels hold: one row per kernel."""

    build: Callable[[str], torch.nn.Module]
    inputs: Mapping[str, torch.Tensor]
    kernels: tuple[tuple[str, ...], ...]


FAMILIES = {
    "llama": Family(llama, LEFT_PADDED, (("sq,128]", "group=2", "(causal & padding(key,valid))"),)),
    "gemma2": Family(
        gemma2,
        LEFT_PADDED,
        (
            ("sq,256]", "group=2", "softcap(50.0)", "(window(left=7,right=0) & padding(key,valid))"),
            ("sq,256]", "group=2", "softcap(50.0)", "(causal & padding(key,valid))"),
        ),
    ),
    "gpt_oss": Family(
        gpt_oss,
        LEFT_PADDED,
        (
            ("sq,64]", "(window(left=7,right=0) & padding(key,valid))", "softmax(sink=sink)"),
            ("sq,64]", "(causal & padding(key,valid))", "softmax(sink=sink)"),
        ),
    ),
    "t5": Family(t5, LEFT_PADDED, (("sq,64]", "bias(bias"),)),
    "deepseek_v3": Family(
        deepseek_v3, LEFT_PADDED, (("sq,192]", "bhke[b,hkv,sk,128]", "(causal & padding(key,valid))"),)
    ),
    "swin": Family(
        swin,
        PATCHES,
        (("bias(bias:table)", "bhqk[1,h,sq,sk]"), ("bias(bias:table)", "bhqk[b,h,sq,sk]")),
    ),
}
slow = pytest.mark.slow
CASES = [
    pytest.param("llama", "eager"),
    pytest.param("llama", "sdpa", marks=slow),
    pytest.param("gemma2", "eager", marks=slow),
    pytest.param("gpt_oss", "eager", marks=slow),
    pytest.param("t5", "eager", marks=slow),
    pytest.param("t5", "sdpa", marks=slow),
    pytest.param("deepseek_v3", "eager", marks=slow),
    pytest.param("deepseek_v3", "sdpa", marks=slow),
    pytest.param("swin", "eager"),
    pytest.param("swin", "sdpa", marks=slow),
]


@pytest.mark.parametrize(("name", "attn"), CASES)
def test_every_site_of_a_family_has_a_kernel_that_passes_its_own_test(
    name: str, attn: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    fast = attnc.optimize(family.build(attn).eval(), (), family.inputs, cost_model=False)
    assert [s.status for s in fast.report.sites if s.status == "missed"] == []
    kernels = attnc.emit(fast, tmp_path / "kernels")
    specs = [str(spec_of(k.source)) for k in kernels]
    assert len(specs) == len(family.kernels), specs
    for spec, words in zip(specs, family.kernels, strict=True):
        assert [w for w in words if w not in spec] == [], spec
    files = sorted((tmp_path / "kernels").iterdir())
    assert [f.name for f in files] == [f"{k.name}.py" for k in kernels]
    for file in files:
        assert_passes(file)


def test_where_head_sizes_are_free_the_kernel_is_for_those_of_the_example(tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT * 0.25).softmax(-1) @ v

    args = tuple(torch.randn(2, 3, 5, size) for size in (8, 8, 12))
    fast = attnc.optimize(Attention(), args, cost_model=False)
    site = json.loads(fast.report.to_json())["sites"][0]
    assert ",8]" not in site["spec"]
    (kernel,) = attnc.emit(fast, tmp_path / "kernels")
    spec = spec_of(kernel.source)
    assert (spec.q.shape[3], spec.k.shape[3], spec.v.shape[3]) == (8, 8, 12)


def test_a_model_without_a_kernel_says_which_sites_were_missed(tmp_path: Path) -> None:
    class Talking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = torch.einsum("gh,bhij->bgij", torch.eye(2) + 0.1, x @ x.mT)
            return mixed.softmax(-1) @ x

    fast = attnc.optimize(Talking(), (torch.randn(2, 2, 5, 8),), cost_model=False)
    with pytest.raises(UnsupportedError, match="found none: model: talking-heads: einsum mixes"):
        attnc.emit(fast, tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()


def emit_by_command(model: Path, out: Path, *options: str) -> list[Path]:
    """Run ``attnc emit`` in a process of its own; return the files it wrote."""
    command = [sys.executable, "-m", "attnc", "emit", str(model), "-o", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return sorted(out.iterdir())


def test_the_command_emits_minilm(minilm_dir: Path, tmp_path: Path) -> None:
    files = emit_by_command(minilm_dir, tmp_path / "kernels", "--attn", "eager")
    assert [f.name for f in files] == ["site_0.py"]  # six layers, one computation
    assert "group=1 scale(0.1767766952966369) mask=padding(key,valid)" in files[0].read_text()
    assert_passes(files[0])


@pytest.mark.slow
def test_the_command_emits_a_saved_model_that_calls_sdpa(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deepseek_v3("sdpa").save_pretrained(tmp_path / "model")
    files = emit_by_command(tmp_path / "model", tmp_path / "kernels")
    assert [f.name for f in files] == ["site_0.py"]
    assert_passes(files[0])
