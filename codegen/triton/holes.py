"""Compute what varies between emitted files: the text in each named hole of the templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnc.codegen.triton import tiles
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.draws import draw_holes, seed_line, seed_sample, seeds
from attnc.codegen.triton.formulas import positions
from attnc.codegen.triton.heads import Part, head_parts
from attnc.codegen.triton.inputs import Input, atoms, name_inputs
from attnc.codegen.triton.layout import DENSE, Layout
from attnc.codegen.triton.pointwise import kernel_lines, reads_positions, torch_lines
from attnc.codegen.triton.reach import reach, reach_holes
from attnc.codegen.triton.steps import (
    LEAST,
    LOG2E,
    WEIGHED,
    fill_text,
    kernel_steps,
    overflows,
    own_functions,
    reference_fill,
    reference_steps,
    wide_biases,
)
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Fill,
    Normalized,
    Pointwise,
    RoundedSoftmax,
    SignedSoftmax,
)
from attnc.masks import Formula, Full
from attnc.pointwise import names

CASES = ((1, 1, 1, 1), (2, 2, 33, 17), (1, 2, 17, 65), (2, 1, 65, 65), (1, 2, 300, 300), (2, 2, 129, 513))
"""Batch, key/value heads, Sq and Sk of the self-test; the interpreter runs the first four."""
REACHES = ("reach", "reach_k")
"""Bounds by ids of the keys that a tile of queries sees, and the other way about."""
TURNS = ("all_heads", "section")
"""What a kernel is told whose programs take tiles in turns."""
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.bool: "u8"}
_TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.float64: "fp64"}
_AXES = {"b": "B", "h": "H", "q": "Sq", "k": "Sk"}
_ROLES = {
    "bias": "added to the scores",
    "gain": "multiplies the scores",
    "side": "in an expression over the scores",
    "flag": "bool, in an expression over the scores",
    "valid": "bool, tokens that count",
    "seen": "bool, pairs that count",
    "ids": "integers that the mask compares",
    "sink": "one logit per head, in the denominator only",
}


def fill_holes(
    spec: AttentionSpec,
    configs: dict[str, Config],
    *,
    descriptors: bool = False,
    layout: Layout = DENSE,
    view: tiles.View = tiles.KEYS,
) -> dict[str, Any]:
    """Return the value of every named hole of the frame and of the forward kernel, for a canonical spec.

    ``descriptors`` says that the kernel has a second way to load keys and values, by tensor descriptors,
    ``layout`` how its arguments are laid out, ``view`` how a tile of queries looks at keys.
    """
    inputs = name_inputs(spec)
    return {
        "spec": str(spec),
        "dtype": str(spec.q.dtype).removeprefix("torch."),
        "v_dtype": str(spec.v.dtype).removeprefix("torch."),
        "group": spec.group_size,
        "kv_head": f"h // {spec.group_size}" if spec.group_size > 1 else "h",
        "configs": [(arch, str(config)) for arch, config in configs.items()],
        "layout": layout,
        "lists": False,  # whether only listed pairs count
        "given": "",  # what a call gives beside the spec's tensors
        "height": "sk",  # how many rows of keys and values a descriptor reads
        **_check_holes(),
        **_head_holes(spec),
        **_input_holes(spec, inputs, layout, view),
        **_score_holes(spec, inputs),
        **_loop_holes(spec, inputs, descriptors, view),
        **reach_holes(view.reach, inputs),
        **_weight_holes(spec, inputs),
        **draw_holes(spec),
    }


def _check_holes() -> dict[str, Any]:
    """Return how the self-test draws its inputs, starts the kernel, and names what it compares with."""
    sampled = ["inputs = _sample(case, device)", "q, v = inputs[0], inputs[2]"]
    return {"sampled": sampled, "launched": "launch(*inputs, out, lse)", "dense": "reference"}


def part_names(name: str, found: tuple[Part, ...]) -> str:
    """Return the names of what each part has of its own: ``acc`` or ``acc0, acc1``."""
    return ", ".join(f"{name}{x.tag}" for x in found)


def _head_holes(spec: AttentionSpec) -> dict[str, Any]:
    """Return head sizes and their parts: names, and bounds where a part is wider than what it holds."""
    k_parts, v_parts = head_parts(spec)
    return {
        "dqk": spec.q.shape[3],
        "dv": spec.v.shape[3],
        "k_parts": k_parts,
        "v_parts": v_parts,
        "q_parts": [tile_of(x, "q", "d", "(rows < sq)[:, None]") for x in k_parts],
        "kv_parts": [
            *(tile_of(x, "k", "d", "inside[:, None]") for x in k_parts),
            *(tile_of(x, "v", "e", "inside[:, None]") for x in v_parts),
        ],
        "out_parts": [tile_of(x, "out", "e", "(rows < sq)[:, None]") for x in v_parts],
        "accs": part_names("acc", v_parts),
        # the default would be tf32, off by 3e-4
        "precision": ', input_precision="ieee"' if spec.q.dtype == torch.float32 else "",
    }


def tile_of(part: Part, name: str, letter: str, rows: str) -> dict[str, Any]:
    """Return the name of a part's tile, and the masks of a load or store: with its rows, and without."""
    bound = part.bound(letter)
    return {
        "tag": part.tag,
        "size": part.size,
        "used": part.used,
        "base": part.base,
        "of": name,
        "letter": letter,
        "name": f"{name}{part.tag}",
        "masked": f"{rows} & {bound}[None, :]" if bound else rows,
        "full": f", mask={bound}[None, :], other=0.0" if bound else "",
    }


