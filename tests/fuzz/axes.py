"""The axes of spelling: each program is one value on every axis, and a seed for what is left to chance.

A value is a word, so that a program can be printed, counted by, and made plainer one axis at a time. The
first value of an axis is its plainest. ``settled`` takes back what cannot stand together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tests.fuzz.near_misses import NEAR_MISSES

LAYOUTS = (
    "bhld blhd merged lbhd flat fairseq transposed channels features_first padded strided one_of_three "
    "interleaved projected scrambled indexed copied"
)
MASKS = (
    "none all_true causal causal_end window sliding sinks prefix chunked blocks block_causal dilated "
    "neighborhood grid padding rows documents dense"
)


def axis(values: str, weights: str = "") -> Any:
    """Return a field that holds one of ``values``; ``weights`` are their chances, equal if left out."""
    words = tuple(values.split())
    chances = tuple(map(float, weights.split())) or (1.0,) * len(words)
    assert len(words) == len(chances), values
    return field(default=words[0], metadata={"values": words, "weights": chances})


@dataclass(frozen=True)
class Spelling:
    """One attention program. Sizes, layouts, scores, mask, normalizer, values, surroundings, near miss."""

    seed: int = 0
    sizes: str = axis("square distinct equal short decode one_key lone", "4 8 3 2 1 1 1")
    group: str = axis("1 2 3", "5 2 1")
    trace: str = axis("static symbolic exported exported_symbolic", "989 6 4 1")
    reads: str = axis("shapes numbers", "2 1")
    heads: str = axis("whole flat grouped loop_heads loop_pairs chunks", "10 4 3 1 0.5 1")
    orientation: str = axis("queries_first keys_first", "5 1")
    packed: str = axis("none chunk split unbind select narrow per_head keys_values", "9 1 1 1 1 1 1 1")
    q_layout: str = axis(LAYOUTS)
    k_layout: str = axis(LAYOUTS + " cached", "1 " * 17 + "2")
    v_layout: str = axis(LAYOUTS + " cached", "1 " * 17 + "2")
    copies: str = axis("repeat_interleave expand repeat tile stack indexed concatenated")
    normed: str = axis("none rms unit layer", "7 1 1 1")
    rotary: str = axis("none halves interleaved complex partial tables", "8 1 1 1 1 1")
    contraction: str = axis("matmul transpose swapped einsum einsum_moved mul_sum bmm own", "3 2 1 2 1 1 1 3")
    scale: str = axis(
        "none q k both after divided constant learned per_head per_query per_key per_batch",
        "4 4 2 2 6 4 2 2 2 1 1 1",
    )
    edit: str = axis("none shift softcap clamp relu", "16 1 2 1 1")
    bias: str = axis("none dense per_head keys_only table alibi alibi_keys learned_rows", "9 2 1 1 1 1 1 1")
    order: str = axis("scale_bias_mask bias_scale_mask mask_first_then_scale mask_then_bias", "6 1 1 1")
    mask: str = axis(MASKS, "3 1 4 2 1 2 1 1 1 1 1 1 1 1 3 1 2 1")
    made: str = axis(
        "compare tril triu cumsum buffer index floats where inverted packed padded joined rowwise"
    )
    positions: str = axis("arange cumsum meshgrid view")
    given: str = axis("bool floats integers lengths", "2 1 1 1")
    more: str = axis("none padding causal window documents dense", "7 2 1 1 1 0.5")
    joined: str = axis("and fills hide_or product all")
    applied: str = axis(
        "masked_fill where where_not add subtract multiply expanded log full blend", "6 4 2 6 2 4 2 2 2 1"
    )
    fill: str = axis("inf min min32 big small", "4 3 1 1 1")
    more_fill: str = axis("same inf min big small", "16 1 1 1 1")
    cast: str = axis("none to type_as double softmax_dtype", "8 1 1 1 1")
    norm: str = axis(
        "softmax functional aten safe moved rows shifted log_softmax logsumexp exp_sum exp_max exp_recip "
        "late late_max sink sink_zero plus_one lse_sink nan_to_num",
        "5 3 1 1 1 1 1 1 1 1 2 1 1 1 1 1 1 1 1",
    )
    dropout: str = axis("none weights output", "5 2 1")
    values: str = axis("matmul swapped einsum einsum_moved mul_sum bmm own contiguous", "4 1 2 1 1 1 2 1")
    output: str = axis("bhse merged moved projected gated", "3 3 1 1 1")
    extra: str = axis("none weights scores lse sizes", "12 1 1 1 1")
    near_miss: str = axis(" ".join(NEAR_MISSES), f"{3 * len(NEAR_MISSES)} " + "1 " * (len(NEAR_MISSES) - 1))

    def __str__(self) -> str:
        words = [f"seed={self.seed}"]
        words += [f"{f.name}={value}" for f, value in self.choices() if value != f.default]
        return " ".join(words)

    def choices(self) -> Iterator[tuple[Any, str]]:
        """Yield every axis with the value chosen."""
        for f in fields(self):
            if f.name != "seed":
                yield f, getattr(self, f.name)


AXES = {f.name: f for f, _ in Spelling().choices()}


def drawn(seed: int, near_miss: str | None = None) -> Spelling:
    """Return the program of a seed; ``near_miss`` pins that axis."""
    r = random.Random(seed)
    pinned = {} if near_miss is None else {"near_miss": near_miss}
    return settled(Spelling(seed, **{n: _draw(r, f) for n, f in AXES.items()} | pinned))  # type: ignore[arg-type]


def _draw(r: random.Random, f: Any) -> str:
    return str(r.choices(f.metadata["values"], f.metadata["weights"])[0])


# ---------------------------------------------------------------- what cannot stand together

SQUARE = ("square", "equal", "lone")
BARE = ("exp_sum", "late", "logsumexp", "lse_sink")
FEW = ("equal", "decode", "one_key", "lone")
MAKES = {
    "causal": "compare tril triu cumsum buffer index floats where inverted packed padded joined rowwise",
    "sliding": "compare tril triu buffer index floats where inverted",
    "window": "compare tril triu buffer index floats where inverted",
    "all_true": "compare floats where cumsum padded",
    "causal_end": "compare tril triu index floats where inverted",
}
USUAL = "compare index floats where inverted"
FACTORS = ("learned", "per_head", "per_query", "per_key", "per_batch")
DATA = ("padding", "rows", "documents", "dense")
Rule = tuple[Callable[[Spelling], bool], dict[str, str]]

RULES: list[Rule] = [
    # Where a loop unrolls, sizes are numbers; where there are few queries or keys, nothing is symbolic.
    (lambda x: x.sizes in FEW and "symbolic" in x.trace, {"trace": "static"}),
    (lambda x: x.heads in ("loop_pairs", "chunks") and "symbolic" in x.trace, {"trace": "static"}),
    (lambda x: "symbolic" in x.trace, {"reads": "shapes"}),
    (lambda x: x.heads.startswith("loop") and x.sizes == "distinct" and x.group == "3", {"group": "2"}),
    (lambda x: x.heads == "loop_pairs" and x.sizes == "distinct", {"sizes": "square"}),
    # Projections that are packed make operands of one length, and of one size where they are cut evenly.
    (lambda x: x.packed not in ("none", "keys_values") and x.sizes not in SQUARE, {"packed": "none"}),
    (lambda x: x.packed in ("chunk", "unbind", "select", "per_head"), {"group": "1"}),
    (lambda x: x.packed == "keys_values" and x.sizes not in ("square", "equal", "short"), {"packed": "none"}),
    (lambda x: x.packed != "none", {"k_layout": "bhld", "v_layout": "bhld"}),
    (lambda x: x.packed not in ("none", "keys_values"), {"q_layout": "bhld"}),
    (lambda x: x.sizes in ("decode", "one_key", "lone") and "cached" in (x.k_layout, x.v_layout),
     {"k_layout": "bhld", "v_layout": "bhld"}),
    (lambda x: x.group == "1" or x.heads == "grouped", {"copies": "repeat_interleave"}),
    # Spellings of one rank.
    (lambda x: x.heads in ("grouped", "chunks") and x.contraction == "bmm", {"contraction": "matmul"}),
    (lambda x: x.heads in ("grouped", "chunks") and x.values == "bmm", {"values": "matmul"}),
    (lambda x: x.heads == "loop_pairs" and x.contraction in ("bmm", "einsum_moved"), {"contraction": "own"}),
    (lambda x: x.heads == "loop_pairs" and x.values in ("bmm", "einsum_moved"), {"values": "own"}),
    (lambda x: x.orientation == "keys_first" and x.norm in ("rows", "late", "late_max"), {"norm": "softmax"}),
    (lambda x: x.norm in ("late", "late_max") and x.extra == "weights", {"extra": "none"}),
    (lambda x: x.norm not in ("softmax", "functional") and x.cast == "softmax_dtype", {"cast": "none"}),
    # Steps and masks.
    (lambda x: x.mask == "none", {"more": "none"}),
    (lambda x: x.more == x.mask or (x.more == "causal" and "causal" in x.mask), {"more": "none"}),
    (lambda x: x.more == "none", {"joined": "and"}),
    (lambda x: x.mask == "none", {"applied": "masked_fill", "fill": "inf", "made": "compare"}),
    (lambda x: x.made not in MAKES.get(x.mask, "compare" if x.mask in DATA else USUAL).split(),
     {"made": "compare"}),
    (lambda x: x.made == "rowwise" and "symbolic" in x.trace, {"made": "compare"}),
    (lambda x: x.made == "padded" and x.sizes in ("one_key", "lone", "decode"), {"made": "compare"}),
    (lambda x: x.mask in ("none", *DATA), {"positions": "arange"}),
    (lambda x: not {x.mask, x.more} & {"padding", "rows"}, {"given": "bool"}),
    # Without a maximum taken off, a row of finite fills is 0 / 0 or rounded off: see the near misses.
    (lambda x: x.norm in BARE, {"fill": "inf", "more_fill": "same"}),
    (lambda x: x.norm in ("logsumexp", "lse_sink"), {"bias": "none"}),
    # Zeroing NaN sees what a factor makes of -inf: see the near misses.
    (lambda x: x.norm == "nan_to_num" and x.scale in FACTORS
     and ((x.order == "bias_scale_mask" and x.bias != "none")
          or (x.order == "mask_first_then_scale" and x.mask != "none")), {"order": "scale_bias_mask"}),
    (lambda x: x.norm == "nan_to_num" and x.applied == "blend" and x.bias != "none", {"applied": "where"}),
    (lambda x: x.joined != "fills" or x.applied in ("multiply", "blend", "log"), {"more_fill": "same"}),
    (lambda x: x.applied in ("multiply", "blend") and x.fill == "inf", {"applied": "add"}),
    (lambda x: x.applied == "log", {"fill": "inf"}),
    (lambda x: x.scale == "none" and x.edit == "none" and x.bias == "none", {"order": "scale_bias_mask"}),
    (lambda x: x.contraction == "own" and x.heads in ("flat", "loop_heads") and x.scale == "per_head",
     {"scale": "after"}),
]  # fmt: skip


def settled(x: Spelling) -> Spelling:
    """Return the program with its contradictions taken back, the near miss having its say last."""
    for _ in range(4):
        before = x
        for applies, change in RULES:
            if applies(x):
                x = replace(x, **change)  # type: ignore[arg-type]
        pins = NEAR_MISSES[x.near_miss].needs
        x = replace(x, **{n: v.split("|")[0] for n, v in pins.items() if getattr(x, n) not in v.split("|")})
        if x == before:
            return x
    raise AssertionError(f"the rules of the axes do not settle: {x}")
