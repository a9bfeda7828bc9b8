"""Packed sequences of any lengths: every query against the keys of its own sequence.

The spec is that of one padded batch; its positions and lengths are those of each sequence.  Source:
forms/dense_variants, section 3.5 of the project's design notes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from attnc.codegen.triton.configs import TMA, descriptor_arches
from attnc.codegen.triton.configs import choose as choose_for
from attnc.codegen.triton.holes import argument_types, fill_holes
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.kinds.kind import Configs, Kind, Program, Types
from attnc.codegen.triton.layout import PACKED
from attnc.codegen.triton.tiles import grows
from attnc.ir import AttentionSpec, Elementwise, Normalized, RoundedSoftmax, SignedSoftmax, Softmax

Lengths = tuple[tuple[int, ...], tuple[int, ...]]
LENGTHS: tuple[Lengths, ...] = (
    ((1,), (1,)),
    ((33, 0, 5), (17, 9, 0)),
    ((17, 1), (65, 64)),
    ((65, 33), (40, 65)),
    ((300, 129, 0, 77), (300, 513, 20, 0)),
    ((64, 1, 1, 200, 128), (64, 1000, 1, 129, 128)),
)
"""Queries and keys of each sequence, for each case of the self-test; the interpreter runs the first four."""
HEADS = (1, 2, 2, 1, 2, 2)
"""Key/value heads of each case."""
_POINTERS = {"UPCAST": False, "DESCRIPTORS": False}

choose = partial(choose_for, lookup=True)
"""The default tiles."""


def packed_holes(spec: AttentionSpec) -> dict[str, Any]:
    """Return what a call over packed sequences gives, and how a self-test draws them."""
    inputs = name_inputs(spec)
    square = any(x.tensor != x.name for x in inputs)  # a tensor over tokens, read for queries and for keys
    lengths = [(q, q) if square else (q, k) for q, k in LENGTHS]
    layouts = {x.operand.name: x.layout for x in inputs}
    return {
        "padded": any(set(x.axes) & set("qk") for x in inputs),
        "given": ", cu_q, cu_k, max_q, max_k",
        "lengths": lengths,
        "cases": [(len(q), h, max(q), max(k)) for (q, k), h in zip(lengths, HEADS, strict=True)],
        "captured_axes": tuple(layouts.get(o.name, "") for o in spec.captured),
    }


def _fill(spec: AttentionSpec, configs: Configs) -> dict[str, Any]:
    pointers = choose(spec, descriptors=False)
    return {
        **fill_holes(spec, configs, descriptors=True, layout=PACKED),
        **packed_holes(spec),
        "pointer_configs": [(arch, str(pointers[arch])) for arch in TMA],
        "descriptor_arches": descriptor_arches(spec),
        "grows": False,  # a program takes one tile
        "tile": f"{'tiles - 1 - ' if grows(spec.mask) else ''}tl.program_id(0) % tiles",
        "height": "tl.maximum(sk, 1)",  # a descriptor of nothing would not be one
    }


def _types(spec: AttentionSpec) -> Types:
    return argument_types(spec, PACKED)


KIND = Kind(
    "varlen",
    "varlen.py.j2",
    choose,
    _fill,
    programs=(
        Program(constants=_POINTERS, targets=("sm_80", "gfx942")),
        Program(constants={**_POINTERS, "DESCRIPTORS": True}, targets=TMA, variant="descriptors"),
        Program(configs="POINTERS", constants=_POINTERS, targets=TMA, variant="pointers"),
    ),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    types=_types,
)
