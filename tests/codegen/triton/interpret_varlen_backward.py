"""Run emitted backward kernels over packed sequences under Triton's interpreter, in a process of its own.

Arguments are names of the corpus and of ``SHARES``, ``every_axis``, ``short`` for fewer lengths, and
``broken``.  Each spec runs its self-test, and the gradient of ``attnc.codegen.triton.run_varlen`` by autograd
against plain torch's in fp64.  With ``broken``, some files are broken on purpose, and the self-test has to
notice.  Prints one JSON line per run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import numpy
import torch
from interpret_backward import EVERY_AXIS, SHARES
from interpret_varlen import pack, poison

from attnc.codegen.triton import emit, run_varlen
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.launch import run_varlen_backward
from attnc.codegen.triton.packed import packed_gradients
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec, RoundedSoftmax
from attnc.printer import parse

Lengths = tuple[tuple[int, ...], tuple[int, ...]]
CASES: dict[torch.dtype, Lengths] = {
    torch.float32: ((17, 0, 65, 1, 0), (63, 65, 97, 0, 0)),
    torch.float16: ((97, 1, 33), (65, 17, 33)),
}
"""Queries and keys of each sequence."""
SHORT: dict[torch.dtype, Lengths] = {torch.float16: ((33, 0, 7, 1), (40, 9, 0, 17))}
HUGE = 1e6
BREAKS = (
    ("causal", "q_start = tl.load(cu_q_ptr + b)", "q_start = tl.load(cu_q_ptr)"),
    ("causal", "(tl.load(cu_k_ptr + b + 1) - k_start)", "(tl.load(cu_k_ptr + b + 1) - k_start - 1)"),
    ("causal", "    at = h * tokens + q_start\n", "    at = h * tokens\n"),
    ("causal", "((q_start + first) * heads + h)", "((q_start + first) * heads)"),
    ("causal", "at = (k_start + n) * kv_heads + kv_head", "at = n * kv_heads + kv_head"),
    ("causal", "tiles = tl.cdiv(wide, BLOCK_N)", "tiles = tl.cdiv(wide - 1, BLOCK_N)"),
    ("causal", "h = kv_head * 2 + turn // count", "h = kv_head + turn // count"),
    ("causal", "ds = p * (dp - delta)", "ds = p * dp"),
    ("causal", "delta -= dlse", "delta += dlse"),
    ("biases", "if (first < sq) & (n < sk):", "if (first < sq) & (n + BLOCK_N < sk):"),
    ("biases", "for other in range(0, batch)", "for other in range(0, batch - 1)"),
    ("biases", "(b * heads + h) * wide", "(b * heads + h) * sk"),
    ("biases", "1, sk).zero_()", "1, sk)"),
    ("biases", "inside = (rows < longest)[:, None]", "inside = (rows < sq)[:, None]"),
    ("documents", "ids1_ptr + b * ids1_b", "ids1_ptr"),
    ("sink_logits", "* delta).sum(1)", "* delta).sum(1) * 0.5"),
    ("left_padded", "if tl.min(lowest, 0) <=", "if tl.min(lowest, 0) < 2 *"),
    ("below_zero", "share = tl.where(low, 1.0 / ", "share = tl.where(low, -1.0 / "),
    ("below_zero", "dp = (dp - delta) * share", "dp = dp * share"),
    ("settled", "delta = tl.where(held, 0.0, delta)", "delta = tl.where(held, delta, delta)"),
    ("settled", "p = p * share", "p = p * 1.0"),
    ("vanishing", 'if tl.max(largest, 0) == float("inf")', "if tl.max(largest, 0) == 0.0"),
    ("every_axis", "bh * longest + first + i", "at + i"),
    ("every_axis", "[:, None] * wide + (n", "[:, None] * sk + (n"),
    ("every_axis", "sq, 1).zero_()", "sq, 1)"),
)
"""Spec, a piece of its file, and what to break it into; nothing here writes to memory of others."""


def draw(spec: AttentionSpec, lengths: Lengths) -> tuple[Lengths, list[torch.Tensor], list[torch.Tensor]]:
    """Return lengths as the spec allows them, where sequences begin, and inputs with NaN around tokens."""
    if any(x.tensor != x.name for x in name_inputs(spec)):  # one tensor for the tokens of queries and keys
        lengths = lengths[0], lengths[0]
    padded = interpret.draw(spec, len(lengths[0]), 1, *map(max, lengths))
    tokens = [pack(x, n) for x, n in zip(padded[:3], (lengths[0], lengths[1], lengths[1]), strict=True)]
    captured = [poison(x, o.axes, lengths) for x, o in zip(padded[3:], spec.captured, strict=True)]
    return lengths, [torch.tensor([0, *n]).cumsum(0).int() for n in lengths], [*tokens, *captured]


def attend(
    spec: AttentionSpec, lengths: Lengths, cu: list[torch.Tensor], inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    most_q, most_k = (max(n) for n in lengths)
    if not any({*"qk"} & {*o.axes} for o in spec.captured):  # nothing is padded: the longest, or more
        most_q, most_k = most_q + 40, most_k + 40
    return run_varlen(spec, *inputs[:3], *cu, most_q, inputs[3:], most_k)


def compare(spec: AttentionSpec, lengths: Lengths) -> dict[str, object]:
    """Return the worst error of each gradient, as a share of its limit by the file's own rule.

    Against plain torch in fp64, or in fp32 where only that rounds the log-sum-exp as is meant.
    """
    module = load(emit(spec, name="backward", kind="varlen_backward"))
    lengths, cu, inputs = draw(spec, lengths)
    needs = [x.is_floating_point() for x in inputs]
    leaves = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if need]
    out, lse = attend(spec, lengths, cu, inputs)
    g = torch.Generator().manual_seed(len(lengths[0]))
    dout = torch.randn(out.shape, generator=g).to(out.dtype)
    dlse = torch.where(lse.abs() < HUGE, torch.randn(lse.shape, generator=g), 0.0)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse), materialize_grads=True)
    inputs = [x.detach() for x in inputs]
    wide = [x.double() if need else x for x, need in zip(inputs, needs, strict=True)]
    plain = packed_gradients(spec, *inputs[:3], *cu, inputs[3:], dout, dlse, needs)
    want = packed_gradients(spec, *wide[:3], *cu, wide[3:], dout.double(), dlse.double(), needs)
    if isinstance(spec.norm, RoundedSoftmax):
        want = plain
    limits = [x for x, _ in module._limits([*inputs, *cu], dout.transpose(0, 1), dlse) if x is not None]
    errors, undefined = [], 0
    for x, z, own, limit in zip(found, want, plain, limits, strict=True):
        error = torch.where(own.isfinite() & z.isfinite(), (x - z).abs(), 0.0).max().item()
        errors.append(error / limit.item() if error else 0.0)
        undefined += int((x.isnan() != own.isnan()).sum())
    return {"errors": errors, "undefined": undefined, "hidden_rows": int((lse.abs() >= HUGE).sum())}


def alone(spec: AttentionSpec) -> list[bool]:
    """Say of each gradient whether it has the same bits if it is the only one that is wanted."""
    lengths, cu, inputs = draw(spec, ((17, 5), (40, 33)))
    out, lse = attend(spec, lengths, cu, inputs)
    given = (spec, *inputs[:3], *cu, 17, inputs[3:], out, lse, torch.ones_like(out), None)
    together = run_varlen_backward(*given, [True] * len(inputs))
    return [
        torch.equal(x, *run_varlen_backward(*given, [i == at for i in range(len(inputs))]))
        for at, x in enumerate(together)
    ]


def runs(names: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    own = {name: parse(text) for name, text in SHARES.items()}
    specs = {**interpret.corpus(), **own, "every_axis": parse(EVERY_AXIS)}
    for name in (n for n in names if n in specs):
        kernel = emit(specs[name], name=name, kind="varlen_backward")
        yield f"self-test {name}", interpret.self_test(kernel)
        for dtype, lengths in (SHORT if "short" in names else CASES).items():
            yield f"{name} {dtype} {lengths}", compare(interpret.cast(specs[name], dtype), lengths)
    if "every_axis" in names:
        yield "alone", {"alone": alone(specs["every_axis"])}
    for at, (name, old, new) in enumerate(BREAKS if "broken" in names else ()):
        kernel = emit(specs[name], name=name, kind="varlen_backward")
        yield f"broken {name}: {old} -> {new}", {"noticed": interpret.notices(kernel, at, old, new)}


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    for name, result in runs(sys.argv[1:]):
        print(json.dumps({"run": name, **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
