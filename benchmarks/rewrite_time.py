"""How long rewriting takes after capture, per graph node, and how it grows with depth.

    python benchmarks/rewrite_time.py [--quick]

Models are BERT with 6, 12, 24 and 48 layers (small widths: the graph is what counts).  Rewriting is detect +
plan + rewrite + lower.  Prints the median of three runs per depth and the growth exponent, the slope of
log(time) over log(nodes).
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings

import torch
from transformers import BertConfig, BertModel

from attnc import parse_forms
from attnc.capture import capture_export
from attnc.pipeline import Options, run

LIMIT_MS, LIMIT_EXPONENT = 0.5, 1.15
STAGES = ("detect", "plan", "rewrite", "lower")


def measure(layers: int, repeats: int) -> tuple[int, float, dict[str, float]]:
    """Return (nodes, median seconds of all stages, median seconds by stage) for one depth."""
    config = BertConfig(
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=101,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    model = BertModel(config).eval()
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        captured = capture_export(
            model, (), {"input_ids": torch.randint(1, 100, (2, 11)), "attention_mask": mask}
        )
    nodes = len(captured.work.nodes)
    runs = []
    for _ in range(repeats):
        outcome = run(captured, Options(parse_forms("fused"), verify=False, cost_model=False))
        assert outcome.rewritten == layers, f"expected {layers} sites, found {outcome.rewritten}"
        runs.append({s.name: s.seconds for s in outcome.stages if s.name in STAGES})
    by_stage = {n: statistics.median(r[n] for r in runs) for n in STAGES}
    return nodes, statistics.median(sum(r.values()) for r in runs), by_stage


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    depths = (6, 12) if "--quick" in sys.argv[1:] else (6, 12, 24, 48)
    measure(2, 1)  # first use of torch's tracing and of our caches
    print(f"{'layers':>7}{'nodes':>7}{'ms':>9}{'ms/node':>9}   by stage (ms)")
    points = []
    for layers in depths:
        nodes, seconds, by_stage = measure(layers, 3)
        points.append((nodes, seconds))
        detail = "  ".join(f"{n} {t * 1e3:.0f}" for n, t in by_stage.items())
        print(
            f"{layers:>7}{nodes:>7}{seconds * 1e3:>9.1f}{seconds * 1e3 / nodes:>9.3f}   {detail}", flush=True
        )
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    mx, my = statistics.mean(xs), statistics.mean(ys)
    exponent = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
    worst = max(t * 1e3 / n for n, t in points)
    print(f"growth {exponent:.2f} (limit {LIMIT_EXPONENT}); worst {worst:.3f} ms/node (limit {LIMIT_MS})")
    return int(worst > LIMIT_MS or exponent > LIMIT_EXPONENT)


if __name__ == "__main__":
    sys.exit(main())
