"""Few queries against a long cache: the keys are cut into shares, and a second kernel adds these up.

One program takes, as the rows of its tile, all queries of the heads that share a key/value head, so that keys
and values are read once, and one share of the keys.  It leaves what its running softmax ends with, ``(acc, l,
m)`` in fp32.  The shares are added by a kernel of their own, also where there is only one: that is a few
kilobytes per row beside the whole cache.
Source: Flash-Decoding (pytorch.org/blog/flash-decoding, 2023).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from attnc.codegen.triton import tiles
from attnc.codegen.triton.configs import SHARED_LIMIT, Config, head_sizes
from attnc.codegen.triton.heads import head_parts
from attnc.codegen.triton.holes import argument_types, fill_holes, part_names, visited
from attnc.codegen.triton.inputs import Input, name_inputs
from attnc.codegen.triton.kinds.kind import Kind, Program, Types
from attnc.codegen.triton.steps import LOG2E, WEIGHED
from attnc.ir import AttentionSpec, Elementwise, Fill, Normalized, RoundedSoftmax, SignedSoftmax, Softmax
from attnc.masks import Full

CASES = ((1, 1, 1, 1), (2, 2, 1, 17), (1, 2, 3, 129), (2, 1, 3, 600), (2, 2, 1, 4099), (1, 4, 16, 1000))
"""Batch, key/value heads, Sq and Sk of the self-test; the interpreter runs the first four."""
LEAST_TILES = 4
"""Tiles of keys per share that the launcher aims at, at least: fewer do not pay for starting a program."""
TOGETHER = 16
"""Shares that are added up at a time."""
TILE_BYTES = 2**15
"""Bytes of keys and values in a tile of 128 keys, above which it has 64."""


@dataclass(frozen=True, slots=True)
class Cache:
    """How keys and values lie in memory, as the emitted file has it.

    ``names`` are the launcher's for k and v, ``axes`` theirs in order (n: one key), ``length`` the launcher's
    size for the keys.  ``tensors`` are further arguments: the kernel's name, the launcher's, and axes.
    ``locals`` are what a tile is told beside, ``constants`` what is known at compile time: the kernel's name
    and the launcher's.  ``end`` are lines before a row is divided by ``{}``, its sum.
    """

    names: tuple[str, str] = ("k", "v")
    axes: str = "bhnd"
    length: str = "sk"
    tensors: tuple[tuple[str, str, str], ...] = ()
    locals: tuple[str, ...] = ()
    constants: tuple[tuple[str, str], ...] = ()
    end: tuple[str, ...] = ()


CONTIGUOUS = Cache()


def choose_decode(spec: AttentionSpec) -> dict[str, Config]:
    """Return one config per architecture for this spec, and the interpreter's.

    They compile without spills (``attnc.codegen.triton.aot``); speed was not measured.  64 rows are what one
    instruction of Hopper's and Blackwell's tensor cores takes at least; with fewer rows in a call, the
    launcher takes smaller tiles, down to 16.
    """
    return {**{arch: _fit(spec, arch) for arch in SHARED_LIMIT}, "interpreter": Config(16, 32, 1, 1)}


def _fit(spec: AttentionSpec, arch: str) -> Config:
    """Drop the third stage, then halve the keys per tile, then drop the second, until the estimate fits."""
    config = _pick(spec, arch)
    while decode_bytes(spec, config) > SHARED_LIMIT[arch] and config.stages > 1:
        if config.stages > 2 or config.block_n == 16:
            config = replace(config, stages=config.stages - 1)
        else:
            config = replace(config, block_n=config.block_n // 2)
    return config


def _pick(spec: AttentionSpec, arch: str) -> Config:
    sizes, item = head_sizes(spec), spec.q.dtype.itemsize
    on_amd = arch.startswith("gfx")
    if item == 4:  # exact fp32 products do not run on tensor cores
        return Config(16, 32, 4 if on_amd or max(sizes) <= 96 else 8, 2)
    if max(sizes) > 256:
        return Config(32, 32, 4 if on_amd else 8, 3)
    rows = 64 if arch in ("sm_90", "sm_100") else 32
    if arch in ("sm_80", "sm_86") and len(head_parts(spec)[0]) > 1:
        rows = 16  # two tiles of queries leave fewer registers
    if max(sizes) > 128:
        pairs = any(x.per_tile and "q" in x.axes for x in name_inputs(spec))  # no room for a third stage then
        return Config(rows, 64, 4 if on_amd else 8, 2 if pairs and rows == 64 else 3)
    small = 128 * sum(sizes) * item <= TILE_BYTES and not any(x.per_tile for x in name_inputs(spec))
    return Config(rows, 128 if small else 64, 4, 3)


def decode_bytes(spec: AttentionSpec, config: Config) -> int:
    """Estimate shared memory in bytes: tiles of K, V and captured tensors in flight, of Q and of weights."""
    d, e = head_sizes(spec)
    item, tile = spec.q.dtype.itemsize, config.block_m * config.block_n
    captured = sum(tile * x.operand.dtype.itemsize for x in name_inputs(spec) if x.per_tile)
    flight = item * config.block_n * (d + e) + captured
    return max(config.stages - 1, 1) * flight + item * (config.block_m * d + tile)


def fill_decode(spec: AttentionSpec, configs: dict[str, Config]) -> dict[str, Any]:
    """Return the value of every named hole of the frame and of the decode kernels, for a canonical spec."""
    holes, inputs = fill_holes(spec, configs), name_inputs(spec)
    square = any(x.tensor != x.name for x in inputs)  # a tensor over tokens, read for queries and for keys
    return {
        **holes,
        **row_holes(spec, holes),
        "lengths": [],
        "key_rows": [f"{t}_rows = tl.cast(cols, tl.int64) * {t}_n" for t in "kv"],
        "k_base": "k_ptr + b * k_b + kv * k_h",
        "v_base": "v_ptr + b * v_b + kv * v_h",
        "cases": [(b, h, max(q, k), max(q, k)) if square else (b, h, q, k) for b, h, q, k in CASES],
        "launched": "launch(*inputs, out, lse, splits=(None, 1, 3, 20)[case % 4])",
    }


def row_holes(spec: AttentionSpec, holes: dict[str, Any], cache: Cache = CONTIGUOUS) -> dict[str, Any]:
    """Return the holes in which rows of several heads, and shares of the keys, make a difference.

    ``holes`` are the forward's.
    """
    group = spec.group_size
    inputs = name_inputs(spec)
    kernel_inputs = [x for x in inputs if x.role != "sink"]
    named = {x.name: _row_input(x, group) for x in inputs}
    return {
        "rows": f"{group} * sq" if group > 1 else "sq",
        "kv_heads": f"(heads // {group})" if group > 1 else "heads",
        "inputs": [named[x.name] for x in inputs],
        "kernel_inputs": [named[x.name] for x in kernel_inputs],
        "step_loads": [named[x["name"]] for x in holes["step_loads"]],
        "early_loads": [named[x["name"]] for x in holes["early_loads"]],
        "mask_loads": [named[x["name"]] for x in holes["mask_loads"]],
        "out_parts": [_limited(x) for x in holes["out_parts"]],
        "branches": False,
        "start": _start(spec),
        "sums": not isinstance(spec.norm, Elementwise),
        **_call_holes(spec, holes, kernel_inputs, cache),
        **_combine_holes(spec, holes, cache),
    }


def _limited(part: dict[str, Any]) -> dict[str, Any]:
    """Return an output part with the masks of a tile of rows, and of one row."""
    _, _, bound = part["masked"].partition(" & ")
    masked = f"exists[:, None] & {bound}" if bound else "exists[:, None]"
    return {**part, "masked": masked, "limit": f", mask={bound.removesuffix('[None, :]')}" if bound else ""}


def _row_input(x: Input, group: int) -> dict[str, Any]:
    """Return how a captured tensor is read where each row has a query and, in a group, a head of its own."""
    by_row = "q" in x.axes or ("h" in x.axes and group > 1)
    at = {"b": "b", "h": "h", "q": "tl.cast(rows, tl.int64)"}
    terms = [f"{at[a]} * {x.name}_{a}" for a in x.axes if a != "k"]
    where = f"{x.name}_at[:, None]" if by_row else f"{x.name}_at"
    if x.per_tile:
        where = f"{where} + tl.cast(cols, tl.int64)[None, :] * {x.name}_k"
    load = f"tl.load({x.name}_tile, mask=inside[None, :], other=0)" if x.per_tile else f"tl.load({where})"
    value = load if x.is_integer else f"{load} != 0" if x.is_bool else f"{load}.to(tl.float32)"
    return {
        "name": x.name,
        "tensor": x.tensor,
        "target": x.target(),
        "is_bool": x.is_bool,
        "base": " + ".join([f"{x.name}_ptr", *terms]),
        "where": where,
        "masked": value,
        "full": value,
    }


def _start(spec: AttentionSpec) -> list[str]:
    """Return the lines that start a share: a sink enters where the shares are added, once."""
    zeros = [f"acc{x.tag} = tl.zeros([BLOCK_M, {x.size}], tl.float32)" for x in head_parts(spec)[1]]
    if isinstance(spec.norm, Elementwise):
        return zeros
    least = "0.0" if isinstance(spec.norm, Normalized) else 'float("-inf")'
    return [f"m = tl.full([BLOCK_M], {least}, tl.float32)", "l = tl.zeros([BLOCK_M], tl.float32)", *zeros]


def _call_holes(
    spec: AttentionSpec, holes: dict[str, Any], inputs: list[Input], cache: Cache
) -> dict[str, Any]:
    """Return parameters and arguments of the kernel and of a tile, and the loop over a share of the keys."""
    k_parts, v_parts = head_parts(spec)
    state = holes["state"]
    scratch = ["acc"] if isinstance(spec.norm, Elementwise) else ["acc", "l", "m"]
    names = [x.name for x in inputs]
    keys, values = (part_names(t, parts) for t, parts in (("k", k_parts), ("v", v_parts)))
    given = [
        f"{state}, {part_names('q', k_parts)}, rows, n,",
        f"{_at(keys)}, k_n, k_d, {_at(values)}, v_n, v_d,",
        *_lines(list(cache.locals)),
        *_lines([*(t for x in inputs for t in _tile_terms(x)), *holes["places"]]),
        "sq, sk,",
    ]
    constants = ["UPCAST", *(x for x, _ in cache.constants), "BLOCK_N"]
    call = [*given, ", ".join(f"{x}={x}" for x in constants) + ","]
    sizes = ["heads", "sq", cache.length, "splits"]
    signature = ", ".join(["q", *cache.names, *(n for _, n, _ in cache.tensors), *_captured(spec, holes)])
    tables = [x for x, _, _ in cache.tensors]
    return {
        "tile_params": [*given, ", ".join(f"{x}: tl.constexpr" for x in constants) + ","],
        "loops": share_lines(spec, [f"{state} = _tile(", *(f"    {line}" for line in call), ")"]),
        "kernel_params": [
            *_lines([f"{x}_ptr" for x in ("q", "k", "v", *tables, *names, *scratch)]),
            *_lines([f"q_{a}" for a in "bhmd"]),
            *(line for t in "kv" for line in _lines([f"{t}_{a}" for a in cache.axes])),
            *_lines([f"{x}_{a}" for x, _, axes in cache.tensors for a in axes]),
            *_lines([s for x in inputs for s in x.strides()]),
            *_lines(sizes),
            ", ".join(f"{x}: tl.constexpr" for x in [*constants[:-1], "BLOCK_M", "BLOCK_N"]) + ",",
        ],
        "launch_constants": [f"{x}={value}" for x, value in cache.constants],
        "kernel_sizes": ", ".join(f'"{x}"' for x in sizes),
        "launch_args": [
            *_lines(["q", *cache.names, *(n for _, n, _ in cache.tensors), *names, *scratch]),
            ", ".join(f"*{x}.stride()" for x in ("q", *cache.names)) + ",",
            *_lines([f"*{n}.stride()" for _, n, _ in cache.tensors]),
            *(line for x in inputs for line in _lines(list(x.stride_values()))),
            "heads, sq, sk, splits,",
        ],
        "call_signature": signature,
    }


def _captured(spec: AttentionSpec, holes: dict[str, Any]) -> list[str]:
    """Return the launcher's names of the captured tensors."""
    names: list[str] = holes["signature"].split(", ")
    return names[3:]