def _input_holes(
    spec: AttentionSpec, inputs: tuple[Input, ...], layout: Layout, view: tiles.View
) -> dict[str, Any]:
    """Return parameters, arguments, and samples for the self-test."""
    tensors = [o.name for o in spec.captured]  # canonical names are those of the launcher
    strides = [s for x in inputs for s in x.strides()]
    names = ["q", "k", "v", *tensors, *seeds(spec)]
    bounds = [view.reach.name] if view.reach else []
    passed = ["q", "k", "v", *(x.name for x in inputs), *bounds, *seeds(spec), "out", "lse"]
    parameters: list[Sequence[str]] = [
        [f"{x}_ptr" for x in passed],
        [f"{x}_ptr" for x in layout.lists],
        *layout.strides(),
        strides,
        layout.list_strides(),
    ]
    arguments: list[Sequence[str]] = [
        passed,
        list(layout.lists),
        [f"*{x}.stride()" for x in layout.axes],
        *(x.stride_values() for x in inputs),
        layout.list_stride_values(),
    ]
    square = any(x.tensor != x.name for x in inputs)  # a tensor over tokens, read for queries and for keys
    return {
        "cases": [(b, h, max(sq, sk), max(sq, sk)) if square else (b, h, sq, sk) for b, h, sq, sk in CASES],
        "kernel_params": [_row(x) for x in parameters if x],
        "launch_args": [_row(x) for x in arguments if x],
        "signature": ", ".join(names),
        "arguments": ", ".join(names),
        "tensors": [*({"line": _describe(x)} for x in inputs), *([seed_line()] if spec.dropout else [])],
        "inputs": [input_holes(x) for x in inputs],
        "samples": [
            *(_sample(next((x for x in inputs if x.tensor == t), None)) for t in tensors),
            *([seed_sample()] if spec.dropout else []),
        ],
        "blanks": [line for at, t in enumerate(tensors) for line in _blank(spec, inputs, t, at + 3)],
    }


def _row(names: Sequence[str]) -> str:
    return ", ".join(names) + ","


def _describe(x: Input) -> str:
    layout = (
        "[H]" if x.layout == "h" else f"[{', '.join(_AXES[a] if a in x.axes else '1' for a in x.layout)}]"
    )
    return f"{x.tensor} {layout}: {_ROLES[x.role]}."


