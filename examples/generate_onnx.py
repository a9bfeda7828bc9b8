"""Export a decoder with its cache to ONNX and generate with it, next to PyTorch.

The model is a small Llama with random weights: grouped heads, rotary positions.  One file serves the prompt
(a past of length 0) and every later token.  Two prompts of different lengths form a batch, with padding on
the left.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import attnc

transformers_logging.set_verbosity_error()
TOKENS = 64
Arrays = dict[str, np.ndarray]


def small_llama() -> LlamaForCausalLM:
    """Return a Llama of two layers; weights are large enough that its text does not repeat one word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def empty_past(session: onnxruntime.InferenceSession, batch: int) -> Arrays:
    """Return a past of no positions for every input that wants one."""
    past = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            _, heads, _, size = value.shape
            past[value.name] = np.zeros((batch, heads, 0, size), np.float32)
    return past


def generate(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return ``TOKENS`` greedy tokens after ``ids [B, S]``; ``mask [B, S]`` is 0 at padding."""
    names = [o.name for o in session.get_outputs()]
    past, tokens, out = empty_past(session, len(ids)), ids, []
    for _ in range(TOKENS):
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -tokens.shape[1] :]
        feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        tokens = found.pop("logits")[:, -1:].argmax(-1)
        past = {name.replace("present", "past_key_values"): x for name, x in found.items()}
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        out.append(tokens)
    return np.concatenate(out, 1)


def main() -> None:
    """Export, generate twice, compare."""
    model = small_llama()
    ids = torch.randint(1, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.onnx"
        for site in attnc.export_onnx(model, path, cache=True):
            print(f"{site.id}: {site.operator}")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for value in session.get_inputs():
            print(f"  in  {value.name:26} {value.shape}")
        for value in session.get_outputs():
            print(f"  out {value.name:26} {value.shape}")
        found = generate(session, ids.numpy(), mask.numpy())
    expected = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
    )
    expected = expected[:, ids.shape[1] :].numpy()
    for row in found:
        print(" ".join(map(str, row[:16])), "...")
    if not np.array_equal(found, expected):
        raise SystemExit("ONNX Runtime and PyTorch generate different tokens")
    print(f"{found.size} greedy tokens, all equal to PyTorch's")


if __name__ == "__main__":
    main()
