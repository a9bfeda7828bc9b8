"""Choose tiles, warps and stages by architecture, head size and dtype; keep them within shared memory.

The table holds the largest tiles that ``attnc.codegen.triton.aot`` found to compile without spills over
causal, padded, windowed and biased kernels, so first use needs no search.  Speed was not measured.  One
exception: fp32 with head sizes above 64 on NVIDIA spills under a run-time mask, because exact fp32
products do not run on tensor cores.  The usual 128x64 tile with 4 warps spills everywhere and is not here.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import torch

from attnc.codegen.triton.heads import head_parts
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.tiles import grows
from attnc.ir import AttentionSpec, Elementwise, Normalized
from attnc.masks import Band, Full

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one block may use."""
TMA = ("sm_90", "sm_100")
"""Where tensor descriptors are copies by hardware."""

CAPABILITIES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
"""The key of the table by compute capability."""

UNKNOWN = "sm_86"
"""The key for any other NVIDIA GPU: the smallest tiles."""


@dataclass(frozen=True, slots=True)
class Config:
    """Queries and keys per tile, warps per program, and stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return str(astuple(self))


INTERPRETER = Config(32, 32, 1, 1)

_HALF = {
    32: {
        "sm_80": Config(128, 64, 4, 3),
        "sm_86": Config(128, 64, 4, 3),
        "sm_90": Config(128, 64, 8, 3),
        "sm_100": Config(128, 64, 8, 3),
        "gfx942": Config(128, 32, 4, 2),
    },
    64: {
        "sm_80": Config(128, 64, 8, 3),
        "sm_86": Config(128, 64, 8, 3),
        "sm_90": Config(128, 64, 8, 3),
        "sm_100": Config(128, 32, 8, 3),
        "gfx942": Config(128, 32, 4, 2),
    },
    128: {
        "sm_80": Config(128, 32, 8, 3),
        "sm_86": Config(128, 32, 8, 2),
        "sm_90": Config(128, 32, 8, 3),
        "sm_100": Config(128, 64, 8, 3),
        "gfx942": Config(64, 32, 4, 2),
    },
    256: {
        "sm_80": Config(64, 32, 8, 2),
        "sm_86": Config(64, 32, 8, 2),
        "sm_90": Config(128, 32, 8, 1),
        "sm_100": Config(64, 64, 8, 2),
        "gfx942": Config(64, 32, 4, 1),
    },
    576: {
        "sm_80": Config(32, 32, 8, 1),
        "sm_86": Config(16, 16, 4, 1),
        "sm_90": Config(64, 32, 8, 1),
        "sm_100": Config(64, 32, 8, 1),
        "gfx942": Config(32, 16, 4, 1),
    },
}
_LIGHT = {
    128: {"sm_80": Config(128, 64, 8, 2), "sm_90": Config(128, 128, 8, 2), "sm_100": Config(128, 128, 8, 2)}
}
"""Without a mask, with nothing else to load or draw and no padded head size there are registers left."""
_TMA = {
    64: Config(128, 128, 8, 3),
    96: Config(128, 64, 8, 3),
    128: Config(128, 64, 8, 3),
    192: Config(128, 64, 8, 2),
    256: Config(64, 64, 8, 2),
}
"""Tensor descriptors need no addresses in registers, on sm_90 and sm_100."""
_TMA_LIGHT = {96: Config(128, 128, 8, 2), 128: Config(128, 128, 8, 2)}
_FLOAT = {
    32: Config(64, 32, 8, 2),
    64: Config(32, 32, 8, 2),
    128: Config(32, 16, 8, 1),
    256: Config(16, 16, 8, 1),
    576: Config(16, 16, 8, 1),
}
_FLOAT_AMD = {
    32: Config(64, 32, 4, 2),
    64: Config(64, 32, 4, 2),
    128: Config(32, 32, 4, 2),
    256: Config(16, 32, 4, 1),
    576: Config(16, 16, 4, 1),
}


def choose(spec: AttentionSpec, *, descriptors: bool = True, lookup: bool = False) -> dict[str, Config]:
    """Return one config per architecture for this spec, and the interpreter's.

    ``descriptors`` says that sm_90 and sm_100 load keys and values by tensor descriptors, ``lookup`` that
    programs look up where their keys are, and do not take tiles in turns.
    """
    wide = max(head_sizes(spec))
    table = {arch: _fit(spec, arch, _pick(spec, arch, wide, descriptors, lookup)) for arch in SHARED_LIMIT}
    return {**table, "interpreter": INTERPRETER}


def descriptor_arches(spec: AttentionSpec) -> tuple[str, ...]:
    """Return where a launcher loads keys and values by tensor descriptors, if these can read them.

    In fp32 it is no gain, and with wide heads it takes more registers than there are: the products, which
    tensor cores do not serve, read tiles that lie as TMA left them.
    """
    wide = spec.q.dtype == torch.float32 and max(head_sizes(spec)) > 64
    return ("interpreter",) if wide else (*TMA, "interpreter")


def head_sizes(spec: AttentionSpec) -> tuple[int, int]:
    """Return the head sizes of keys and of values as tiles have them; they must be numbers."""
    keys, values = head_parts(spec)
    return sum(x.size for x in keys), sum(x.size for x in values)


def _pick(spec: AttentionSpec, arch: str, wide: int, descriptors: bool, lookup: bool) -> Config:
    size = min(n for n in _HALF if n >= wide)
    if spec.q.dtype == torch.float32:
        if arch.startswith("gfx"):
            return _FLOAT_AMD[size]
        halved = size == 32 and (_loads_tiles(spec) or spec.dropout)
        return replace(_FLOAT[size], block_m=_FLOAT[size].block_m // 2) if halved else _FLOAT[size]
    elementwise = isinstance(spec.norm, Elementwise)
    if descriptors and arch in TMA and wide <= max(_TMA) and not elementwise:
        size = min(n for n in _TMA if n >= wide)
        # Programs that take tiles in turns need more registers, which Blackwell has fewer of.
        turns = grows(spec.mask) and not lookup
        light = _is_light(spec) and not (arch == "sm_100" and turns)
        config = (_TMA_LIGHT.get(size) if light else None) or _TMA[size]
        ids = any(x.per_tile and x.is_integer for x in name_inputs(spec))  # two registers each
        return replace(config, block_n=min(config.block_n, 64)) if ids or spec.dropout else config
    light = _is_light(spec) and isinstance(spec.mask, Full) and not lookup
    config = (_LIGHT.get(size, {}).get(arch) if light else None) or _HALF[size][arch]
    if arch == "sm_100" and elementwise:  # 64 keys spill where nothing else is kept
        config = replace(config, block_n=32)
    if arch == "sm_100" and spec.dropout:  # a third stage spills
        config = replace(config, stages=min(config.stages, 2))
    return config


def _is_light(spec: AttentionSpec) -> bool:
    unpadded = head_sizes(spec) == (spec.q.shape[3], spec.v.shape[3])
    loads = any(x.per_tile for x in name_inputs(spec))
    return isinstance(spec.mask, Full | Band) and unpadded and not loads and not spec.dropout


def _loads_tiles(spec: AttentionSpec) -> bool:
    """Say whether a tile loads a value for every pair of query and key, or ids, which take two registers."""
    return any(x.per_tile and ("q" in x.axes or x.is_integer) for x in name_inputs(spec))


def _fit(spec: AttentionSpec, arch: str, config: Config) -> Config:
    """Drop stages, then halve the keys per tile, until the estimate is within the limit."""
    while shared_bytes(spec, arch, config) > SHARED_LIMIT[arch] and config.block_n > 16:
        if config.stages > 1:
            config = replace(config, stages=config.stages - 1)
        else:
            config = replace(config, block_n=config.block_n // 2)
    return config


def shared_bytes(spec: AttentionSpec, arch: str, config: Config) -> int:
    """Estimate shared memory in bytes: tiles of K, V and captured tensors in flight, one of Q or weights."""
    d, e = head_sizes(spec)
    item = spec.q.dtype.itemsize
    tile = config.block_m * config.block_n
    pairs = (x for x in name_inputs(spec) if x.per_tile and "q" in x.axes)
    captured = sum(tile * x.operand.dtype.itemsize for x in pairs)
    flight = item * config.block_n * (d + e) + captured
    if arch.startswith("gfx"):
        return max(config.stages - 1, 1) * flight + item * tile
    return config.stages * flight + item * config.block_m * d


_PAIRS = {
    64: {"sm_80": Config(128, 32, 8, 2), "sm_86": Config(128, 32, 8, 2), "sm_100": Config(128, 32, 8, 3)},
    128: {
        "sm_80": Config(64, 32, 8, 2),
        "sm_86": Config(64, 32, 8, 2),
        "sm_90": Config(128, 32, 8, 2),
        "sm_100": Config(128, 32, 8, 2),
    },
}
"""Of backward programs that hold queries, where a value is loaded for every pair of query and key.

