"""Dropout in emitted files: the holes by which a tile draws the words of ``attnc.codegen.dropout``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnc.codegen.dropout import BIT, KEY_STEPS, MULTIPLIERS, ROUNDS, WORD, growth, threshold
from attnc.codegen.triton.steps import times
from attnc.ir import AttentionSpec, Miss, SignedSoftmax

SEED = "seed"
"""The launcher's and the kernel's name for the seed: the last of a call's tensors."""
_LINE = "seed [1], int64: the key of the random numbers; the same seed drops the same weights."


def seeds(spec: AttentionSpec) -> list[str]:
    """Return the tensors that a call gives beside the spec's."""
    return [SEED] if spec.dropout else []


def obstacles(spec: AttentionSpec, node: str, kind: str, serves: bool) -> Iterator[Miss]:
    """Yield what stands against the spec's dropout in a kernel of a kind that ``serves`` dropout or not."""
    if spec.dropout and not serves:
        yield Miss(
            "triton-dropout", node, f"triton: expected dropout 0 in {kind} kernels, found {spec.dropout}"
        )
    elif spec.dropout and not (0.0 < spec.dropout < 1.0 and threshold(spec.dropout) <= WORD):
        yield Miss(
            "triton-dropout", node, f"triton: expected dropout above 0 and below 1, found {spec.dropout}"
        )


def draw_holes(spec: AttentionSpec) -> dict[str, Any]:
    """Return the holes of a file whose weights may be dropped.

    ``weighed`` is the name of what a tile weighs values with, ``times_growth`` the factor of what is kept.
    """
    p = "p_sign" if isinstance(spec.norm, SignedSoftmax) else "p"
    if not spec.dropout:
        return {"dropout": 0.0, "weighed": p, "drops": [], "times_growth": "", "seeds": []}
    pairs = "seed, batch, head, rows[:, None], cols[None, :]"
    return {
        "dropout": spec.dropout,
        "weighed": "p_kept",
        "drops": [f"p_kept = {p} * tl.where(_keeps({pairs}), {growth(spec.dropout)!r}, 0.0)"],
        "times_growth": times("", growth(spec.dropout)),
        "seeds": seeds(spec),
        "least_word": f"0x{threshold(spec.dropout):08X}",
        "philox": {
            "rounds": ROUNDS,
            "bit": BIT,
            "multipliers": [f"0x{x:08X}" for x in MULTIPLIERS],
            "key_steps": [f"0x{x:08X}" for x in KEY_STEPS],
            "word": f"0x{WORD:08X}",
        },
    }


def pull_lines(spec: AttentionSpec, lines: list[str]) -> list[str]:
    """Return the backward's lines from scores to weights and gradients, with dropout.

    The gradient of a weight is that of what is left of it, and this is what gives dv.  Products, since zero
    times NaN is NaN, as in torch.
    """
    if not spec.dropout:
        return lines
    return [
        f"kept = tl.where(_keeps(seed, batch, head, qi, ki), {growth(spec.dropout)!r}, 0.0)",
        "dp *= kept",
        *lines,
        "p *= kept",
    ]


def seed_line() -> dict[str, str]:
    """Return the header's line about the seed."""
    return {"line": _LINE}


def seed_sample() -> str:
    """Return how the self-test draws a seed."""
    return "torch.randint(2**63 - 1, (1,), generator=g)"
