"""Compute what varies between files of kind ``tangent``: the holes of ``templates/tangent.py.j2``.

A tile has, beside the score ``s``, its tangent ``ts`` in natural units; each step moves both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnc.codegen.triton import holes, tiles
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.heads import Part, head_parts
from attnc.codegen.triton.inputs import Input, find, name_inputs
from attnc.codegen.triton.pointwise import TILE, Term
from attnc.codegen.triton.slopes import assign, gradients, is_steep
from attnc.codegen.triton.steps import WEIGHED, kernel_steps, times
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Gain,
    Normalized,
    Operand,
    Pointwise,
    Scale,
    Softcap,
    Step,
)
from attnc.masks import Full
from attnc.pointwise import SCORE

MAIN = ("q", "k", "v", "tq", "tk", "tv")
_FLOAT_ROLES = ("bias", "gain", "side", "sink")
_AXES = {"q": "bhmd", "k": "bhnd", "v": "bhnd", "tq": "bhmd", "tk": "bhnd", "tv": "bhnd"}


def fill_holes(spec: AttentionSpec, configs: dict[str, Config]) -> dict[str, Any]:
    """Return the value of every named hole, for a canonical spec."""
    view = tiles.bounded(spec.mask)
    frame = holes.fill_holes(spec, configs, view=view)
    inputs = name_inputs(spec)
    moves = tangent_inputs(inputs)
    found = moved_steps(spec.scores, inputs, base2=not isinstance(spec.norm, WEIGHED))
    weigh, steep = _weigh(spec)
    return {
        **frame,
        "start": [*frame["start"], *_start(spec, inputs)],
        **_parts(spec),
        **_arguments(spec, inputs, moves, view),
        **_visits(spec, inputs, moves, view),
        "steps": found.lines,
        "moves": found.moves,
        "weigh_moves": weigh,
        "steep": found.is_steep or steep,
        "move_is_steep": found.is_steep,
        "stops": spec.fill.how == "replace",
        "settled": f"l * m{_added(spec)} < {spec.norm.least!r}"
        if isinstance(spec.norm, Normalized) and spec.norm.least > -math.inf
        else "",
    }


def tangent_inputs(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """Return the uses of the tangents of captured float tensors: named ``t_..``, and read as these are."""
    return tuple(
        replace(x, name=f"t_{x.name}", tensor=f"t_{x.tensor}") for x in inputs if x.role in _FLOAT_ROLES
    )


def takes_tangent(spec: AttentionSpec, operand: Operand) -> bool:
    """Say whether the kernel of a spec takes the tangent of a captured tensor: a float one that is read."""
    return any(x.operand == operand for x in name_inputs(spec) if x.role in _FLOAT_ROLES)


def _start(spec: AttentionSpec, inputs: tuple[Input, ...]) -> list[str]:
    """Return the lines that start the sums of what moves; the sink's logit is the first weight."""
    _, v_parts = head_parts(spec)
    lines = [f"tacc{x.tag} = tl.zeros([BLOCK_M, {x.size}], tl.float32)" for x in v_parts]
    if isinstance(spec.norm, Elementwise):
        return lines
    lines.append("dl = tl.zeros([BLOCK_M], tl.float32)")
    sink = next((x for x in inputs if x.role == "sink"), None)
    return lines + ([f"if t_{sink.name} is not None:", f"    dl += l * t_{sink.name}"] if sink else [])


def _added(spec: AttentionSpec) -> str:
    assert isinstance(spec.norm, Normalized)
    return f" + {spec.norm.added!r}" if spec.norm.added else ""


@dataclass(frozen=True, slots=True)
class Moved:
    """The steps of a spec on a tile: ``lines`` on ``s``, which keep what ``moves`` on ``ts`` need.

    ``is_steep`` says that ``moves`` call ``_times``.
    """

    lines: tuple[str, ...]
    moves: tuple[str, ...]
    is_steep: bool


