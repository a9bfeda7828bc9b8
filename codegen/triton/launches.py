"""Compute how the kernels of a backward file are called, and where its rows lie, for each layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnc.codegen.triton.inputs import Input
from attnc.codegen.triton.layout import Layout


@dataclass(frozen=True, slots=True)
class Call:
    """The parameters of a kernel and the arguments that the launcher passes, line by line.

    ``sizes`` are those parameters that are lengths or counts.
    """

    params: list[str]
    args: list[str]
    sizes: list[str]


def row(*names: str) -> str:
    """Return a line of parameters or arguments."""
    return ", ".join(names) + ","


def optional(*names: str) -> list[str]:
    """Return a line of parameters or arguments, none if there are none."""
    return [row(*names)] if names else []


def strides(layout: Layout, tensor: str) -> list[str]:
    """Return the names of the strides of a tensor, in elements."""
    return [f"{tensor}_{a}" for a in layout.axes[tensor]]


def call(
    layout: Layout, strided: list[str], plain: list[str], inputs: Sequence[Input], along: str, *counts: str
) -> Call:
    """Return a kernel's parameters and arguments; ``plain`` tensors are contiguous.

    A kernel over packed sequences is told their longest ``along`` the axes q, k, and looks up the rest.
    """
    names = [*strided, *(x.name for x in inputs), *plain, *layout.lists]
    sizes = values = ["sq", "sk"]
    if layout.is_packed:
        most = {"q": ("longest", "sq"), "k": ("wide", "sk")}
        sizes, values = (["tokens", *(most[a][i] for a in along)] for i in range(2))
    return Call(
        params=[
            row(*(f"{n}_ptr" for n in names)),
            *(row(*strides(layout, t)) for t in strided),
            *optional(*(s for x in inputs for s in x.strides())),
            row(*counts, *sizes),
            "UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,",
        ],
        args=[
            row(*names),
            row(*(f"*{t}.stride()" for t in strided)),
            *(row(*x.stride_values()) for x in inputs if x.axes),
            row(*counts, *values),
        ],
        sizes=[*counts, *sizes],
    )


def row_places(layout: Layout) -> dict[str, Any]:
    """Return where rows lie, and how many queries and keys a batch entry or a sequence has at most.

    ``row_of_bh`` and ``row_of_head`` are a head's first row among those that have a number each, and
    ``lookup`` the lines that find a sequence.
    """
    if not layout.is_packed:
        return {
            "packed": False,
            "longest": "sq",
            "wide": "sk",
            "row_of_bh": "bh * sq",
            "row_of_head": "(b * heads + h) * sq",
            "row_keys": "inputs[1].shape[2]",
        }
    return {
        "packed": True,
        "longest": "longest",
        "wide": "wide",
        "row_of_bh": "h * tokens + q_start",
        "row_of_head": "h * tokens + q_start",
        "row_keys": "inputs[-1].diff().clamp(min=1).repeat_interleave(inputs[-2].diff())",
        "lookup": [
            "q_start = tl.load(cu_q_ptr + b).to(tl.int64)",
            "k_start = tl.load(cu_k_ptr + b).to(tl.int64)",
            "sq = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)",
            "sk = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)",
        ],
    }


def seen(layout: Layout, either: list[str]) -> str:
    """Return when a tile of pairs is visited: its sequence is that long, and one of these holds, if any."""
    found = " | ".join(either)
    if not layout.is_packed:
        return found
    return "(first < sq) & (n < sk)" + (f" & ({found})" if found else "")
