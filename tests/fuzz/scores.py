"""The text between q, k, v and the output: contraction, steps on the scores, normalizer, values.

A frame is how heads and batch stand in the scores; what is made for scores [B, H, Sq, Sk] is placed in it.
"""

from __future__ import annotations

import math
import random
import re
import string
from dataclasses import dataclass

from tests.fuzz.axes import Spelling
from tests.fuzz.masks import hidden
from tests.fuzz.near_misses import NEAR_MISSES
from tests.fuzz.operands import scaling
from tests.fuzz.text import Writer


@dataclass(frozen=True)
class Frame:
    """Texts of q, k, v as the contraction reads them; ``lead`` counts axes before queries and keys.

    ``place`` is how a tensor of axes [B, H, Sq, Sk], any of size 1, is brought to the scores: by template,
    with and without heads.
    """

    q: str
    k: str
    v: str
    lead: int
    with_heads: str
    without: str

    def place(self, text: str, heads: bool, rows: bool, flipped: bool = False) -> str:
        """Return the text of a tensor at the scores' axes; ``heads`` and ``rows`` say that it has those."""
        at = (self.with_heads if heads else self.without).format(x=text)
        at = at.replace("@rows", ", :, begin:begin + 2" if rows else "")
        return f"{at}.mT" if flipped else at


FRAMES = {
    "whole": Frame("q", "k", "v", 2, "{x}", "{x}"),
    "flat": Frame(
        "q.reshape(b * h * n, s, d)", "k.reshape(b * h * n, t, d)", "v.reshape(b * h * n, t, e)", 1,
        "{x}.expand(b, h * n, -1, -1).flatten(0, 1)", "{x}.expand(b, h * n, -1, -1).flatten(0, 1)",
    ),
    "grouped": Frame(
        "q.unflatten(1, (h, n))", "k[:, :, None]", "v[:, :, None]", 3,
        "{x}.unflatten(1, (h, n))", "{x}.unsqueeze(1)",
    ),
    "loop_heads": Frame("q[:, m]", "k[:, m]", "v[:, m]", 1, "{x}[:, m]", "{x}[:, 0]"),
    "loop_pairs": Frame(
        "q[r, m]", "k[r, m]", "v[r, m]", 0,
        "{x}.expand(b, -1, -1, -1)[r, m]", "{x}.expand(b, -1, -1, -1)[r, 0]",
    ),
    "chunks": Frame("q[:, :, begin:begin + 2]", "k", "v", 2, "{x}[:@rows]", "{x}[:@rows]"),
}  # fmt: skip


def letters(x: Spelling, salt: int) -> list[str]:
    """Return the letters of an einsum, drawn from all."""
    return random.Random(x.seed * 7 + salt).sample(string.ascii_letters, 8)


