"""Few queries against a cache in pages: each sequence names its pages in a row of a table.

The queries are the last positions of a sequence as far as the spec says so (``causal(end)``); keys count
from the sequence's start.  How long a sequence is, only the device knows: the size of the table bounds the
grid, and each sequence's own tiles are divided among the shares.
Source: PagedAttention (arXiv:2309.06180), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.holes import fill_holes
from attnc.codegen.triton.inputs import Input, name_inputs
from attnc.codegen.triton.kinds.decode import KIND as DECODE
from attnc.codegen.triton.kinds.decode import Cache, choose_decode, decode_types, row_holes
from attnc.codegen.triton.kinds.kind import Kind, Program, Types
from attnc.ir import AttentionSpec, Miss

CASES = ((1, 1, 1, 16), (2, 2, 1, 21), (3, 1, 3, 144), (2, 1, 3, 600), (2, 2, 1, 4096), (3, 2, 16, 1001))
"""Batch, key/value heads, Sq and room for keys of the self-test; the interpreter runs the first four."""
PAGE_SIZES = (16, 7, 16, 30, 64, 7)
"""Keys per page in each case."""
PAGES = Cache(
    names=("k_cache", "v_cache"),
    axes="pnhd",
    length="capacity",
    tensors=(("table", "block_table", "bp"), ("seqlens", "seqlens", "b")),
    locals=("k_p", "v_p", "table_at", "table_p"),
    constants=(("PAGE", "page"),),
    end=(
        "sk = tl.load(seqlens_ptr + row // sq // heads * seqlens_b)",
        "total = tl.where(sk == 0, 1.0, {})  # a sequence without keys gets zeros",
    ),
)


def choose_paged(spec: AttentionSpec) -> dict[str, Config]:
    """Return the tiles of decode, with as many more stages for the table, on which the loads of keys wait."""
    return {arch: replace(c, stages=2 * c.stages - 1) for arch, c in choose_decode(spec).items()}


def fill_paged(spec: AttentionSpec, configs: dict[str, Config]) -> dict[str, Any]:
    """Return the value of every named hole of the frame and of the paged kernels, for a canonical spec."""
    holes = fill_holes(spec, configs)
    captured = [o.name for o in spec.captured]
    uses = {x.tensor: x for x in name_inputs(spec)}
    return {
        **holes,
        **row_holes(spec, holes, PAGES),
        "lengths": [
            "sk = tl.minimum(tl.load(seqlens_ptr + b * seqlens_b), capacity)",
            "table_at = table_ptr + b * table_b",
        ],
        "key_rows": [
            "page = tl.load(table_at + cols // PAGE * table_p, mask=inside, other=0).to(tl.int64)",
            *(f"{t}_rows = page * {t}_p + cols % PAGE * {t}_n" for t in "kv"),
        ],
        "k_base": "k_ptr + kv * k_h",
        "v_base": "v_ptr + kv * v_h",
        "cases": list(CASES),
        "page_sizes": PAGE_SIZES,
        "sampled": ["inputs = _paged_sample(case, device)", "q, v = inputs[0], inputs[2].nan_to_num(0.0)"],
        "launched": "launch(*inputs, out, lse, splits=(None, 1, 3, 20)[case % 4])",
        "dense": "_dense",
        "cuts": [_cut(uses[n]) if n in uses else n for n in captured],
    }


def _cut(x: Input) -> str:
    """Return the part of a captured tensor that belongs to sequence b, as text."""
    parts = [part for axis, part in (("b", "b : b + 1"), ("k", "..., :length")) if axis in x.axes]
    return f"{x.name}[{', '.join(parts)}]" if parts else x.name


def obstacles(spec: AttentionSpec, node: str) -> Iterator[Miss]:
    """Yield what stands against pages: a tensor over tokens cannot be as long as the queries and the keys."""
    for x in name_inputs(spec):
        if x.tensor != x.name:
            found = f"found {x.operand.name} in two"
            why = f"triton: expected each captured tensor in one role where keys lie in pages, {found}"
            yield Miss("triton-captured", node, why)


def paged_types(spec: AttentionSpec) -> Types:
    """Return triton's type of each run-time argument of both kernels, and the strides that are 1."""
    types, ones = decode_types(spec)
    strides = ("k_p", "v_p", "table_b", "seqlens_b")
    more = {"table_ptr": "*i32", "seqlens_ptr": "*i32", **dict.fromkeys((*strides, "capacity"), "i32")}
    return {**types, **more}, {**ones, "table_p": 1}


KIND = Kind(
    "paged",
    "paged.py.j2",
    choose_paged,
    fill_paged,
    obstacles,
    programs=(Program(constants={"UPCAST": False, "PAGE": 16}), Program("combine", constants={})),
    norms=DECODE.norms,
    places="qkh",  # the reference takes each sequence by itself, and so as the first
    types=paged_types,
)