A program per tile of a captured tensor's gradient has them too, which loads four tensors in a turn.
"""
_HELD = {
    32: {
        "sm_80": Config(32, 128, 8, 2),
        "sm_86": Config(32, 128, 8, 2),
        "sm_90": Config(32, 128, 8, 2),
        "sm_100": Config(32, 128, 8, 2),
        "gfx942": Config(32, 64, 4, 2),
    },
    64: {
        "sm_80": Config(32, 128, 8, 2),
        "sm_86": Config(32, 128, 8, 2),
        "sm_90": Config(32, 128, 8, 2),
        "sm_100": Config(64, 64, 8, 2),
        "gfx942": Config(32, 64, 4, 2),
    },
    128: {
        "sm_80": Config(32, 64, 8, 2),
        "sm_86": Config(32, 64, 8, 2),
        "sm_90": Config(32, 64, 8, 2),
        "sm_100": Config(32, 64, 8, 2),
        "gfx942": Config(32, 32, 4, 1),
    },
    256: {
        "sm_80": Config(32, 32, 8, 1),
        "sm_86": Config(32, 32, 8, 1),
        "sm_90": Config(32, 32, 8, 1),
        "sm_100": Config(32, 32, 8, 1),
        "gfx942": Config(16, 32, 8, 1),
    },
    576: {**dict.fromkeys(SHARED_LIMIT, Config(16, 16, 8, 1)), "gfx942": Config(16, 16, 4, 1)},
}
"""Of programs that hold keys: two sums of their own size to carry, and two tensors to load per tile.

