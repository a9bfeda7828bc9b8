"""Run emitted tangent kernels under Triton's interpreter, in a process of its own; print lines of JSON.

Arguments are names of the corpus, ``short`` for fewer lengths, and ``broken``.  Each spec is run by the
self-test in its file, and through ``attnc.codegen.triton.launch.run_tangent`` against the same in plain torch
and fp64, which has rules of its own for derivatives.  With ``broken``, some files are broken on purpose, and
the self-test has to notice.
"""

from __future__ import annotations

import json
import sys

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import numpy
import torch
from interpret_backward import draw

from attnc.codegen.tangents import tangent
from attnc.codegen.triton import emit
from attnc.codegen.triton.launch import run_tangent
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec

LENGTHS = {torch.float32: ((17, 63), (65, 65)), torch.float16: ((33, 129), (65, 65))}
SHORT = {torch.float32: ((17, 63),), torch.float16: ((65, 65),)}
BREAKS = (
    ("causal", "        keep = ki <= qi", "        keep = ki < qi"),
    ("left_padded", "ts = tl.where(keep, ts, 0.0)", "ts = tl.where(keep, ts, 2.0 * ts)"),
    ("left_padded", "tl.where(again, sk, 0)", "tl.where(again, sk - BLOCK_N, 0)"),
    ("causal", "ts = ts * 0.125", "ts = ts * 0.25"),
    ("causal", "tl.dot(q, tl.trans(tk), ts", "tl.dot(q, tl.trans(k), ts"),
    ("causal", "new_dl = dl * shrink", "new_dl = dl"),
    ("causal", "tacc = tacc * shrink[:, None]", "tacc = tacc"),
    ("causal", "- mean[:, None] * out", ""),
    ("causal", "h // 2 * tk_h", "h // 4 * tk_h"),
    ("causal", "tl.load(tv_tile, mask=inside[:, None]", "tl.load(tv_tile, mask=(cols <= sk)[:, None]"),
    (
        "causal",
        "tl.store(tlse_ptr + at + i, mean, mask=rows < sq)",
        "tl.store(tlse_ptr + at + i, mean, mask=rows <= sq)",
    ),
    ("capped_window", "(1.0 - t1 * t1)", "(1.0 - t1)"),
    ("biases", "ts += t_bias1 * -1.0", "ts += t_bias1"),
    ("softmax_plus_one", "ts += s1 * t_gain", "ts += t_gain"),
    ("sink_logits", "dl += l * t_sink", "dl += 0.0 * t_sink"),
    ("expression", "ts += more", "ts += 0.5 * more"),
    ("sigmoid", "tp = tl.where(inside[None, :], tp, 0.0)", "tp = 1.1 * tl.where(inside[None, :], tp, 0.0)"),
    ("signed", "tl.sum(tp * sign, 1)", "tl.sum(tp, 1)"),
)
"""Corpus entry, a piece of its file, and what to break it into."""


def directions(inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(len(inputs))
    return [torch.randn(x.shape, generator=g).to(x.dtype) if x.is_floating_point() else None for x in inputs]


def compare(spec: AttentionSpec, sq: int, sk: int) -> dict[str, object]:
    """Return the worst error of each result, as a share of its limit by the file's own rule."""
    module = load(emit(spec, name="tangent", kind="tangent"))
    inputs = draw(spec, 1, 1 if sq > 33 else 2, sq, sk)
    tangents = directions(inputs)
    found = run_tangent(spec, *inputs[:3], inputs[3:], tangents)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = tangent(spec, *wide[:3], wide[3:], [None if t is None else t.double() for t in tangents])
    plain = tangent(spec, *inputs[:3], inputs[3:], tangents)
    usual = want[1].abs() < 1e6
    errors, undefined = [], 0
    limits = [limit for _, limit, _ in module._expected(inputs, tangents)]
    for x, y, own, limit in zip(found, want, plain, limits, strict=True):
        exact = torch.where(usual.view(*usual.shape, *(1,) * (x.dim() - 3)), y, own.double())
        error = torch.where(x == exact, 0.0, (x - exact).abs())
        errors.append((error / limit).nan_to_num(0.0, 0.0).max().item())
        undefined += int((x.isnan() != own.isnan()).sum())
    return {"errors": errors, "undefined": undefined, "hidden_rows": int((~usual).sum())}


def absent(spec: AttentionSpec) -> list[bool]:
    """Say of each tangent whether leaving it out is the same as zeros."""
    inputs = draw(spec, 1, 2, 17, 40)
    tangents, same = directions(inputs), []
    for at, t in enumerate(tangents):
        if t is not None:
            ways = ([*tangents[:at], x, *tangents[at + 1 :]] for x in (None, torch.zeros_like(t)))
            first, second = (run_tangent(spec, *inputs[:3], inputs[3:], way) for way in ways)
            same.append(
                all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(first, second, strict=True))
            )
    return same


def main(names: list[str]) -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    corpus = interpret.corpus()
    for name, spec in corpus.items():
        if name not in names:
            continue
        result = interpret.self_test(emit(spec, name=name, kind="tangent"))
        print(json.dumps({"run": f"self-test {name}", **result}), flush=True)
        for dtype, lengths in (SHORT if "short" in names else LENGTHS).items():
            typed = interpret.cast(spec, dtype)
            for sq, sk in lengths:
                if name == "packed" and sq != sk:
                    continue
                result = compare(typed, sq, sk)
                print(json.dumps({"run": f"{name} {dtype} {sq} {sk}", **result}), flush=True)
        if name == "expression":
            print(json.dumps({"run": f"absent {name}", "same": absent(spec)}), flush=True)
    for at, (name, old, new) in enumerate(BREAKS if "broken" in names else ()):
        found = interpret.notices(emit(corpus[name], name=name, kind="tangent"), at, old, new)
        print(json.dumps({"run": f"broken {name}: {old} -> {new}", "noticed": found}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