def contraction(x: Spelling, f: Frame, alpha: str) -> str:
    """Return the text of the scores; ``alpha`` is the factor of ops that take one, or empty."""
    q, k = (f.k, f.q) if x.orientation == "keys_first" else (f.q, f.k)
    c = letters(x, 0)
    lead, s, t, d = "".join(c[: f.lead]), c[4], c[5], c[6]
    group = f'torch.einsum("{lead}{s}{d},{lead[:2]}{t}{d}->{lead}{s}{t}", {f.q}, k)'
    if x.orientation == "keys_first":
        group = f'torch.einsum("{lead[:2]}{t}{d},{lead}{s}{d}->{lead}{t}{s}", k, {f.q})'
    flat = (f"F.linear({q}, {k})", f"torch.mm({q}, {k}.t())", f"torch.inner({q}, {k})",
            f"torch.tensordot({q}, {k}, ([1], [1]))")  # fmt: skip
    own = {
        3: group,
        2: f"torch.matmul({q}, torch.movedim({k}, -1, -2))",
        1: f"torch.bmm({q}, {k}.transpose(1, 2))",
        0: flat[x.seed % 4],
    }
    if f.lead == 1 and alpha:
        own[1] = (
            f"torch.baddbmm(torch.zeros(1, 1, 1, dtype=torch.float64), {q}, {k}.mT, beta=0, alpha={alpha})"
        )
    moved = (
        f"{lead[0] if lead else ''}{s}{lead[1:]}{d},{lead[0] if lead else ''}{t}{lead[1:]}{d}->{lead}{s}{t}"
    )
    return {
        "matmul": f"{q} @ {k}.mT",
        "transpose": f"torch.matmul({q}, {k}.transpose(-1, -2))",
        "swapped": f"({k} @ {q}.mT).mT",
        "einsum": f'torch.einsum("{lead}{s}{d},{lead}{t}{d}->{lead}{s}{t}", {q}, {k})',
        "einsum_moved": f'torch.einsum("{moved}", {q}.movedim(-2, 1), {k}.movedim(-2, 1))',
        "mul_sum": f"({q}[..., :, None, :] * {k}[..., None, :, :]).sum(-1)",
        "bmm": f"torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT).unflatten(0, {q}.shape[:2])"
        if f.lead == 2
        else f"torch.bmm({q}, {k}.mT)",
        "own": own[f.lead],
    }[x.contraction]


def is_alpha(x: Spelling, f: Frame) -> bool:
    """Say whether the contraction takes the factor itself."""
    return x.contraction == "own" and f.lead == 1 and x.scale == "after"


def write_scores(w: Writer, x: Spelling, f: Frame, masks: list[str]) -> None:
    """Write the contraction and every step on the scores, in the order the program has."""
    c = scaling(x, w.z["d"])
    flipped = x.orientation == "keys_first"
    w(f"w = {contraction(x, f, repr(c) if is_alpha(x, f) else '')}")
    scale = [] if is_alpha(x, f) else _scale(x, f, c, flipped)
    edit = {
        "shift": ["w = w + 0.75"],
        "softcap": ["w = 5.0 * torch.tanh(w / 5.0)"],
        "clamp": ["w = w.clamp(-3.0, 3.0)"],
        "relu": ["w = w.relu()"],
    }.get(x.edit, [])
    bias = []
    if x.bias != "none":
        heads, rows = x.bias in ("per_head", "table", "alibi", "alibi_keys", "learned_rows"), x.bias in (
            "dense", "per_head", "table", "alibi", "learned_rows")  # fmt: skip
        bias = [f"w = w {'-' if x.bias.startswith('alibi') else '+'} {f.place('bias', heads, rows, flipped)}"]
    mask = []
    for name in masks:
        heads, rows = _axes_of(x, name, w)
        placed = {n: f.place(n, heads, rows, flipped) for n in (name, name + "_added")}
        mask.append("w = " + hidden(x, "w", name, placed))
    steps = {
        "scale_bias_mask": [*scale, *edit, *bias, *mask],
        "bias_scale_mask": [*bias, *scale, *edit, *mask],
        "mask_first_then_scale": [*mask, *scale, *edit, *bias],
        "mask_then_bias": [*scale, *edit, *mask, *bias],
    }
    w(*steps[x.order])
    cast = {"to": "w = w.to(torch.float64)", "type_as": "w = w.type_as(q)", "double": "w = w.double()"}
    if x.cast in cast:
        w(cast[x.cast])


def _axes_of(x: Spelling, name: str, w: Writer) -> tuple[bool, bool]:
    """Say whether a mask may have more than one head, and more than one row."""
    kinds = (
        {x.mask}
        if name == "keep" and x.joined == "fills"
        else {x.more}
        if name == "also"
        else {x.mask, x.more}
    )
    dense = next((i.shape[1] != "1" for i in w.inputs if i.name == "dense"), False)
    odd = x.near_miss == "causal_for_even_heads" and name == "keep"
    return ("dense" in kinds and dense) or odd, kinds - {"none"} != {"padding"}


