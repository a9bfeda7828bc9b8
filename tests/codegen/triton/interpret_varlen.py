"""Run emitted kernels over packed sequences under Triton's interpreter, in a process of its own.

``python interpret_varlen.py NAME..`` takes these specs of the corpus; each runs its self-test, and sequences
of mixed lengths through ``attnc.codegen.triton.run_varlen`` against the spec executed in fp64. Then some
files are broken on purpose. Prints one JSON line per run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import numpy
import torch

from attnc.codegen.triton import emit, run_varlen
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.packed import _cut, execute_packed
from attnc.ir import AttentionSpec

Lengths = tuple[tuple[int, ...], tuple[int, ...]]
CASES: dict[torch.dtype, Lengths] = {
    torch.float32: ((17, 0, 65, 1, 0), (63, 65, 129, 0, 0)),
    torch.float16: ((129, 1, 63), (65, 17, 63)),
}
"""Queries and keys of each sequence."""
BREAKS = (
    ("causal", "k_start = tl.load(cu_k_ptr + b)", "k_start = tl.load(cu_q_ptr + b)"),
    (
        "causal",
        "sk = (tl.load(cu_k_ptr + b + 1) - k_start)",
        "sk = (tl.load(cu_k_ptr + b + 1) - k_start - 1)",
    ),
    ("causal", "at = h * tokens + q_start", "at = h * tokens + k_start"),
    ("causal", "total = tl.where(sk == 0, 1.0, total)", "total = total"),
    ("causal", "(q_start + first) * heads + h", "(q_start + first) * heads"),
    ("documents", "ids1_ptr + b * ids1_b", "ids1_ptr"),
    ("biases", "(rows < sq)[:, None]", "(rows < sq + 1)[:, None]"),
)
"""Corpus entry, a piece of its kernel, and what to break it into."""


def pack(x: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Return ``[T, H, D]`` from ``[B, H, S, D]``, in memory by heads."""
    rows = torch.cat([row[:, :n] for row, n in zip(x, lengths, strict=True)], 1)
    return rows.contiguous().transpose(0, 1)


def poison(x: torch.Tensor, axes: str, lengths: Lengths) -> torch.Tensor:
    """Return a captured tensor with NaN, or 1, in place of what belongs to no token."""
    out = torch.full_like(x, torch.nan if x.is_floating_point() else 1)
    for b, (sq, sk) in enumerate(zip(*lengths, strict=True)):
        _cut(out, axes, slice(b, b + 1), sq, sk).copy_(_cut(x, axes, slice(b, b + 1), sq, sk))
    return out


def compare(spec: AttentionSpec, lengths: Lengths) -> dict[str, object]:
    """Return the error against the executed spec in fp64, as a share of ``interpret``'s limit."""
    if any(x.tensor != x.name for x in name_inputs(spec)):  # one tensor for the tokens of queries and keys
        lengths = lengths[0], lengths[0]
    padded = interpret.draw(spec, len(lengths[0]), 1, *map(max, lengths))
    q, k, v = (pack(x, n) for x, n in zip(padded[:3], (lengths[0], lengths[1], lengths[1]), strict=True))
    captured = [poison(x, o.axes, lengths) for x, o in zip(padded[3:], spec.captured, strict=True)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in lengths)
    out, lse = run_varlen(spec, q, k, v, cu_q, cu_k, max(lengths[0]), captured)
    wide = [x.double() if x.is_floating_point() else x for x in captured]
    want = execute_packed(spec, q.double(), k.double(), v.double(), cu_q, cu_k, wide)
    own = execute_packed(spec, q, k, v, cu_q, cu_k, captured)
    turned = [(x.transpose(0, 1)[None], y[None]) for x, y in ((out, lse), want, own)]
    return {**interpret.errors(spec, v.transpose(0, 1)[None], *turned), "rows": lse.numel()}


def runs(names: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    corpus = interpret.corpus()
    for name in names:
        yield f"self-test {name}", interpret.self_test(emit(corpus[name], name=name, kind="varlen"))
        for dtype, lengths in CASES.items():
            yield f"{name} {dtype} {lengths}", compare(interpret.cast(corpus[name], dtype), lengths)
    for at, (name, old, new) in enumerate(BREAKS):
        broken = interpret.broken_file(emit(corpus[name], name=name, kind="varlen"), at, old, new)
        yield f"broken {name}: {old} -> {new}", interpret.self_test(broken)


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    for name, result in runs(sys.argv[1:]):
        print(json.dumps({"run": name, **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