def input_holes(x: Input) -> dict[str, Any]:
    """Return what templates read of an input: its name, addresses and loads."""
    keys: dict[str, Any] = {
        "name": x.name,
        "per_tile": x.per_tile,
        "tensor": x.tensor,
        "base": x.base(),
        "target": x.target(),
        "is_bool": x.is_bool,
    }
    keys["where"] = x.where()
    return {**keys, "masked": x.load(masked=True), "full": x.load(masked=False)}


def _sample(x: Input | None) -> str:
    if x is None:
        return "torch.zeros(1)"
    shape = x.target()
    if x.is_bool:
        return f"torch.rand{shape} < 0.7".replace("(", "(", 1).replace(")", ", generator=g)", 1)
    dtype = str(x.operand.dtype)
    if x.is_integer:
        return f"torch.randint(0, 3, {shape}, generator=g).sort(-1)[0].to({dtype})"
    draw = f"torch.randn{shape}".replace(",)", ")").removesuffix(")") + ", generator=g)"
    return f"{draw}.to({dtype})" if x.role != "gain" else f"(1 + 0.3 * {draw}).to({dtype})"


def _blank(spec: AttentionSpec, inputs: tuple[Input, ...], tensor: str, at: int) -> list[str]:
    """Return the line that makes a sample hide whole rows: a mask, or a bias that stands for one."""
    x = next((x for x in inputs if x.tensor == tensor), None)
    if x is not None and x.is_bool:
        return [f"tensors[{at}][..., :1, :] = False"]
    subtracted = x is not None and any(isinstance(s, Bias) and s.sign < 0 for s in spec.scores)
    if x is None or x.role != "bias" or "q" not in x.axes or subtracted:
        return []
    least = f"torch.finfo({x.operand.dtype}).min"
    return [f"tensors[{at}][..., :1, :] = {least}", f'tensors[{at}][..., 1:2, :] = float("-inf")']