def _at(names: str) -> str:
    return ", ".join(f"{x}_at" for x in names.split(", "))


def _lines(names: list[str]) -> list[str]:
    """Return a line of arguments, none if there are no names."""
    return [", ".join(names) + ","] if names else []


def _tile_terms(x: Input) -> list[str]:
    """Return what a tile is told of an input: its addresses and the stride of keys, or its value."""
    return [f"{x.name}_at", f"{x.name}_k"] if x.per_tile else [x.name]


def share_lines(spec: AttentionSpec, call: list[str]) -> list[str]:
    """Return the lines that visit the program's share of the keys: an equal number of tiles for each.

    Where a row that saw nothing would spread over hidden keys too, nothing is left out: no program knows
    what the others saw.
    """
    fill = visited(spec)
    exponential = not isinstance(spec.norm, WEIGHED)
    if not isinstance(spec.mask, Full) and exponential and tiles.floor(spec.mask, fill) is not None:
        fill = Fill(0.0)
    bounds, counts = tiles.shares(spec.mask, fill)
    reads = re.findall(r"\b(?:first|last)\b", " ".join(bounds))
    lines = [x for x in ("first = 0", "last = sq - 1") if x.split()[0] in reads]
    if not counts:
        return []
    runs = " and ".join(f"lo{tag} .. hi{tag}" for tag in ("", "_1")[: len(counts)])
    lines += [f"# Some query sees the keys {runs}; every split takes as many of their tiles.", *bounds]
    lines.append(f"tiles = {counts[0]}")
    step = ["n = lo + t * BLOCK_N"]
    if len(counts) > 1:
        lines += ["early = tiles", f"tiles += {counts[1]}"]
        step = ["n = tl.where(t < early, lo + t * BLOCK_N, lo_1 + (t - early) * BLOCK_N)"]
    lines += ["share = tl.cdiv(tiles, splits)", "begin = tl.minimum(split * share, tiles)"]
    loop = "for t in range(begin, tl.minimum(begin + share, tiles)):"
    return [*lines, loop, *(f"    {line}" for line in [*step, *call])]


