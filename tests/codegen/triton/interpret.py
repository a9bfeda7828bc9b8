"""Run emitted kernels under Triton's interpreter, in a process of its own; print one JSON line per run.

TRITON_INTERPRET has to be set before triton is imported, and a test session may have imported it already.
Each spec of the corpus is run twice: by the self-test in the emitted file, and through
``attnc.codegen.triton.run`` against the spec executed in fp64, in fp32 and in fp16. Then some files are
broken on purpose, and the self-test has to notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy
import torch

from attnc.codegen.triton import emit, run
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec, Kernel, RoundedSoftmax
from attnc.printer import parse

RAISED = 3
"""The exit code of a child process that ended with an exception."""
LENGTHS = {torch.float32: ((1, 1), (63, 17), (65, 65), (129, 129)), torch.float16: ((17, 63), (65, 65))}
BREAKS = (
    ("causal", "        keep = ki <= qi", "        keep = ki < qi"),
    ("causal", "first + 1", "last + 1"),
    ("causal", "h // 2 * k_h", "h // 4 * k_h"),
    ("left_padded", "tl.where(again, sk, 0)", "tl.where(again, sk - BLOCK_N, 0)"),
    ("plain", "mask=(rows < sq)[:, None])", "mask=(rows < sq + 1)[:, None])"),
    ("mask_as_bias", "x < -2.3586574916681825e+38", "x < -3.5e+38"),
    ("plain", "mask=rows < sq)", "mask=rows < sq - 1)"),
    ("plain", "inside = cols < sk", "inside = cols < sk + 1"),
)
"""Corpus entry, a piece of its kernel, and what to break it into."""


Result = tuple[torch.Tensor, torch.Tensor]
"""An output and its log-sum-exp."""


def corpus(file: str = "corpus.txt") -> dict[str, AttentionSpec]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {n: parse(s) for n, _, s in (line.partition(" ") for line in lines if not line.startswith("#"))}


def cast(spec: AttentionSpec, dtype: torch.dtype) -> AttentionSpec:
    q, k, v = (dataclasses.replace(o, dtype=dtype) for o in (spec.q, spec.k, spec.v))
    return dataclasses.replace(spec, q=q, k=k, v=v)


def draw(spec: AttentionSpec, b: int, hkv: int, sq: int, sk: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(sq * 1000 + sk)
    sizes = {"b": b, "h": hkv * spec.group_size, "hkv": hkv, "s": sq, "t": sk}
    out = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        shape = [sizes[d] if isinstance(d, str) else d for d in o.shape]
        x = (
            torch.rand(shape, generator=g) < 0.6
            if o.dtype == torch.bool
            else torch.randn(shape, generator=g).to(o.dtype)
        )
        if o.dtype == torch.bool:
            x[..., : sk // 4] = False  # padding on the left: with a causal mask the first queries see nothing
        if o.name == "attention_mask":
            x = torch.where(x > 0.5, torch.finfo(o.dtype).min, 0.0)
            x[..., :1, :] = torch.finfo(o.dtype).min  # every key is hidden: a spread over all of them
        out.append(x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() == 4 else x)
    return out


def executed(spec: AttentionSpec, q, k, v, captured) -> Result:
    return spec(q, k, v, tuple(captured))


def compare(
    spec: AttentionSpec,
    sq: int,
    sk: int,
    call: Callable[..., Result] = run,
    batch: int = 1,
    oracle: Callable[..., Result] = executed,
) -> dict[str, object]:
    """Return the error of ``call`` against the oracle in fp64, as a share of its limit."""
    q, k, v, *captured = draw(spec, batch, 1 if sq > 64 else 2, sq, sk)
    found = call(spec, q, k, v, captured)
    wide = [x.double() if x.is_floating_point() else x for x in captured]
    want = oracle(spec, q.double(), k.double(), v.double(), wide)
    return errors(spec, v, found, want, oracle(spec, q, k, v, captured))


def errors(
    spec: AttentionSpec, v: torch.Tensor, found: Result, exact: Result, spelled: Result
) -> dict[str, object]:
    """Return how far a result is from the exact one, as a share of its limit; ``spelled`` is plain torch's.

    The limit is twice what plain torch in working precision is off, plus two rounding units of the largest
    value: one for the weights, which the kernel rounds to the dtype, one for the output.
    """
    (out, lse), (want, want_lse), (own, own_lse) = found, exact, spelled
    usual = want_lse.abs() < 1e6
    eps, unit = torch.finfo(v.dtype).eps, torch.finfo(torch.float32).eps
    limit = 2 * worst(own - want, usual) + 2 * eps * v.abs().max()
    lse_limit = 2 * worst(own_lse - want_lse, usual) + 4 * unit * (1 + want_lse.abs().where(usual, 0.0).max())
    strange = ~usual
    mass = (
        v.shape[2] if isinstance(spec.norm, RoundedSoftmax) else 1
    )  # the most that a strange row's weights sum to
    return {
        "out": (worst(out - want, usual) / limit).item(),
        "lse": (worst(lse - want_lse, usual) / lse_limit).item(),
        # rows that see nothing: NaN, zero or a spread over all keys, as the spec in working precision has it
        "strange": bool(
            torch.isclose(out, own, rtol=4 * eps, atol=4 * eps * mass, equal_nan=True)[strange].all()
        ),
        "strange_lse": bool(
            torch.isclose(lse, own_lse, rtol=4 * unit, atol=0, equal_nan=True)[strange].all()
        ),
        "hidden_rows": int(strange.sum()),
    }


def worst(error: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    rows = rows if error.dim() == rows.dim() else rows[..., None]
    return torch.where(rows, error.double(), 0.0).abs().max()


def self_test(kernel: Kernel) -> dict[str, object]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = load(kernel).main()
    return {"code": code, "text": text.getvalue()}


def broken_file(kernel: Kernel, at: int, old: str, new: str) -> Kernel:
    """Return a kernel with a piece of its file replaced; ``at`` tells broken files apart."""
    assert old in kernel.source, f"{kernel.name} has no {old!r} to break"
    return dataclasses.replace(kernel, source=kernel.source.replace(old, new), key=f"broken{at}")


def notices(kernel: Kernel, at: int, old: str, new: str) -> bool:
    """Say whether some small case of the self-test fails, or crashes, once the file is broken."""
    check = load(broken_file(kernel, at, old, new))._check
    return in_child(lambda: not all(check(case, torch.device("cpu"))[1] for case in (1, 2, 3))) != 0


def in_child(act: Callable[[], int]) -> int:
    """Return what ``act`` does, as the exit code of a process of its own, which a wrong address may crash."""
    child = os.fork()
    if child == 0:
        code = RAISED
        try:
            code = int(act())
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != RAISED, "a child process raised, see above"
    return code


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    specs = corpus()
    for name, spec in specs.items():
        print(json.dumps({"run": f"self-test {name}", **self_test(emit(spec, name=name))}), flush=True)
        for dtype, lengths in LENGTHS.items():
            for sq, sk in lengths:
                if name == "packed" and sq != sk:
                    continue
                result = compare(cast(spec, dtype), sq, sk)
                print(json.dumps({"run": f"{name} {dtype} {sq} {sk}", **result}), flush=True)
    for at, (name, old, new) in enumerate(BREAKS):
        broken = broken_file(emit(specs[name], name=name), at, old, new)
        print(json.dumps({"run": f"broken {name}: {old} -> {new}", **self_test(broken)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