def _score_holes(spec: AttentionSpec, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Return the score steps, and the loads that they need in each tile or once."""
    scoring = [x for x in inputs if x.role in ("bias", "gain", "side", "flag")]
    return {
        **own_functions(spec),
        "exact_tanh": spec.q.dtype == torch.float32,
        "two_log2e": repr(2 * LOG2E),
        "steps": kernel_steps(spec.scores, inputs, base2=not isinstance(spec.norm, WEIGHED)),
        "step_loads": [input_holes(x) for x in scoring if x.per_tile],
        "early_loads": [input_holes(x) for x in inputs if not x.per_tile and x.role != "sink"],
        "reference_steps": reference_steps(spec.scores, inputs),
        "positions": any(isinstance(s, Pointwise) and reads_positions(s) for s in spec.scores)
        or bool(spec.dropout),
        "places": places(spec),
    }


def places(spec: AttentionSpec) -> dict[str, str]:
    """Return which of batch entry and head are read in a tile: the name there, and in a program."""
    read = {n for s in spec.scores if isinstance(s, Pointwise) for n in names(s.term)}
    for atom in atoms(spec.mask):
        if isinstance(atom, Formula):
            read |= set(positions(atom.value))
    read |= set("bh" if spec.dropout else "")
    return {x: n for n, x in (("b", "batch"), ("h", "head")) if n in read}


def _loop_holes(
    spec: AttentionSpec, inputs: tuple[Input, ...], descriptors: bool, view: tiles.View
) -> dict[str, Any]:
    """Return the mask, the loops over keys, and what a tile is given."""
    masked = not isinstance(spec.mask, Full)
    k_parts, v_parts = head_parts(spec)
    accs, queries = part_names("acc", v_parts), part_names("q", k_parts)
    state = f"{accs}, l, m" if not isinstance(spec.norm, Elementwise) else accs
    keys, values = (
        ", ".join(f"{t}{x.tag}_at" for x in found) for t, found in (("k", k_parts), ("v", v_parts))
    )
    given = [f"{state}, {queries}, first, n,", f"{keys}, k_n, k_d, {values}, v_n, v_d,"]
    extra = [t for x in inputs if x.role != "sink" for t in tile_terms(x)]
    extra += [*places(spec), *seeds(spec)]
    given += [_row(extra)] if extra else []
    given.append("sq, sk,")

    loads, ways = ("DESCRIPTORS=DESCRIPTORS, ", "DESCRIPTORS: tl.constexpr, ") if descriptors else ("", "")

    def call(needs_mask: bool) -> list[str]:
        last = f"MASKED={needs_mask}, {loads}UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,"
        return [f"{state} = _tile(", *(f"    {line}" for line in [*given, last]), ")"]

    exponential, fill = not isinstance(spec.norm, WEIGHED), visited(spec)
    floor = tiles.floor(spec.mask, fill, view) if masked and exponential else None
    return {
        "branches": True,  # a tile is computed with the mask or without it
        "descriptors": descriptors,
        "state": state,
        "tile_params": [
            *given,
            f"MASKED: tl.constexpr, {ways}UPCAST: tl.constexpr,",
            "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,",
        ],
        "keep": tiles.keep(spec.mask, inputs) if masked else "",
        "fill": fill_text(spec.fill, base2=exponential),
        "mask_loads": [input_holes(x) for x in inputs if x.role in ("valid", "seen", "ids") and x.per_tile],
        "unmasked_tile": call(False),
        "masked_tile": call(True),
        "loops": tiles.loops(spec.mask, fill, call, view),
        "floor": "" if floor is None else repr(floor),
        "restart": tiles.loop(
            "0", "tl.where(again, sk, 0)", call(True), "tl.range({}, {}, {}, num_stages=1)"
        ),
        "grows": tiles.grows(spec.mask, view),
        "turns": TURNS,
        "reference_keep": tiles.reference_keep(spec.mask, inputs) if masked else "",
        "reference_fill": reference_fill(spec.fill),
    }


def tile_terms(x: Input) -> list[str]:
    """Return what a tile is told of an input: its address and strides, or its value."""
    if not x.per_tile:
        return [x.name]
    return [f"{x.name}_at", *(f"{x.name}_{a}" for a in x.axes if a in "qk")]


def visited(spec: AttentionSpec) -> Fill:
    """Return the fill by which tiles are skipped: without exponentials, what a hidden score weighs decides.

    To a signed softmax a low fill is a large magnitude.
    """
    if isinstance(spec.norm, SignedSoftmax):
        return Fill() if spec.fill.value == -math.inf else Fill(0.0)
    if not isinstance(spec.norm, WEIGHED):
        return spec.fill
    settles = spec.fill.how == "replace" or spec.fill.value == -math.inf
    return Fill() if settles and spec.norm.weight(spec.fill.value) == 0.0 else Fill(0.0)


def _weight_holes(spec: AttentionSpec, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Return how scores become weights: by a running softmax, or each by a function of its own."""
    if not isinstance(spec.norm, WEIGHED):
        signed, rounded = (isinstance(spec.norm, x) for x in (SignedSoftmax, RoundedSoftmax))
        flags = {"signed": signed, "rounded": rounded, "shares": False}
        return {"weigh": [], **flags, **_softmax_holes(spec, inputs)}
    step = Pointwise(spec.norm.expr)
    lines = kernel_lines(step, {})[1:]
    return {
        "weigh": [*lines[:-1], f"p = {lines[-1].removeprefix('s = ')}"],
        "weigh_as": spec.norm.expr,
        "reference_weigh": torch_lines(step, {}),
        **dict.fromkeys(("signed", "rounded", "safe", "base2", "extreme", "sink", "shares"), False),
        "start": _empty_sums(spec),
        **(_share_holes(spec, spec.norm) if isinstance(spec.norm, Normalized) else {}),
    }


def _share_holes(spec: AttentionSpec, norm: Normalized) -> dict[str, Any]:
    """Return how weights are summed, and what they are divided by in the end."""
    added = f" + {norm.added!r}" if norm.added else ""
    bounded, least = norm.least != -math.inf, norm.least
    none = [f"{x} = tl.zeros([BLOCK_M], tl.float32)" for x in "ml"]
    return {
        "shares": True,
        "start": [*none, *_empty_sums(spec)],
        "whole": f"tl.maximum(l * m{added}, {least!r})" if bounded else f"l * m{added}",
        "reference_whole": f"(s.sum(-1, keepdim=True){added}).clamp(min={least!r})"
        if bounded
        else f"s.sum(-1, keepdim=True){added}",
    }


def _empty_sums(spec: AttentionSpec) -> list[str]:
    """Return the lines that start the sums of weighted values."""
    _, v_parts = head_parts(spec)
    return [f"acc{x.tag} = tl.zeros([BLOCK_M, {x.size}], tl.float32)" for x in v_parts]


def _softmax_holes(spec: AttentionSpec, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Return where the running softmax starts (from the sink, if there is one) and how it ends."""
    sink = spec.norm.sink
    start = ['m = tl.full([BLOCK_M], float("-inf"), tl.float32)', "l = tl.zeros([BLOCK_M], tl.float32)"]
    reference = ""
    if isinstance(sink, str):
        name = next(x.name for x in inputs if x.role == "sink")
        start = [
            f"m = tl.zeros([BLOCK_M], tl.float32) + tl.load({name}_at).to(tl.float32) * {LOG2E!r}",
            'l = tl.where(m == float("-inf"), 0.0, 1.0)',
        ]
        reference = f"{name}.to(work).view(1, -1, 1)"
    elif sink is not None and sink != -math.inf:
        start = [
            f"m = tl.full([BLOCK_M], {sink * LOG2E!r}, tl.float32)",
            "l = tl.full([BLOCK_M], 1.0, tl.float32)",
        ]
        reference = f"torch.full_like(lse[:1, :1, :1], {sink!r})"
    return {
        "start": [*start, *_empty_sums(spec)],
        "sink": reference,
        "safe": spec.norm.safe and sink is None,
        "base2": wide_biases(spec, inputs),
        "extreme": wide_biases(spec, inputs) or (not isinstance(spec.mask, Full) and overflows(spec.fill)),
        "least": repr(LEAST),
        "log2e": repr(LOG2E),
        "ln2": repr(math.log(2)),
    }


def argument_types(spec: AttentionSpec, layout: Layout = DENSE) -> tuple[dict[str, str], dict[str, int]]:
    """Return triton's type of each run-time argument, and the strides that are 1 in a packed tensor."""
    inputs = name_inputs(spec)
    main = _TYPES[spec.q.dtype]
    types = {f"{t}_ptr": f"*{main}" for t in ("q", "k", "out")} | {"lse_ptr": "*fp32"}
    types |= {"v_ptr": f"*{_TYPES[spec.v.dtype]}"}
    types |= {f"{x.name}_ptr": f"*{_TYPES[x.operand.dtype]}" for x in inputs}
    types |= {f"{name}_ptr": "*i32" for name in layout.lists}
    types |= {f"{name}_ptr": "*i64" for name in seeds(spec)}
    if reach(spec.mask, "") is not None:
        types |= {f"{name}_ptr": "*i32" for name in REACHES}
    strides = [*layout.strides(), *(x.strides() for x in inputs)]
    ones = {x[-1]: 1 for x in strides if x}
    numbers = [s for x in strides for s in x if s not in ones]
    return types | dict.fromkeys((*numbers, *layout.list_strides(), *layout.sizes, *TURNS), "i32"), ones
