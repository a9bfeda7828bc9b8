"""Attention and its derivative along tangents of its inputs, in one pass: forward mode.

Source: Terminal Velocity Matching (arXiv:2511.19797).
"""

from __future__ import annotations

from collections.abc import Iterator

from attnc.codegen.triton.configs import MOST_MOVED, choose_tangent
from attnc.codegen.triton.holes import argument_types
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.kinds.kind import Kind, Program, Types
from attnc.codegen.triton.tangents import fill_holes, tangent_inputs
from attnc.ir import AttentionSpec, Elementwise, Miss, Normalized, RoundedSoftmax, SignedSoftmax, Softmax


def _obstacles(spec: AttentionSpec, node: str) -> Iterator[Miss]:
    wide = max(d for d in (spec.q.shape[3], spec.v.shape[3], 0) if isinstance(d, int))
    if wide > MOST_MOVED:
        why = f"triton: expected head sizes of 1 to {MOST_MOVED} in forward mode, found {wide}"
        yield Miss("triton-head-size", node, why)


def _types(spec: AttentionSpec) -> Types:
    types, ones = argument_types(spec)
    for name in ("q", "k", "v"):
        mine = {n: t for n, t in types.items() if n.startswith(f"{name}_")}
        types |= {f"t{n}": t for n, t in mine.items()}
        ones[f"t{name}_d"] = 1
    types |= {"tout_ptr": types["out_ptr"], "tlse_ptr": "*fp32"}
    for x in tangent_inputs(name_inputs(spec)):
        own = x.name.removeprefix("t_")
        types[f"{x.name}_ptr"] = types[f"{own}_ptr"]
        types |= dict.fromkeys(x.strides(), "i32")
    return types, ones


def _more(spec: AttentionSpec) -> tuple[Program, ...]:
    """Return the way to compile it where captured tensors have no tangents, as a rule."""
    absent = {f"{x.name}_ptr": None for x in tangent_inputs(name_inputs(spec))}
    return (Program(constants={"UPCAST": False, **absent}, variant="still"),) if absent else ()


KIND = Kind(
    "tangent",
    "tangent.py.j2",
    choose_tangent,
    fill_holes,
    _obstacles,
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    types=_types,
    more=_more,
)
