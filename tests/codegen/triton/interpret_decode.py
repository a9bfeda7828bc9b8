"""Run emitted decode kernels in Triton's interpreter, in a process of its own; print one JSON line per run.

``python interpret_decode.py quick|all NAME ..`` takes entries of the corpus: each is run by the self-test in
its file, and with few queries against keys of several lengths, cut into several numbers of shares, against
the spec executed in fp64 (see interpret.py).  ``broken`` for a name stands for files that are broken on
purpose, which the self-test has to notice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import numpy
import torch
from interpret import cast, compare, corpus, self_test

from attnc.codegen.triton import emit
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec

QUICK = (
    (torch.float32, 1, 17, 1),
    (torch.float32, 3, 129, 5),
    (torch.float32, 1, 300, None),
    (torch.float16, 3, 2, 2),
    (torch.float16, 1, 129, 3),
)
"""Dtype, Sq, Sk and the number of shares (None: the launcher's choice)."""
ALL = tuple(itertools.product((torch.float32, torch.float16), (1, 3), (17, 129, 300), (None, 1, 2, 7)))
GROUPS = (1, 2, 8)
BREAKS = (
    ("cache", "(sk - sq)", "(sk - sq - 1)"),
    ("cache", "begin = tl.minimum(split * share, tiles)", "begin = 0"),
    ("cache", "tl.cdiv(tiles, splits)", "tiles // splits"),
    (
        "cache",
        "range(begin, tl.minimum(begin + share, tiles))",
        "range(begin, tl.minimum(begin + share, tiles) - 1)",
    ),
    ("cache", "h = kv * 2 + row // sq", "h = kv * 2"),
    ("cache", "rows = row % sq", "rows = row // 2"),
    ("cache", "row * splits + split", "row + split"),
    ("cache", "inside = cols < sk", "inside = cols < sk + 1"),
    ("cache", "tl.sum(share_l * weight, 0)", "tl.sum(share_l, 0)"),
    ("cache", "acc = acc * shrink + tl.sum(share", "acc = acc + tl.sum(share"),
    ("window_of_a_cache", "lo_1 + (t - early)", "lo_1 + t"),
    ("capped_sinks", "row // sq % heads", "row % heads"),
    ("head_biases", "h * bias0_h", "kv * bias0_h"),
    ("head_biases", "tl.cast(rows, tl.int64) * bias0_q", "0 * bias0_q"),
    ("padded_cache", "h = kv * 4", "h = kv * 2"),
    ("sigmoid_cache", "acc += tl.sum(share, 0)", "acc = tl.sum(share, 0)"),
)
"""Corpus entry, a piece of its kernels, and what to break it into."""


def decode(spec: AttentionSpec, splits: int | None):
    attend = load(emit(spec, name="decode", kind="decode")).attend
    return lambda spec, q, k, v, captured: attend(q, k, v, *captured, splits=splits)


def run_broken(specs: dict[str, AttentionSpec]) -> None:
    for at, (name, old, new) in enumerate(BREAKS):
        kernel = emit(specs[name], name=name, kind="decode")
        assert old in kernel.source, f"{name} has no {old!r} to break"
        head, _, check = kernel.source.partition("\ndef reference(")
        source = f"{head.replace(old, new)}\ndef reference({check}"
        broken = dataclasses.replace(kernel, source=source, key=f"broken{at}")
        print(json.dumps({"run": f"broken {name}: {old} -> {new}", **self_test(broken)}), flush=True)


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    specs = {**corpus(), **corpus("caches.txt")}
    runs, names = {"quick": QUICK, "all": ALL}[sys.argv[1]], sys.argv[2:]
    for group in GROUPS if "cache" in names else ():
        spec = dataclasses.replace(specs["cache"], group_size=group)
        result = compare(spec, 3, 40, decode(spec, 2), batch=2)
        print(json.dumps({"run": f"cache torch.float16 group {group}", **result}), flush=True)
    for name in names:
        if name == "broken":
            run_broken(specs)
            continue
        kernel = emit(specs[name], name=name, kind="decode")
        print(json.dumps({"run": f"self-test {name}", **self_test(kernel)}), flush=True)
        for dtype, sq, sk, splits in runs:
            if name == "packed":
                sq = sk = min(sk, 40)
            spec = cast(specs[name], dtype)
            result = compare(spec, sq, sk, decode(spec, splits), batch=2)
            print(json.dumps({"run": f"{name} {dtype} {sq} {sk} {splits}", **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
