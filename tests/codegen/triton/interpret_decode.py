"""Run emitted decode kernels in Triton's interpreter, in a process of its own; print one JSON line per run.

``python interpret_decode.py quick|all|paged NAME ..`` takes entries of the corpus: each is run by the
self-test in its file, and with few queries against keys of several lengths, cut into several numbers of
shares, against the spec executed in fp64 (see interpret.py).  ``broken`` for a name stands for files that are
broken on purpose, which the self-test has to notice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import numpy
import torch
from interpret import cast, compare, corpus, in_child, self_test

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
SEQUENCES, ROOM = (0, 5, 97), 112
"""Keys of each sequence in pages, and the most that its row of the table has room for."""
PAGED = (
    (torch.float32, 1, 16, None),
    (torch.float32, 3, 7, 3),
    (torch.float16, 3, 16, 2),
    (torch.float16, 1, 7, None),
)
"""Dtype, Sq, page size, and the number of shares."""
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
    ("sloped_cache", "head = h.to(tl.int32)[:, None]", "head = (h - h % 2).to(tl.int32)[:, None]"),
    ("sigmoid_cache", "acc += tl.sum(share, 0)", "acc = tl.sum(share, 0)"),
)
PAGED_BREAKS = (
    ("cache", "cols // PAGE * table_p", "cols // (PAGE + 1) * table_p"),
    ("cache", "cols % PAGE * k_n", "cols % PAGE * v_n + k_n"),
    ("head_biases", "page * v_p", "page * k_p"),
    ("cache", "sk = tl.minimum(tl.load(seqlens_ptr + b *", "sk = tl.minimum(tl.load(seqlens_ptr + 0 *"),
    ("cache", "tl.where(sk == 0, 1.0, l)", "l"),
    ("padded_cache", "row // sq // heads * seqlens_b", "row // sq * seqlens_b"),
)
"""Corpus entry, a piece of its kernels, and what to break it into."""


def decode(spec: AttentionSpec, splits: int | None):
    attend = load(emit(spec, name="decode", kind="decode")).attend
    return lambda spec, q, k, v, captured: attend(q, k, v, *captured, splits=splits)


def in_pages(x: torch.Tensor, size: int, table: torch.Tensor) -> torch.Tensor:
    """Return k or v ``[B, Hkv, ROOM, D]`` in the pages that a table names; all else is NaN."""
    cache = torch.full((int(table.max()) + 2, size, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype)
    for b, length in enumerate(SEQUENCES):
        for at in range(length):
            cache[table[b, at // size], at % size] = x[b, :, at]
    return cache


def decode_paged(spec: AttentionSpec, size: int, splits: int | None):
    attend = load(emit(spec, name="paged", kind="paged")).attend
    table = torch.randperm(len(SEQUENCES) * ROOM // size).view(len(SEQUENCES), -1)
    lengths = torch.tensor(SEQUENCES, dtype=torch.int32)

    def call(spec, q, k, v, captured):
        caches = [in_pages(x, size, table) for x in (k, v)]
        return attend(q, *caches, table, lengths, *captured, splits=splits)

    return call


def one_by_one(spec: AttentionSpec, q, k, v, captured):
    """Execute the spec for each sequence, on the keys that it has."""
    parts = []
    for b, length in enumerate(SEQUENCES):
        own = []
        for o, x in zip(spec.captured, captured, strict=True):
            x = x[b : b + 1] if o.axes[0] == "b" and x.shape[0] > 1 else x
            own.append(x[..., :length] if o.axes[-1] == "k" else x)
        parts.append(spec(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], tuple(own)))
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])


def run_broken(specs: dict[str, AttentionSpec], kind: str) -> None:
    for at, (name, old, new) in enumerate(PAGED_BREAKS if kind == "paged" else BREAKS):
        kernel = emit(specs[name], name=name, kind=kind)
        assert old in kernel.source, f"{name} has no {old!r} to break"
        head, start, check = kernel.source.partition("\ndef _expect(")
        broken = dataclasses.replace(
            kernel, source=head.replace(old, new) + start + check, key=f"{kind}_broken{at}"
        )
        code = in_child(lambda file=broken: self_test(file)["code"])
        print(json.dumps({"run": f"broken {name}: {old} -> {new}", "code": code}), flush=True)


def main() -> None:
    numpy.seterr(all="ignore")
    torch.set_num_threads(1)
    specs = {**corpus(), **corpus("caches.txt")}
    mode, names = sys.argv[1], sys.argv[2:]
    runs, kind = {"quick": QUICK, "all": ALL, "paged": PAGED}[mode], "paged" if mode == "paged" else "decode"
    for group in GROUPS if "cache" in names and kind == "decode" else ():
        spec = dataclasses.replace(specs["cache"], group_size=group)
        result = compare(spec, 3, 40, decode(spec, 2), batch=2)
        print(json.dumps({"run": f"cache torch.float16 group {group}", **result}), flush=True)
    for name in names:
        if name == "broken":
            run_broken(specs, kind)
            continue
        kernel = emit(specs[name], name=name, kind=kind)
        print(json.dumps({"run": f"self-test {name}", **self_test(kernel)}), flush=True)
        for dtype, sq, sk, splits in runs:
            if name == "packed":
                sq = sk = min(sk, 40)
            spec = cast(specs[name], dtype)
            if kind == "paged":
                result = compare(spec, sq, ROOM, decode_paged(spec, sk, splits), len(SEQUENCES), one_by_one)
            else:
                result = compare(spec, sq, sk, decode(spec, splits), batch=2)
            print(json.dumps({"run": f"{name} {dtype} {sq} {sk} {splits}", **result}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
