"""Instructions of emitted kernels beside those of FlexAttention's, for the same attention, without a GPU.

    python benchmarks/instructions.py --json benchmarks/results/instructions.json

Both are compiled by the same triton for the same GPU: ours as ``emit`` writes it, with its default config;
FlexAttention's as the installed torch writes it for that GPU, with the config that it picks by default
(``flex_template.py``): once for a length that its tiles divide, so that nothing guards the end, and once for
one that they do not.  Sizes and strides are fixed in its text; ours takes any at run time.

The loops over keys are found in the machine code (``attnc.codegen.triton.loops``).  Tiles differ, so what a
turn executes is given per pair of a query and a key: instructions x 32 threads x warps / (queries x keys of a
tile); MUFU (exponentials, reciprocals, tanh) likewise.  Of several loops, "full" is the cheapest, for tiles
that nothing hides, and "masked" the dearest; a kernel with one loop spends the same on every tile.

What this can say: how much work is left beside the products, how many registers, and what spills.  What it
cannot: time.  Instructions differ in cost and overlap with tensor cores and with loads; a load by TMA, or a
product by a warp group, is one instruction for much work.  Nor does it count tiles: FlexAttention skips them
by a table made beforehand, ours by bounds that the kernel computes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from flex_template import Call, compile_template, render
from gate import variant
from machine import about

from attnc.codegen.triton import emit
from attnc.codegen.triton.aot import compile_for, count_instructions, disassemble, programs, usage
from attnc.codegen.triton.loops import Loop, inner_loops, products
from attnc.codegen.triton.store import load

BATCH, HEADS, LENGTHS = 4, 16, {"flex": 4096, "flex, odd length": 4000}
TARGETS = ("sm_80", "sm_90", "sm_100")
COMPARED = ("full", "causal", "window", "documents", "softcap", "alibi", "bias")
HEADER = (
    f"{'':31}{'tile':>8}{'warps':>6}{'regs':>5}{'shared':>8}{'stack':>6}{'code':>6}"
    f"{'full':>8}{'MUFU':>6}{'masked':>8}{'MUFU':>6}"
)
Row = dict[str, Any]


def causal(b: Any, h: Any, m: Any, n: Any) -> Any:
    """Return which keys n a query m may see: those not after it."""
    return m >= n


def mods(name: str, length: int, make: Callable[..., torch.Tensor]) -> tuple[Any, Any]:
    """Return the score and mask functions of a variant as users of FlexAttention write them."""
    if name == "window":
        return None, lambda b, h, m, n: (m >= n) & (m - n < 1024)
    if name == "documents":
        own, ids = (make(BATCH, length, dtype=torch.int64) for _ in range(2))
        return None, lambda b, h, m, n: (m >= n) & (own[b, m] == ids[b, n])
    if name == "softcap":
        return lambda s, b, h, m, n: torch.tanh(s / 50.0) * 50.0, causal
    if name == "alibi":
        alibi = make(HEADS, length, dtype=torch.float32)
        return lambda s, b, h, m, n: s + alibi[h, n], causal
    if name == "bias":
        rel = make(HEADS, length, length, dtype=torch.bfloat16)
        return lambda s, b, h, m, n: s + rel[h, m, n], None
    return {"full": (None, None), "causal": (None, causal)}[name]


def ours(name: str, head: int, target: str) -> Iterator[Row]:
    """Yield a row for each way in which the emitted kernel is compiled for ``target``."""
    kernel = emit(variant(name, "bfloat16", str(head)), name="attention")
    module = load(kernel)
    for _, program in programs(kernel, (target,)):
        sizes = getattr(module, program.configs)[target]
        tiles = dict(zip(("block_m", "block_n", "warps", "stages"), sizes, strict=True))
        compiled = compile_for(kernel, module, target, program)
        yield {
            "contender": ", ".join(filter(None, ("attnc", program.variant))),
            **tiles,
            **measured(compiled, tiles, head),
        }


def flex(name: str, head: int, target: str) -> Iterator[Row]:
    """Yield a row for FlexAttention at each of ``LENGTHS``."""
    for title, length in LENGTHS.items():
        call = Call(BATCH, HEADS, length, head, torch.bfloat16, partial(mods, name, length))
        template = render(call, target)
        compiled = compile_template(template)
        yield {"contender": title, **template.tiles, **measured(compiled, template.tiles, head)}


def measured(compiled: Any, tiles: dict[str, int], head: int) -> Row:
    """Return what a compiled kernel needs, and its inner loops."""
    sass = disassemble(compiled.asm["cubin"])
    counts = count_instructions(sass)
    loops = [_loop(loop, tiles, head) for loop in inner_loops(sass)]
    needs = {**usage(sass), "shared": int(compiled.metadata.shared), "spills": counts["spills"]}
    return {**needs, "instructions": counts["instructions"], "loops": loops}


def _loop(loop: Loop, tiles: dict[str, int], head: int) -> Row:
    text = "\n".join(x.text for x in loop)
    counts = {k: v for k, v in count_instructions(text).items() if v}
    counts["mufu"] = sum(x.operation == "MUFU" for x in loop)
    pairs, done = tiles["block_m"] * tiles["block_n"], products(loop, tiles["warps"])
    # One tile a turn, unless the loop was unrolled: then its products tell.
    turns = 1 if done is None else done / (pairs * 2 * head)
    share = 32 * tiles["warps"] / (pairs * turns)
    per_pair = {k: round(counts[k] * share, 3) for k in ("instructions", "mufu")}
    return {**counts, "tiles": turns, "per_pair": per_pair}


def show(row: Row) -> None:
    """Print a row: of its loops the cheapest and the dearest."""
    order = sorted((x["per_pair"] for x in row["loops"]), key=lambda x: x["instructions"])
    loops = "".join(f"{x['instructions']:>8.1f}{x['mufu']:>6.2f}" for x in (order[0], order[-1]))
    tile = f"{row['block_m']}x{row['block_n']}"
    print(
        f"{row['variant']:11}{row['contender']:20}{tile:>8}{row['warps']:>6}{row['registers']:>5}"
        f"{row['shared']:>8}{row['stack']:>6}{row['instructions']:>6}{loops}",
        flush=True,
    )


def main() -> None:
    """Compile, print the tables, write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=",".join(COMPARED))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--heads", default="64,128")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    result = about("torch", "triton")
    result["note"] = "compiled ahead of time; nothing here was run on a GPU"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"XDG_CACHE_HOME": folder, "TRITON_CACHE_DIR": folder}
        for target in a.targets.split(","):
            for head in map(int, a.heads.split(",")):
                print(f"\n{target}, bf16, head size {head}: instructions and MUFU per pair\n{HEADER}")
                for name in a.variants.split(","):
                    known = {"target": target, "head": head, "variant": name}
                    for row in itertools.chain(ours(name, head, target), flex(name, head, target)):
                        rows.append(known | row)
                        show(rows[-1])
    if a.json:
        a.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