def _scale(x: Spelling, f: Frame, c: float, flipped: bool) -> list[str]:
    return {
        "after": [f"w = w * {c!r}"],
        "divided": [f"w = w / {1 / c!r}"],
        "constant": [f"w = w * torch.full((), {c!r}, dtype=torch.float64)"],
        "learned": ["w = w * factor"],
        "per_head": [f"w = w * {f.place('factor', True, False, flipped)}"],
        "per_query": [f"w = w * {f.place('factor', False, True, flipped)}"],
        "per_key": [f"w = w * {f.place('factor', False, False, flipped)}"],
        "per_batch": [f"w = w * {f.place('factor', False, False, flipped)}"],
    }.get(x.scale, [])


def write_before(w: Writer, x: Spelling) -> None:
    """Write the factor of q and k, and the biases, which stand before the loop over heads."""
    c = scaling(x, w.z["d"])
    if x.scale in ("q", "both"):
        w(f"q = q * {c if x.scale == 'q' else math.sqrt(c)!r}")
    if x.scale in ("k", "both"):
        w(f"k = k * {c if x.scale == 'k' else math.sqrt(c)!r}")
    shapes = {
        "learned": (),
        "per_head": ("h * n",),
        "per_query": ("s",),
        "per_key": ("t",),
        "per_batch": ("b",),
    }
    if x.scale in shapes:
        w.take("factor", *shapes[x.scale], kind="factor")
        view = {
            "per_head": "[None, :, None, None]",
            "per_query": "[None, None, :, None]",
            "per_key": "[None, None, None]",
            "per_batch": "[:, None, None, None]",
        }
        if x.scale in view:
            w(f"factor = factor{view[x.scale]}")
    distance = "(torch.arange(t)[None] - torch.arange(s)[:, None])"
    if x.bias in ("dense", "per_head"):
        batch, heads = random.Random(x.seed).choice("1b"), "h * n" if x.bias == "per_head" else "1"
        w.take("bias", batch, heads, "s", "t", kind="bias")
    elif x.bias == "keys_only":
        w.take("row", "b", "t")
        w("bias = row[:, None, None]")
    elif x.bias == "learned_rows":
        w.take("rows_bias", "h * n", "s", "1")
        w.take("columns_bias", "h * n", "1", "t")
        w("bias = (rows_bias + columns_bias)[None]")
    elif x.bias == "table":
        w.take("table", "9", "h * n")
        w(f"bias = table[{distance}.clamp(-4, 4) + 4].permute(2, 0, 1)[None]")
    elif x.bias == "alibi":
        w.take("slopes", "h * n")
        w(f"bias = (slopes[:, None, None] * {distance}.abs())[None]")
    elif x.bias == "alibi_keys":
        w.take("slopes", "h * n")
        w("bias = (slopes[:, None, None] * torch.arange(t)[None, None])[None]")


# ---------------------------------------------------------------- scores to weights

LATE = ("late", "late_max")
NORMS = {
    "softmax": "w = w.softmax({d}{dtype})",
    "functional": "w = F.softmax(w, dim={d}{dtype})",
    "aten": "w = torch.ops.aten._softmax.default(w, {d}, False)",
    "safe": "w = torch.ops.aten._safe_softmax.default(w, {d})",
    "moved": "w = w.transpose(-1, -2).softmax({other}).transpose(-1, -2)",
    "rows": "w = w.reshape(-1, t).softmax(-1).view(w.shape)",
    "shifted": "w = (w - w.amax({d}, keepdim=True)).softmax({d})",
    "log_softmax": "w = w.log_softmax({d}).exp()",
    "logsumexp": "w = (w - w.logsumexp({d}, keepdim=True)).exp()",
    "exp_sum": "w = w.exp(); w = w / w.sum({d}, keepdim=True)",
    "exp_max": "w = (w - w.max({d}, keepdim=True).values).exp(); w = w / w.sum({d}, keepdim=True)",
    "exp_recip": "w = (w - w.amax({d}, keepdim=True)).exp(); w = w * w.sum({d}, keepdim=True).reciprocal()",
    "late": "w = w.exp(); total = w.sum({d}, keepdim=True)",
    "late_max": "w = (w - w.amax({d}, keepdim=True)).exp(); total = w.sum({d}, keepdim=True)",
    "sink": "w = torch.cat([w, {sink}.expand_as({first})], {d}).softmax({d}); w = {cut}",
    "sink_zero": "w = torch.cat([w, torch.zeros_like({first})], {d}).softmax({d}); w = {cut}",
    "plus_one": "w = w.exp(); w = w / (1 + w.sum({d}, keepdim=True))",
    "lse_sink": "w = (w - torch.logaddexp(w.logsumexp({d}, keepdim=True), {sink})).exp()",
    "nan_to_num": "w = w.softmax({d}).nan_to_num(0.0)",
}


