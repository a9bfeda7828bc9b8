"""Run emitted kernels over block lists under Triton's interpreter, in a process of its own.

``python interpret_blocks.py NAME..`` takes these specs of the corpus; each runs its self-test, and random
lists through ``attnc.codegen.triton.run_blocks`` against the spec executed in fp64. Then lists are merged,
and some files are broken on purpose. Prints one JSON line per run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import numpy
import torch

from attnc.block_list import BlockList
from attnc.codegen.ops import execute
from attnc.codegen.triton import emit, run_blocks
from attnc.ir import AttentionSpec
from attnc.mask_tiles import FULL, classify

Sizes = tuple[int, int, tuple[int, int], float, bool]
CASES: dict[torch.dtype, tuple[Sizes, ...]] = {
    torch.float32: ((70, 150, (32, 64), 0.5, True), (260, 260, (32, 32), 0.1, True)),
    torch.float16: ((130, 130, (64, 128), 0.5, False),),
}
"""Sq, Sk, block, the share of blocks that are listed, whether each head has a list of its own."""
BREAKS = (
    ("causal", "range(1, tiles + 1)", "range(1, tiles)"),
    ("causal", "final >= sk // COLUMNS", "final > sk // COLUMNS"),
    ("causal", "n = following * COLUMNS + t % TILES * BLOCK_N", "n = following * COLUMNS"),
    ("causal", "row = tl.load(order_ptr + row)", "row = tl.load(order_ptr)"),
    ("causal", "h * ranges_h", "h // 2 * ranges_h"),
    ("causal", "tl.load(range_at + 2)", "tl.load(range_at + 1)"),
    ("causal", "tiles = (end - partial) * TILES", "tiles = (end - begin) * TILES"),
    ("plain", "        MASKED=True", "        MASKED=False"),
)
"""Corpus entry, a piece of its kernel, and what to break it into."""


def choose(spec: AttentionSpec, heads: int, sizes: Sizes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw blocks, also such as the mask hides, and say in which of them it hides nothing."""
    sq, sk, block, density, per_head = sizes
    kinds = classify(spec.mask, sq, sk, block)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(1, heads if per_head else 1, *kinds.shape, generator=g) < density
    chosen[:, :, 1:2] = False  # a row of blocks that lists nothing
    return chosen, kinds == FULL


def compare(spec: AttentionSpec, sizes: Sizes, seed: int) -> dict[str, object]:
    """Return the error against the executed spec in fp64, as a share of ``interpret``'s limit."""
    sq, sk, block, *_ = sizes
    q, k, v, *captured = interpret.draw(spec, 1, 1, sq, sk)
    chosen, full = choose(spec, q.shape[1], sizes, seed)
    blocks = BlockList.from_dense(chosen, full, block=block)
    blocks.check()
    order = blocks.order(*q.shape[:2]) if seed % 2 else None
    pairs = blocks.to_pairs(sq, sk)
    unread = ~pairs.any(2, keepdim=True).any(1, keepdim=True).mT
    poisoned = [x.masked_fill(unread, torch.nan) for x in (k, v)]
    out, lse = run_blocks(spec, q, *poisoned, captured, blocks, order)
    wide = [x.double() if x.is_floating_point() else x for x in captured]
    exact = execute(spec, q.double(), k.double(), v.double(), wide, pairs)
    found = interpret.errors(spec, v, (out, lse), exact, execute(spec, q, k, v, captured, pairs))
    return {**found, "rows": lse.numel()}


def merge(spec: AttentionSpec) -> dict[str, object]:
    """Return the error of two calls over disjoint lists, merged by their log-sum-exp."""
    sizes: Sizes = (129, 200, (32, 32), 0.7, True)
    q, k, v, *captured = interpret.draw(spec, 1, 1, *sizes[:2])
    chosen, full = choose(spec, q.shape[1], sizes, 7)
    left = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(8)) < 0.5
    lists = [BlockList.from_dense(x, full, block=sizes[2]) for x in (chosen & left, chosen & ~left)]
    halves = [run_blocks(spec, q, k, v, captured, x) for x in lists]
    lse = torch.logaddexp(halves[0][1], halves[1][1])
    weighed = [(out * torch.exp(part - lse)[..., None]).nan_to_num(0.0) for out, part in halves]
    pairs = BlockList.from_dense(chosen, block=sizes[2]).to_pairs(*sizes[:2])
    exact = execute(spec, q.double(), k.double(), v.double(), captured, pairs)
    out = (weighed[0] + weighed[1]).where(lse[..., None] > -torch.inf, halves[0][0])
    one_sided = [int((part == -torch.inf).sum() - (lse == -torch.inf).sum()) for _, part in halves]
    own = execute(spec, q, k, v, captured, pairs)
    return {**interpret.errors(spec, v, (out, lse), exact, own), "one_sided": one_sided}


def runs(names: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    corpus = interpret.corpus()
    for name in names:
        spec = corpus[name]
        yield f"self-test {name}", interpret.self_test(emit(spec, name=name, kind="blocks"))
        for dtype, cases in CASES.items():
            typed = interpret.cast(spec, dtype)
            for seed, sizes in enumerate(cases):
                if name == "packed" and sizes[0] != sizes[1]:
                    continue
                yield f"{name} {dtype} {sizes}", compare(typed, sizes, seed)
    for name in ("causal", "biases"):
        yield f"merged {name}", merge(corpus[name])
    for at, (name, old, new) in enumerate(BREAKS):
        broken = interpret.broken_file(emit(corpus[name], name=name, kind="blocks"), at, old, new)
        yield f"broken {name}: {old} -> {new}", interpret.self_test(broken)


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    for name, result in runs(sys.argv[1:]):
        print(json.dumps({"run": name, **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