def _combine_holes(spec: AttentionSpec, holes: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """Return parameters and arguments of the kernel that adds the shares, and where it starts and ends."""
    logits = [x for x in name_inputs(spec) if x.role == "sink"]
    end, over = _end(spec, holes, cache)
    shares = ["acc"] if isinstance(spec.norm, Elementwise) else ["acc", "l", "m"]
    tables = [x for x in cache.tensors if x[0] in " ".join(end)]
    strides = [
        *(f"{x}_{a}" for x, _, axes in tables for a in axes),
        *(s for x in logits for s in x.strides()),
    ]
    passed = [*(f"*{n}.stride()" for _, n, _ in tables), *(s for x in logits for s in x.stride_values())]
    sizes = ["heads", "sq", "splits"] if strides else ["splits"]
    tail = [*(x.name for x in logits), "out", "lse"]
    return {
        "together": TOGETHER,
        "least_tiles": LEAST_TILES,
        "combine_start": _combine_start(spec, logits),
        "combine_end": end,
        "over": over,
        "combine_params": [
            *_lines([f"{x}_ptr" for x in [*(x for x, _, _ in tables), *shares, *tail]]),
            *_lines([*strides, *sizes]),
        ],
        "combine_sizes": ", ".join(f'"{x}"' for x in sizes),
        "combine_args": [*_lines([*(n for _, n, _ in tables), *shares, *tail]), *_lines([*passed, *sizes])],
    }


def _combine_start(spec: AttentionSpec, logits: list[Input]) -> list[str]:
    """Return the lines that start the sums of a row: with its sink, if there is one."""
    if isinstance(spec.norm, Elementwise):
        return []
    if logits:
        x = logits[0].name
        address = f"{x}_ptr + row // sq % heads * {x}_h" if logits[0].axes else f"{x}_ptr"
        return [
            f"m = tl.load({address}).to(tl.float32) * {LOG2E!r}  # the sink",
            'l = tl.where(m == float("-inf"), 0.0, 1.0)',
        ]
    sink = spec.norm.sink
    if isinstance(sink, float) and sink != -math.inf:
        return [f"m = {sink * LOG2E!r}  # the sink", "l = 1.0"]
    return ["m = 0.0" if isinstance(spec.norm, Normalized) else 'm = float("-inf")', "l = 0.0"]


def _end(spec: AttentionSpec, holes: dict[str, Any], cache: Cache) -> tuple[list[str], str]:
    """Return the lines that end a row with its log-sum-exp, and what its sum of values is divided by."""
    if isinstance(spec.norm, Elementwise):
        return ["lse = 0.0"], ""
    lines: list[str] = []
    lse: list[str] = []
    if isinstance(spec.norm, Normalized):
        lines = [f"whole = {holes['whole']}", "lse = tl.log(whole)"]
        lines.append("total = whole / m  # acc is in units of m")
    elif isinstance(spec.norm, RoundedSoftmax):
        natural = f"m * {holes['ln2']}"
        if holes["extreme"]:
            natural = f"tl.where(m < {holes['least']}, m, {natural})"
        lines = [
            f"natural = {natural}",
            "lse = natural + tl.log(l)",
            "total = tl.exp(lse - natural)  # not l where rounding loses it, as in a row of huge scores",
        ]
    else:
        lse = [f"lse = (m + tl.log2(l)) * {holes['ln2']}"]
        if holes["extreme"]:
            far = "-tl.abs(m)" if isinstance(spec.norm, SignedSoftmax) else "m"
            stands = f"lse = tl.where({far} < {holes['least']}, m, lse)"
            lse.append(f"{stands}  # a row of scores that stood for themselves")
    if holes["safe"]:
        lines = ["total = tl.where(l == 0.0, 1.0, l)  # a query that sees no key gets zeros"]
    elif cache.end:
        lines += [line.format("total" if lines else "l") for line in cache.end]
    return [*lines, *lse], " / total" if lines else " / l"


def decode_types(spec: AttentionSpec) -> Types:
    """Return triton's type of each run-time argument of both kernels, and the strides that are 1."""
    types, ones = argument_types(spec)
    return {**types, **{f"{x}_ptr": "*fp32" for x in ("acc", "l", "m")}, "splits": "i32"}, ones


KIND = Kind(
    "decode",
    "decode.py.j2",
    choose_decode,
    fill_decode,
    programs=(Program(), Program("combine", constants={})),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    types=decode_types,
)