def moved_steps(steps: Sequence[Step], inputs: tuple[Input, ...], *, base2: bool) -> Moved:
    """Return the lines for ``steps``; what a captured tensor without a tangent would add is skipped."""
    kept: dict[int, float] = {}
    lines = kernel_steps(steps, inputs, base2=base2, kept=kept)
    moves: list[str] = []
    factor = 1.0  # by which ts is yet to be multiplied
    for at, step in enumerate(steps):
        if isinstance(step, Scale):
            factor *= step.factor
        elif isinstance(step, Softcap):
            moves.append(f"ts = ts * (1.0 - t{at} * t{at})  # {step}")
        elif isinstance(step, Bias):
            x = find(inputs, step.operand, "bhqk")
            moves += _flush(moves, factor) if factor == 0.0 else []
            factor = factor or 1.0
            moves += _given(x, f"ts += {times(f't_{x.name}', step.sign / factor)}")
        elif isinstance(step, Gain):
            x = find(inputs, step.operand, "bhqk")
            moves += _flush(moves, factor) if factor == 0.0 else []
            factor = factor or 1.0
            moves.append(f"ts = ts * {x.name}")
            moves += _given(x, f"ts += {times(f's{at} * t_{x.name}', kept[at] / factor)}")
        else:
            moves += _flush(moves, factor)
            factor = 1.0
            moves += _through(step, at, inputs)
    moves += _flush(moves, factor)
    text = "\n".join(moves)
    needed = [x for x in lines if not re.fullmatch(r"[st]\d+ = s", x) or re.search(rf"\b{x[:-4]}\b", text)]
    return Moved(tuple(needed), tuple(moves), "_times(" in text)


def _flush(moves: list[str], factor: float) -> list[str]:
    return [f"ts = {times('ts', factor)}"] if factor != 1.0 else []


def _through(step: Pointwise, at: int, inputs: tuple[Input, ...]) -> list[str]:
    """Return the lines that take ``ts`` through an expression whose score was ``s<at>``."""
    operands = [find(inputs, n, "bhqk") for n in step.operands]
    named = {**TILE, **{x.operand.name: x.name for x in operands}, SCORE: f"s{at}"}
    steep = is_steep(step.term)

    def along(target: str, tangent: str, name: str) -> list[str]:
        found: Term = gradients(step.term, tangent).get(name, 0.0)
        if found == 0.0:
            return [f"{target} = tl.zeros_like(ts)"]
        return assign([(target, found)], named, {}, steep)

    lines = [f"# along {step}", *along("ts", "ts", SCORE)]
    for x in operands:
        if not x.is_bool:
            own = along("more", f"t_{x.name}", x.operand.name)
            lines += _given(x, *own, "ts += more")
    return lines


def _given(x: Input, *body: str) -> list[str]:
    """Return lines that run if the tangent of a captured tensor is given; they find it loaded."""
    name = f"t_{x.name}"
    if not x.per_tile:
        return [f"if {name} is not None:", *(f"    {line}" for line in body)]
    (moved,) = tangent_inputs((x,))
    load = [
        f"{name}_tile = {moved.where()}",
        "if MASKED:",
        f"    {name} = {moved.load(masked=True)}",
        "else:",
        f"    {name} = {moved.load(masked=False)}",
    ]
    return [f"if {name}_at is not None:", *(f"    {line}" for line in (*load, *body))]


def _weigh(spec: AttentionSpec) -> tuple[list[str], bool]:
    """Return the lines that give ``tp``, the tangent of a weight ``p`` that is a function of its score."""
    if not isinstance(spec.norm, WEIGHED):
        return [], False
    term = Pointwise(spec.norm.expr).term
    found = gradients(term, "ts").get(SCORE, 0.0)
    if found == 0.0:
        return ["tp = tl.zeros_like(p)"], False
    steep = is_steep(term) or (spec.fill.value == -math.inf and not isinstance(spec.mask, Full))
    return assign([("tp", found)], {}, {term: "p"}, steep), steep


