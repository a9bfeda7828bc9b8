"""Run emitted backward kernels under Triton's interpreter, in a process of its own; print lines of JSON.

Arguments are names of the corpus and of ``SHARES``, ``every_axis``, ``short`` for fewer lengths, ``broken``
and ``broken_shares``.  Each spec is run by the self-test in its file, and through
``attnc.codegen.triton.launch.run_backward``, after the forward kernel, against the executed spec's gradients
in fp64.  With ``broken``, some files are broken on purpose, and the self-test has to notice.
"""

from __future__ import annotations

import json
import sys

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import numpy
import torch

from attnc.codegen.ops import gradients
from attnc.codegen.triton import emit, run
from attnc.codegen.triton.launch import run_backward
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec, RoundedSoftmax
from attnc.printer import parse

LENGTHS = {torch.float32: ((17, 63), (65, 65)), torch.float16: ((33, 129), (65, 65))}
SHORT = {torch.float32: ((17, 63),), torch.float16: ((65, 65),)}
HUGE = 1e6
EVERY_AXIS = (
    "attn q=bhqd[b,h,s,16]:float32 k=bhkd[b,hkv,t,16]:float32 v=bhke[b,hkv,t,16]:float32 group=2"
    " gain(per_query) bias(whole) bias(-shared) bias(per_key) mask=causal fill(add,-1e9) softmax"
    " with per_query=bhqk[b,h,s,1]:float32 with whole=bhqk[b,h,s,t]:float32"
    " with shared=bhqk[1,1,s,t]:float32 with per_key=bhqk[b,1,1,t]:float16"
    " with unread=bhqk[1,h,1,1]:float32"
)
_SMALL = (
    "attn q=bhqd[b,h,s,16]:float32 k=bhkd[b,hkv,t,16]:float32 v=bhke[b,hkv,t,16]:float32 group=2 scale(0.25)"
    " mask={} fill(replace,-inf) normalized({})"
)
SHARES = {
    "below_zero": _SMALL.format("causal", "where((s==-inf),0.0,(tanh(s)-2.0)),least=-40.0"),
    "settled": _SMALL.format("causal", "where((s==-inf),0.0,tanh(s)),added=1.0,least=0.5"),
    "vanishing": _SMALL.format("(causal & padding(key,pad))", "relu(s)") + " with pad=bk[b,t]:bool",
}
"""Weights over sums below zero, some of them bounded; over sums bounded above zero; over sums of zero."""
BREAKS = (
    ("causal", "keep = ki <= qi", "keep = ki < qi"),
    ("causal", "h = kv_head * 2 + turn // count", "h = kv_head + turn // count"),
    ("causal", "ds = p * (dp - delta)", "ds = p * dp"),
    (
        "causal",
        "tl.cdiv(tl.maximum(hi - full_lo, 0), BLOCK_M)",
        "tl.cdiv(tl.maximum(hi - full_lo, 0), BLOCK_M) - 1",
    ),
    ("causal", "lo = tl.maximum(n, 0) // BLOCK_M", "lo = tl.maximum(n + BLOCK_M, 0) // BLOCK_M"),
    ("causal", "(dk * 0.125)", "(dk * 0.25)"),
    ("causal", "delta -= dlse", "delta += dlse"),
    (
        "causal",
        "tl.store(top_ptr + at + i, top, mask=rows < sq)",
        "tl.store(top_ptr + at + i, top, mask=rows <= sq)",
    ),
    ("causal", "tl.load(k_tile, mask=inside[:, None]", "tl.load(k_tile, mask=(n + j <= sk)[:, None]"),
    ("left_padded", "if tl.min(lowest, 0) <=", "if tl.min(lowest, 0) < 2 *"),
    ("left_padded", "share = tl.where(low, 1.0 / l, share)", "share = tl.where(low, 1.0, share)"),
    ("capped_window", "(1.0 - t1 * t1)", "(1.0 - t1)"),
    ("biases", "d_bias1 = -ds", "d_bias1 = ds"),
    ("biases", "for other in range(0, batch)", "for other in range(0, batch - 1)"),
    ("sink_logits", ".sum((0, 2))", ".sum((0, 2)) * 0.5"),
    ("softmax_plus_one", "d_gain = ds * s1 * 0.2", "d_gain = ds * s1"),
)
"""Corpus entry, a piece of its file, and what to break it into."""
BREAKS_SHARES = (
    ("taylor", "dp = (dp - delta) * share", "dp = dp * share"),
    ("taylor", "dp = (dp - delta) * share", "dp = dp - delta"),
    ("taylor", "p = p * share", "p = p * 1.0"),
    ("taylor", "delta -= dlse", "delta += dlse"),
    ("taylor", "share = tl.exp(-lse)", "share = tl.exp(-lse) * 1.01"),
    ("settled", "delta = tl.where(held, 0.0, delta)", "delta = tl.where(held, delta, delta)"),
    ("settled", "held = lse <= -0.69314", "held = lse <= -1.69314"),
    ("settled", "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
    ("below_zero", "share = tl.where(low, 1.0 / ", "share = tl.where(low, -1.0 / "),
    ("below_zero", "1.0 / tl.maximum(l, -40.0)", "1.0 / l"),
    ("below_zero", "held = tl.where(low, l < -40.0, held)", "held = tl.where(low, held, held)"),
    ("below_zero", "s = tl.where(inside, s, 0.0)", "s = tl.where(inside, s, s)"),
    ("vanishing", 'if tl.max(largest, 0) == float("inf")', "if tl.max(largest, 0) == 0.0"),
)


def draw(spec: AttentionSpec, b: int, hkv: int, sq: int, sk: int) -> list[torch.Tensor]:
    """Return tensors whose heads come after their tokens in memory, as most models have them."""
    g = torch.Generator().manual_seed(sq * 1000 + sk)
    sizes = {"b": b, "h": hkv * spec.group_size, "hkv": hkv, "s": sq, "t": sk}
    out = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        shape = [sizes[d] if isinstance(d, str) else d for d in o.shape]
        x = torch.randn(shape, generator=g).to(o.dtype)
        if o.dtype == torch.bool:
            x = torch.rand(shape, generator=g) < 0.6
            x[..., : sk // 4] = False  # padding on the left: with a causal mask the first queries see nothing
        if o.dtype in (torch.int64, torch.int32):
            x = torch.randint(0, 3, shape, generator=g).to(o.dtype)
        if o.name == "attention_mask":
            x = torch.where(x > 0.5, torch.finfo(o.dtype).min, 0.0)
            x[..., :1, :] = torch.finfo(o.dtype).min  # every key is hidden: a spread over all of them
        out.append(x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x)
    return out


def compare(spec: AttentionSpec, sq: int, sk: int) -> dict[str, object]:
    """Return the worst error of each gradient, as a share of its limit by the file's own rule.

    Against the executed spec in fp64, or in fp32 where only that rounds the log-sum-exp as is meant.
    """
    module = load(emit(spec, name="backward", kind="backward"))
    inputs = draw(spec, 1, 1 if sq > 33 else 2, sq, sk)
    q, k, v, *captured = inputs
    out, lse = run(spec, q, k, v, captured)
    g = torch.Generator().manual_seed(sq)
    b, h, _, e = out.shape
    dout = torch.randn(b, sq, h, e, generator=g).to(out.dtype).transpose(1, 2)
    dlse = torch.where(lse.abs() < HUGE, torch.randn(lse.shape, generator=g), 0.0)
    needs = [x.is_floating_point() for x in inputs]
    found = run_backward(spec, q, k, v, captured, out, lse, dout, dlse, needs)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = gradients(spec, *wide[:3], wide[3:], dout.double(), dlse.double(), needs)
    plain = gradients(spec, q, k, v, captured, dout, dlse, needs)
    if isinstance(spec.norm, RoundedSoftmax):
        want = plain
    limits = [limit for limit, _ in module._limits(inputs, dout, dlse) if limit is not None]
    errors, undefined = [], 0
    for x, z, own, limit in zip(found, want, plain, limits, strict=True):
        error = torch.where(own.isfinite() & z.isfinite(), (x - z).abs(), 0.0).max().item()
        errors.append(error / limit.item() if error else 0.0)
        undefined += int((x.isnan() != own.isnan()).sum())
    return {"errors": errors, "undefined": undefined, "hidden_rows": int((lse.abs() >= HUGE).sum())}


def alone(spec: AttentionSpec) -> list[bool]:
    """Say of each gradient whether it has the same bits if it is the only one that is wanted."""
    q, k, v, *captured = draw(spec, 2, 2, 17, 40)
    out, lse = run(spec, q, k, v, captured)
    given, count = (spec, q, k, v, captured, out, lse, torch.ones_like(out), None), 3 + len(captured)
    together = run_backward(*given, [True] * count)
    return [
        torch.equal(x, *run_backward(*given, [i == at for i in range(count)]))
        for at, x in enumerate(together)
    ]


def main(names: list[str]) -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    corpus = {**interpret.corpus(), **{name: parse(text) for name, text in SHARES.items()}}
    for name, spec in corpus.items():
        if name not in names:
            continue
        result = interpret.self_test(emit(spec, name=name, kind="backward"))
        print(json.dumps({"run": f"self-test {name}", **result}), flush=True)
        for dtype, lengths in (SHORT if "short" in names else LENGTHS).items():
            typed = interpret.cast(spec, dtype)
            for sq, sk in lengths:
                if name == "packed" and sq != sk:
                    continue
                result = compare(typed, sq, sk)
                print(json.dumps({"run": f"{name} {dtype} {sq} {sk}", **result}), flush=True)
    if "every_axis" in names:
        spec = parse(EVERY_AXIS)
        result = {**compare(spec, 17, 63), "alone": alone(spec)}
        print(json.dumps({"run": "every_axis torch.float32 17 63", **result}), flush=True)
    broken = BREAKS if "broken" in names else BREAKS_SHARES if "broken_shares" in names else ()
    for at, (name, old, new) in enumerate(broken):
        found = interpret.notices(emit(corpus[name], name=name, kind="backward"), at, old, new)
        print(json.dumps({"run": f"broken {name}: {old} -> {new}", "noticed": found}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
