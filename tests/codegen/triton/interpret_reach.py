"""Run kernels that compare ids under Triton's interpreter; print whether they visit other documents.

What lies in other documents is NaN, and a pair that is visited gives NaN, hidden or not.  Then the bounds are
broken on purpose, and the self-test has to notice.
"""

from __future__ import annotations

import json

import interpret  # sets TRITON_INTERPRET, so it comes before anything that imports triton
import torch

from attnc.codegen.triton import emit
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.store import load
from attnc.printer import parse

SMALL = {"interpreter": Config(16, 16, 1, 1)}
"""Tiles that the documents of a self-test hold whole."""
DOCUMENT, COUNT = 32, 5
SPEC = (
    "attn q=bhqd[b,2,s,16]:float32 k=bhkd[b,2,t,16]:float32 v=bhke[b,2,t,16]:float32 group=1 scale(0.25)"
    " mask={} fill(replace,-inf) softmax with ids=bk[b,t]:int64"
)
MASKS = ("document(ids)", "(causal & document(ids))")
BREAKS = (
    ("forward", "see_lo = tl.load", "see_lo = 16 + tl.load"),
    ("forward", "see_hi = tl.load", "see_hi = -16 + tl.load"),
    ("forward", "same_hi = tl.load", "same_hi = 16 + tl.load"),
    ("forward", "bounds * step", "bounds * 2 * step"),
    ("backward", "reach_k = _reach(ids0, ids1", "reach_k = _reach(ids0.flip(1), ids1"),
    ("backward", "reach = _reach(ids1, ids0", "reach = _reach(ids1, ids0.flip(1)"),
    ("backward", "see_hi = tl.load(reach_k_ptr", "see_hi = -32 + tl.load(reach_k_ptr"),
    ("tangent", "see_hi = tl.load", "see_hi = -32 + tl.load"),
)


def strays(mask: str) -> dict[str, object]:
    """Return how many numbers of one document, aligned to tiles, change where all others hold NaN."""
    spec = parse(SPEC.format(mask))
    forward, backward = (load(emit(spec, kind=x, configs=SMALL)) for x in ("forward", "backward"))
    g = torch.Generator().manual_seed(0)
    n = DOCUMENT * COUNT
    q, k, v, dout = (torch.randn(1, 2, n, 16, generator=g) for _ in range(4))
    ids = (torch.arange(n) // DOCUMENT)[None]
    out, lse = forward.attend(q, k, v, ids)
    grads = backward.backward(q, k, v, ids, out, lse, dout)[:3]
    changed = {"out": 0, "dq": 0, "dk": 0, "dv": 0}
    for at in range(COUNT):
        own = (ids == at)[:, None, :, None]
        alone = [x.where(own, torch.nan) for x in (q, k, v, dout)]
        found = [
            forward.attend(q, *alone[1:3], ids)[0],
            *backward.backward(*alone[:3], ids, out, lse, alone[3]),
        ]
        for name, x, y in zip(changed, found, (out, *grads), strict=False):
            changed[name] += int((own & (x != y)).sum())
    return changed


def main() -> None:
    torch.set_num_threads(1)
    for mask in MASKS:
        print(json.dumps({"run": f"strays {mask}", **strays(mask)}), flush=True)
    for kind in ("forward", "backward", "tangent"):
        for mask in MASKS:
            found = interpret.self_test(emit(parse(SPEC.format(mask)), kind=kind, configs=SMALL))
            print(json.dumps({"run": f"self-test {kind} {mask}", **found}), flush=True)
    for at, (kind, old, new) in enumerate(BREAKS):
        kernel = emit(parse(SPEC.format(MASKS[0])), kind=kind, configs=SMALL)
        noticed = interpret.notices(kernel, at, old, new)
        print(json.dumps({"run": f"broken {kind}: {old} -> {new}", "noticed": noticed}), flush=True)


if __name__ == "__main__":
    main()