def _parts(spec: AttentionSpec) -> dict[str, Any]:
    """Return the tiles over the head sizes, of tensors and of their tangents."""
    k, v = head_parts(spec)
    inside, rows = "inside[:, None]", "(rows < sq)[:, None]"

    def of(names: str, found: tuple[Part, ...], letter: str, bound: str) -> list[dict[str, Any]]:
        return [holes.tile_of(x, name, letter, bound) for name in names.split() for x in found]

    return {
        "q_parts": of("q tq", k, "d", rows),
        "kv_parts": of("k tk", k, "d", inside) + of("v tv", v, "e", inside),
        "out_parts": of("out", v, "e", rows),
        "taccs": holes.part_names("tacc", v),
    }


def _row(names: Sequence[str]) -> str:
    return ", ".join(names) + ","


def _arguments(
    spec: AttentionSpec, inputs: tuple[Input, ...], moves: tuple[Input, ...], view: tiles.View
) -> dict[str, Any]:
    """Return the parameters and arguments of the kernel, and of its launcher."""
    results = ["out", "lse", "tout", "tlse"]
    bounds = [view.reach.name] if view.reach else []
    passed = [[*MAIN], [x.name for x in inputs], [x.name for x in moves], bounds, results]
    strides = [[s for x in some for s in x.strides()] for some in (inputs, moves)]
    moved = [
        f"_strides({x.name}, {', '.join(str(x.layout.index(a)) for a in x.axes)})" for x in moves if x.axes
    ]
    tensors = [o.name for o in spec.captured]
    tangents = [f"t_{o.name}" for o in spec.captured if takes_tangent(spec, o)]
    lines = [
        *passed,
        [f"*{x}.stride()" for x in MAIN],
        *(list(x.stride_values()) for x in inputs),
        [f"*{x}" for x in moved],
    ]
    return {
        "kernel_params": [
            *(_row([f"{x}_ptr" for x in some]) for some in passed if some),
            *(_row([f"{x}_{a}" for a in _AXES[x]]) for x in MAIN),
            *(_row(some) for some in strides if some),
        ],
        "launch_args": [_row(x) for x in lines if x],
        "moved_inputs": [holes.input_holes(x) for x in moves],
        "moved_tensors": [f"t{x}" for x in "qkv"] + tangents,
        "moved_places": [0, 1, 2, *(3 + i for i, n in enumerate(tensors) if f"t_{n}" in tangents)],
    }


def _visits(
    spec: AttentionSpec, inputs: tuple[Input, ...], moves: tuple[Input, ...], view: tiles.View
) -> dict[str, Any]:
    """Return the loops over keys, and what a tile is given."""
    k, v = head_parts(spec)
    sums = [holes.part_names("acc", v), holes.part_names("tacc", v)]
    state = ", ".join(sums if isinstance(spec.norm, Elementwise) else [*sums, "l, dl, m"])
    queries = ", ".join(holes.part_names(x, k) for x in ("q", "tq"))
    keys = [
        f"{', '.join(f'{name}{x.tag}_at' for x in found)}, {name}_n, {name}_d"
        for name, found in (("k", k), ("tk", k), ("v", v), ("tv", v))
    ]
    extra = [[t for x in some if x.role != "sink" for t in holes.tile_terms(x)] for some in (inputs, moves)]
    extra.append(list(holes.places(spec)))
    given = [f"{state}, {queries}, first, n,", _row(keys), *(_row(some) for some in extra if some), "sq, sk,"]

    def call(needs_mask: bool) -> list[str]:
        last = f"MASKED={needs_mask}, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,"
        return [f"{state} = _tile(", *(f"    {line}" for line in [*given, last]), ")"]

    return {
        "state": state,
        "tile_params": [
            *given,
            "MASKED: tl.constexpr, UPCAST: tl.constexpr,",
            "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,",
        ],
        "loops": tiles.loops(spec.mask, holes.visited(spec), call, view),
        "restart": tiles.loop(
            "0", "tl.where(again, sk, 0)", call(True), "tl.range({}, {}, {}, num_stages=1)"
        ),
        "tile": "tiles - 1 - tl.program_id(0) % tiles"
        if tiles.grows(spec.mask, view)
        else "tl.program_id(0) % tiles",
        "masked": not isinstance(spec.mask, Full),
    }
