"""Run emitted kernels with dropout under Triton's interpreter, in a process of its own; print lines of JSON.

Arguments are names of the corpus and of ``interpret_backward.SHARES``, whose specs get dropout, ``short`` for
one dtype, ``masks`` and ``broken``.  Each spec is run by the self-tests in its files, and through
``attnc.codegen.triton.launch`` against ``execute`` and ``gradients`` in fp64.  ``masks`` reads off which
weights kernels keep.  With ``broken``, some files are broken on purpose, and the self-test has to notice.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import interpret
import interpret_backward as backward
import numpy
import torch

from attnc.codegen.dropout import growth, keep
from attnc.codegen.ops import execute, gradients
from attnc.codegen.triton import can_run, emit, run
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.launch import run_backward
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec, Kernel, RoundedSoftmax
from attnc.printer import parse

RATE = 0.3
SEED = torch.tensor([2**45 + 17])
LENGTHS = {torch.float32: (17, 63), torch.float16: (33, 129)}
KEPT = (
    "attn q=bhqd[b,h,s,32]:float32 k=bhkd[b,hkv,t,32]:float32 v=bhke[b,hkv,t,32]:float32 group=2 mask=none"
    " softmax dropout({})"
)
GROWN = repr(growth(RATE))
WORDS = "tl.where(odd, w3, w2), tl.where(odd, w1, w0)"
BREAKS = (
    ("forward", WORDS, "tl.where(odd, w3, w1), tl.where(odd, w2, w0)"),
    ("forward", "_keeps(seed, batch, head, rows[:, None]", "_keeps(seed, batch, head, i[:, None]"),
    ("forward", "cols[None, :]), ", "j[None, :]), "),
    ("forward", "~8, head, batch)", "~8, batch, head)"),
    ("forward", "tl.philox(seed, ", "tl.philox(seed & 0xFFFFFFFF, "),
    ("forward", f", {GROWN}, 0.0)", ", 1.0, 0.0)"),
    ("forward", "tl.sum(p, 1)", "tl.sum(p_kept, 1)"),
    ("forward", "0x4CCCCCCD\n\n\n@triton", "0x4FFFFFFF\n\n\n@triton"),
    ("backward", WORDS, "tl.where(odd, w1, w2), tl.where(odd, w3, w0)"),
    ("backward", "_keeps(seed, batch, head, qi, ki),", "_keeps(seed, batch, head, ki, qi),"),
    ("backward", "_keeps(seed, batch, head, qi, ki),", "_keeps(seed, batch, head, i, j),"),
    ("backward", "    dp *= kept\n", ""),
    ("backward", "    p *= kept\n", ""),
    ("backward", f", {GROWN}, 0.0)", ", 1.0, 0.0)"),
    ("backward", "dp *= kept", "dp *= (kept > 0.0)"),
    ("backward", "batch = b.to(tl.int32)", "batch = b.to(tl.int32) * 0"),
)
"""Kind, a piece of the file of ``causal``, and what to break it into."""


def dropping(spec: AttentionSpec, rate: float = RATE) -> AttentionSpec:
    return dataclasses.replace(spec, dropout=rate)


def executed(spec: AttentionSpec, q, k, v, captured) -> interpret.Result:
    return execute(spec, q, k, v, captured, seed=SEED)


def forward(spec: AttentionSpec, sq: int, sk: int) -> dict[str, object]:
    """Return the forward's error, as a share of its limit: as without dropout, with values grown."""
    q, k, v, *captured = interpret.draw(spec, 2, 2, sq, sk)
    found = run(spec, q, k, v, captured, SEED)
    wide = [x.double() if x.is_floating_point() else x for x in (q, k, v, *captured)]
    exact = executed(spec, *wide[:3], wide[3:])
    return interpret.errors(spec, v * growth(spec.dropout), found, exact, executed(spec, q, k, v, captured))