None spills in halves with head sizes 64 and 128.  Heads in parts (80) do beside a bias of pairs, and programs
that hold queries do with heads wider than 256, as in the forward.
"""
_HELD_PAIRS = {
    64: {"sm_80": Config(32, 32, 4, 2), "sm_86": Config(32, 32, 4, 2)},
    128: {"sm_90": Config(64, 32, 8, 2), "sm_100": Config(32, 128, 8, 2)},
}
"""Likewise, where a value is loaded for every pair of query and key."""
_HELD_LIGHT = {
    64: {"sm_100": Config(64, 128, 8, 2), "gfx942": Config(32, 128, 4, 2)},
    128: {
        "sm_80": Config(64, 64, 8, 2),
        "sm_86": Config(64, 64, 8, 2),
        "sm_90": Config(32, 128, 8, 2),
        "sm_100": Config(64, 128, 8, 2),
    },
}
"""Likewise, without a mask or causal, with nothing else to load and no padded head size."""
_HELD_FLOAT = {64: Config(16, 16, 4, 1), 128: Config(16, 16, 8, 1), 576: Config(16, 16, 8, 1)}
_HELD_FLOAT_AMD = {64: Config(32, 32, 4, 1), 576: Config(16, 16, 4, 1)}


def choose_backward(spec: AttentionSpec) -> dict[str, Config]:
    """Return one config per architecture for the backward programs that hold queries."""
    table = choose(spec, descriptors=False, lookup=True)
    if spec.q.dtype != torch.float32:
        size = min(n for n in _HELD if n >= max(head_sizes(spec)))
        table |= {"sm_100": Config(128, 64, 8, 3)} if size == 64 else {}
        if size == 256 and len(head_parts(spec)[0]) > 1:
            table |= dict.fromkeys(("sm_80", "sm_86"), Config(32, 32, 8, 2))
        elif size == 256:
            table["sm_90"] = Config(64, 32, 8, 2)
        table |= _PAIRS.get(size, {}) if _loads_tiles(spec) else {}
        if size == 64 and isinstance(spec.norm, Normalized):  # whose slopes and shares take registers
            table["sm_100"] = Config(64 if _loads_tiles(spec) else 128, 32, 8, 3)
    return {arch: _fewer(spec, arch, x) for arch, x in table.items()}


def choose_keys(spec: AttentionSpec, *, lookup: bool = False) -> dict[str, Config]:
    """Return one config per architecture for the backward programs that hold keys.

    ``lookup`` says that they look up where their queries are, which takes registers.
    """
    wide = max(head_sizes(spec))
    if spec.q.dtype == torch.float32:
        nvidia, amd = (t[min(n for n in t if n >= wide)] for t in (_HELD_FLOAT, _HELD_FLOAT_AMD))
        table = {arch: amd if arch.startswith("gfx") else nvidia for arch in SHARED_LIMIT}
    else:
        size = min(n for n in _HELD if n >= wide)
        light = _is_light(spec) and (isinstance(spec.mask, Full) or grows(spec.mask)) and not lookup
        divides = isinstance(spec.norm, Normalized)  # by slopes and shares, which take registers
        more = _HELD_LIGHT if light and not divides else _HELD_PAIRS if _loads_tiles(spec) else {}
        table = {**_HELD[size], **more.get(size, {})}
        if divides and size == 128 and _loads_tiles(spec):
            table |= dict.fromkeys(("sm_80", "sm_86"), Config(32, 32, 8, 2))
        elif divides and size == 128 and lookup:
            table["sm_100"] = Config(64, 32, 8, 2)
    table = {arch: _fewer(spec, arch, x, keys=True) for arch, x in table.items()}
    return {**table, "interpreter": INTERPRETER}


def _fewer(spec: AttentionSpec, arch: str, config: Config, *, keys: bool = False) -> Config:
    """Return tiles that leave registers for the words that dropout draws, in the backward.

    In half precision, which has the largest tiles; looked at for head sizes 64 and 128.
    """
    if not spec.dropout or spec.q.dtype == torch.float32 or arch == "interpreter":
        return config
    narrow = max(head_sizes(spec)) <= 64
    if arch.startswith("gfx"):
        most = Config(64 if narrow else 32, 16, 4, 1) if keys else config
    elif narrow and not keys:
        most = Config(128, 32, 8, 3)
    else:
        most = Config(32, 32, 4, 2) if arch in ("sm_80", "sm_86") and not keys else Config(64, 32, 8, 2)
    return Config(*map(min, astuple(config), astuple(most)))


_TANGENT = {
    64: {
        "sm_80": Config(128, 32, 8, 2),
        "sm_86": Config(128, 32, 8, 2),
        "sm_90": Config(128, 32, 8, 3),
        "sm_100": Config(128, 32, 8, 3),
        "gfx942": Config(128, 32, 4, 2),
    },
    128: {
        "sm_80": Config(64, 32, 8, 1),
        "sm_86": Config(64, 32, 8, 1),
        "sm_90": Config(128, 16, 8, 2),
        "sm_100": Config(128, 32, 8, 2),
        "gfx942": Config(64, 32, 4, 1),
    },
    256: {
        "sm_80": Config(32, 16, 8, 1),
        "sm_86": Config(32, 16, 8, 1),
        "sm_90": Config(16, 16, 8, 1),
        "sm_100": Config(16, 16, 8, 1),
        "gfx942": Config(32, 16, 4, 1),
    },
}
"""Two outputs to carry, and four tensors to load per tile of keys."""
_TANGENT_FLOAT = {64: Config(32, 16, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)}
MOST_MOVED = max(_TANGENT)
"""The largest head size of a kernel that carries an output and its tangent."""


def choose_tangent(spec: AttentionSpec) -> dict[str, Config]:
    """Return one config per architecture for programs that carry an output and its tangent."""
    wide = max(head_sizes(spec))
    if spec.q.dtype == torch.float32:
        table = dict.fromkeys(SHARED_LIMIT, _TANGENT_FLOAT[min(n for n in _TANGENT_FLOAT if n >= wide)])
    else:
        table = _TANGENT[min(n for n in _TANGENT if n >= wide)]
    if _loads_tiles(spec) or any(len(x) > 1 or x[0].used < x[0].size for x in head_parts(spec)):
        table = {arch: replace(x, block_n=max(16, x.block_n // 2)) for arch, x in table.items()}
    return {**table, "interpreter": INTERPRETER}