def write_weights(w: Writer, x: Spelling, f: Frame) -> None:
    """Write the normalizer, or what stands in its place, and what happens to the weights."""
    lines = NEAR_MISSES[x.near_miss].lines
    flipped = x.orientation == "keys_first"
    text = NORMS[x.norm].format(
        d=-2 if flipped else -1,
        other=-1 if flipped else -2,
        dtype=", dtype=torch.float64" if x.cast == "softmax_dtype" else "",
        sink=f.place("sinks[None, :, None, None]", True, False),
        first="w[..., :1, :]" if flipped else "w[..., :1]",
        cut="w[..., :-1, :]" if flipped else "w[..., :-1]",
    )
    if "sinks" in text and "instead" not in lines:
        w.take("sinks", "h * n")
    w(*lines.get("instead", text.split("; ")))
    w(*lines.get("weights", ()))
    if x.dropout == "weights":
        w("w = F.dropout(w, 0.1, False)")


def write_values(w: Writer, x: Spelling, f: Frame) -> None:
    """Write the value contraction, and the division that comes after it."""
    instead = NEAR_MISSES[x.near_miss].lines.get("values")
    flipped, v = x.orientation == "keys_first", f.v
    p = "w.mT" if flipped else "w"
    if instead is not None:
        w(*(re.sub(r"\bv\b", v, line) for line in instead))
        return
    c = letters(x, 1)
    lead, s, t, e = "".join(c[: f.lead]), c[4], c[5], c[6]
    weights = f"{lead}{t}{s}" if flipped else f"{lead}{s}{t}"
    own = {
        3: f'torch.einsum("{weights},{lead[:2]}{t}{e}->{lead}{s}{e}", w, v)',
        2: f'torch.einsum("{weights},{lead}{t}{e}->{lead[0:1]}{s}{lead[1:2]}{e}", w, {v}).transpose(1, 2)',
        1: f"torch.bmm({p}, {v})",
        0: (f"F.linear({p}, {v}.t())", f"torch.mm({p}, {v})", f"torch.tensordot({p}, {v}, 1)")[x.seed % 3],
    }
    moved = f"{lead[:1]}{t}{lead[1:]}{e}"
    w("out = " + {
        "matmul": f"{p} @ {v}",
        "swapped": f"({v}.mT @ {p}.mT).mT",
        "einsum": f'torch.einsum("{weights},{lead}{t}{e}->{lead}{s}{e}", w, {v})',
        "einsum_moved": f'torch.einsum("{weights},{moved}->{lead}{s}{e}", w, {v}.movedim(-2, 1))',
        "mul_sum": f"({p}[..., None] * {v}[..., None, :, :]).sum(-2)",
        "bmm": f"torch.bmm({p}.flatten(0, 1), {v}.flatten(0, 1)).unflatten(0, {p}.shape[:2])"
        if f.lead == 2
        else f"torch.bmm({p}, {v})",
        "contiguous": f"torch.matmul({p}, {v}.mT.contiguous().mT)",
        "own": own[f.lead],
    }[x.values])  # fmt: skip
    if x.norm in LATE:
        w("out = out / total")