def backwards(spec: AttentionSpec, sq: int, sk: int) -> dict[str, object]:
    """Return each gradient's error, as a share of its limit by the file's own rule."""
    module = load(emit(spec, name="backward", kind="backward"))
    inputs = backward.draw(spec, 1, 2, sq, sk)
    q, k, v, *captured = inputs
    out, lse = run(spec, q, k, v, captured, SEED)
    g = torch.Generator().manual_seed(sq)
    dout = torch.randn(out.shape, generator=g).to(out.dtype)
    dlse = torch.where(lse.abs() < backward.HUGE, torch.randn(lse.shape, generator=g), 0.0)
    needs = [x.is_floating_point() for x in inputs]
    found = run_backward(spec, q, k, v, captured, out, lse, dout, dlse, needs, SEED)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = gradients(spec, *wide[:3], wide[3:], dout.double(), dlse.double(), needs, SEED)
    plain = gradients(spec, q, k, v, captured, dout, dlse, needs, SEED)
    if isinstance(spec.norm, RoundedSoftmax):
        want = plain
    limits = [limit for limit, _ in module._limits([*inputs, SEED], dout, dlse) if limit is not None]
    errors, undefined = [], 0
    for x, z, own, limit in zip(found, want, plain, limits, strict=True):
        error = torch.where(own.isfinite() & z.isfinite(), (x - z).abs(), 0.0).max().item()
        errors.append(error / limit.item() if error else 0.0)
        undefined += int((x.isnan() != own.isnan()).sum())
    return {"errors": errors, "undefined": undefined}


def kept_by(kernel: Kernel, seed: int, sq: int, sk: int, start: int) -> torch.Tensor:
    """Return which of the weights of keys ``start .. start + 31`` a forward kernel keeps, bool."""
    q, k = torch.zeros(2, 4, sq, 32), torch.zeros(2, 2, sk, 32)
    v = torch.zeros(2, 2, sk, 32)
    v[:, :, start : start + 32] = torch.eye(32)[: sk - start]
    out, _ = load(kernel).attend(q, k, v, torch.tensor([seed]))
    return out[..., : sk - start] > 0


def masks() -> bool:
    """Say whether kernels of two tile sizes keep just the weights that plain torch does."""
    same = True
    for rate, *calls in (
        (0.1, (-(2**63) + 5, 20, 40, 0), (3, 9, 79, 50)),
        (0.75, (2**31 + 1, 37, 75, 32)),
    ):
        spec = parse(KEPT.format(rate))
        for seed, sq, sk, start in calls:
            want = keep(torch.tensor([seed]), rate, (2, 4, sq, sk))[..., start : start + 32]
            for at, config in enumerate((Config(16, 64, 1, 1), Config(32, 16, 1, 1))):
                kernel = emit(spec, name=f"kept{at}", configs={"interpreter": config})
                same &= torch.equal(kept_by(kernel, seed, sq, sk, start), want)
    return same


def main(names: list[str]) -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    shares = {name: parse(text) for name, text in backward.SHARES.items()}
    corpus = {name: dropping(spec) for name, spec in {**interpret.corpus(), **shares}.items()}
    for name, spec in corpus.items():
        if name not in names:
            continue
        kinds = [kind for kind in ("forward", "backward") if can_run(spec, kind) is None]
        for kind in kinds:
            result = interpret.self_test(emit(spec, name=f"{name}_{kind}", kind=kind))
            print(json.dumps({"run": f"self-test {name} {kind}", **result}), flush=True)
        for dtype, (sq, sk) in list(LENGTHS.items())[: 1 if "short" in names else None]:
            typed, sq = interpret.cast(spec, dtype), sk if name == "packed" else sq
            for kind in kinds:
                result = forward(typed, sq, sk) if kind == "forward" else backwards(typed, sq, sk)
                print(json.dumps({"run": f"{name} {kind} {dtype}", **result}), flush=True)
    if "masks" in names:
        print(json.dumps({"run": "masks", "same": masks()}), flush=True)
    for at, (kind, old, new) in enumerate(BREAKS if "broken" in names else ()):
        found = interpret.notices(emit(corpus["causal"], name="broken", kind=kind), at, old, new)
        print(json.dumps({"run": f"broken {kind}: {old} -> {new}", "noticed": found}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
