"""How long rewriting takes after capture, per graph node, and how it grows with depth.

    python benchmarks/rewrite_time.py [--quick] [--json FILE]

Two families with 6 to 96 layers (small widths: the graph is what counts): BERT with a padding mask, and Llama
with grouped keys and values under a causal mask.  Rewriting is every stage between capture and verification,
on the functional copy that capture made; what torch takes to make that copy is printed beside it.  Each run
starts with a graph that no pass has seen and an empty memo of the algebra, as a user's run does.  Times are
processor time, and the least of several runs counts, so that other processes matter little.  Prints
milliseconds per node, and how time grows with nodes: the slope of log(time) over log(nodes), fitted to all
depths, and over the last doubling alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import about

from attnc import parse_forms, polynomial
from attnc.capture.types import Captured
from attnc.capture.whole import capture_export
from attnc.pipeline import Options, run

LIMIT_MS, LIMIT_EXPONENT = 0.5, 1.15
DEPTHS = (6, 12, 24, 48, 96)
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 101}


def bert(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return an encoder of this depth, and token ids and a ragged padding mask ``[2, 11]``."""
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=layers, max_position_embeddings=64, attn_implementation="eager"
    )
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    return transformers.BertModel(config).eval(), {"input_ids": _ids(), "attention_mask": mask}


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a decoder of this depth with two query heads per key head, and token ids ``[2, 11]``."""
    config = transformers.LlamaConfig(
        **SIZES,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return transformers.LlamaModel(config).eval(), {"input_ids": _ids(), "use_cache": False}


FAMILIES: dict[str, Callable[[int], tuple[torch.nn.Module, dict[str, Any]]]] = {"BERT": bert, "Llama": llama}


def _ids() -> torch.Tensor:
    return torch.randint(1, 100, (2, 11), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Point:
    """One depth of one family; times in milliseconds of the processor, those of torch by the clock."""

    layers: int
    nodes: int
    total: float
    by_stage: dict[str, float]
    functional_copy: float

    @property
    def per_node(self) -> float:
        """Milliseconds per node of the functional copy."""
        return self.total / self.nodes


def measure(family: str, layers: int, repeats: int) -> Point:
    """Capture one model and rewrite it several times."""
    model, kwargs = FAMILIES[family](layers)
    with torch.no_grad():
        captured = capture_export(model, (), kwargs)
    runs = [_rewrite(captured, layers) for _ in range(repeats)]
    best = min(runs, key=lambda r: sum(r.values()))
    copy = captured.seconds["functionalize"] * 1e3
    return Point(layers, len(captured.work.nodes), sum(best.values()), best, copy)


def _rewrite(captured: Captured, layers: int) -> dict[str, float]:
    """Return the processor time of each stage in milliseconds."""
    for known in vars(polynomial).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()
    starts: list[tuple[str, float]] = []

    def note(stage: str, _: float) -> None:
        starts.append((stage, time.process_time()))

    # On a copy, since passes note shapes on the nodes they have seen.
    fresh = replace(captured, work=copy.deepcopy(captured.work))
    outcome = run(fresh, Options(parse_forms("fused"), verify=False, cost_model=False, progress=note))
    note("end", 0.0)
    assert outcome.rewritten == layers, f"expected {layers} sites, found {outcome.rewritten}"
    return {n: (later - start) * 1e3 for (n, start), (_, later) in pairwise(starts)}


def exponent(points: list[Point]) -> float:
    """Return the slope of log(time) over log(nodes), by least squares."""
    xs, ys = [math.log(p.nodes) for p in points], [math.log(p.total) for p in points]
    return statistics.linear_regression(xs, ys).slope


def _print(family: str, points: list[Point]) -> None:
    print(f"\n{family}\n{'layers':>7}{'nodes':>7}{'ms':>9}{'ms/node':>9}   by stage (ms)")
    for p in points:
        detail = "  ".join(f"{n} {t:.0f}" for n, t in p.by_stage.items())
        print(
            f"{p.layers:>7}{p.nodes:>7}{p.total:>9.1f}{p.per_node:>9.3f}   {detail}"
            f"   (functional copy {p.functional_copy:.0f})"
        )
    print(f"growth {exponent(points):.2f}, over the last doubling {exponent(points[-2:]):.2f}")


def main() -> int:
    """Print the tables; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="6 and 12 layers only")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    result: dict[str, Any] = {**about("torch", "transformers"), "families": {}}
    worst = growth = 0.0
    for family in FAMILIES:
        measure(family, 2, 1)  # first use of torch's tracing
        points = [measure(family, n, 3) for n in (DEPTHS[:2] if a.quick else DEPTHS)]
        _print(family, points)
        worst = max(worst, *(p.per_node for p in points))
        growth = max(growth, exponent(points))
        result["families"][family] = {
            "exponent": exponent(points),
            "last_doubling": exponent(points[-2:]),
            "points": [asdict(p) | {"per_node": p.per_node} for p in points],
        }
    print(f"\nworst {worst:.3f} ms/node (limit {LIMIT_MS}), growth {growth:.2f} (limit {LIMIT_EXPONENT})")
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(worst > LIMIT_MS or growth > LIMIT_EXPONENT)


if __name__ == "__main__":
    sys.exit(main())
