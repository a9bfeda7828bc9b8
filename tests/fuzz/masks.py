"""The text of masks: what is kept, how the tensor that says so is built, and how it hides scores.

A mask ends as a bool tensor ``keep`` that broadcasts to [B, H, Sq, Sk], true where the score stays.
"""

from __future__ import annotations

import random

from tests.fuzz.axes import DATA, Spelling
from tests.fuzz.near_misses import NEAR_MISSES
from tests.fuzz.text import Writer

KEEPS = {
    "all_true": "({i} >= 0) & ({j} >= 0)",
    "causal": "{j} <= {i}",
    "causal_end": "{j} <= {i} + (t - s)",
    "window": "({i} - {j}).abs() <= 2",
    "sliding": "({j} <= {i}) & ({i} - {j} < 3)",
    "sinks": "({j} <= {i}) & (({i} - {j} < 2) | ({j} < 1))",
    "prefix": "({j} <= {i}) | ({j} < 2)",
    "chunked": "({j} <= {i}) & ({i} // 2 == {j} // 2)",
    "blocks": "{i} // 2 == {j} // 2",
    "block_causal": "{j} // 2 <= {i} // 2",
    "dilated": "({j} <= {i}) & (({i} - {j}) % 2 == 0)",
    "neighborhood": "({j} >= ({i} - 1).clamp(0, t - 3)) & ({j} < ({i} - 1).clamp(0, t - 3) + 3)",
    "grid": "(({i} // 3 - {j} // 3).abs() <= 1) & (({i} % 3 - {j} % 3).abs() <= 1)",
}
ONES = "torch.ones(s, t, dtype=torch.bool)"
TRIANGLES = {
    ("causal", "tril"): f"{ONES}.tril()",
    ("causal", "triu"): f"~{ONES}.triu(1)",
    ("causal_end", "tril"): f"{ONES}.tril(t - s)",
    ("causal_end", "triu"): f"~{ONES}.triu(t - s + 1)",
    ("sliding", "tril"): f"{ONES}.tril().triu(-2)",
    ("sliding", "triu"): f"~({ONES}.triu(1) | {ONES}.tril(-3))",
    ("window", "tril"): f"{ONES}.tril(2).triu(-2)",
    ("window", "triu"): f"~({ONES}.triu(3) | {ONES}.tril(-3))",
    ("causal", "cumsum"): "torch.ones(s, t).cumsum(-1) <= torch.ones(s, t).cumsum(-2)",
    ("all_true", "cumsum"): "torch.ones(s, t).cumsum(-1) > 0",
    ("causal", "padded"): "F.pad(torch.ones(s, t - 1, dtype=torch.bool).tril(-1), (1, 0), value=True)",
    ("all_true", "padded"): "F.pad(torch.ones(s, t - 1, dtype=torch.bool), (1, 0), value=True)",
    ("causal", "joined"): "torch.cat([torch.ones(s, 1, dtype=torch.bool), "
    "torch.ones(s, t - 1, dtype=torch.bool).tril(-1)], 1)",
    ("causal", "rowwise"): "torch.stack([torch.arange(t) <= r for r in range(s)])",
}
POSITIONS = {
    "arange": ("i, j = torch.arange(s)[:, None], torch.arange(t)[None]",),
    "view": ("i, j = torch.arange(s).view(-1, 1), torch.arange(t).view(1, -1)",),
    "meshgrid": ('i, j = torch.meshgrid(torch.arange(s), torch.arange(t), indexing="ij")',),
    "cumsum": (
        "i = torch.ones(s, dtype=torch.int64).cumsum(0)[:, None] - 1",
        "j = torch.ones(1, t, dtype=torch.int64).cumsum(1) - 1",
    ),
}
FILLS = {
    "inf": 'float("-inf")',
    "min": "torch.finfo(torch.float64).min",
    "min32": "torch.finfo(torch.float32).min",
    "big": "-1e9",
    "small": "-1e4",
}
GIVEN = {"bool": "{0}", "floats": "{0} > 0.5", "integers": "{0} != 0"}


def write_mask(w: Writer, x: Spelling) -> list[str]:
    """Write the construction of the masks; return the names of those to apply, in order."""
    if x.mask == "none":
        return []
    _write_keep(w, x, x.mask, x.made, "keep")
    w(*(line.format(**w.z) for line in NEAR_MISSES[x.near_miss].lines.get("mask", ())))
    if x.more == "none":
        return ["keep"]
    _write_keep(w, x, x.more, "compare", "also")
    join = {
        "and": "keep = keep & also",
        "hide_or": "keep = ~(~keep | ~also)",
        "product": "keep = keep.to(torch.float64) * also.to(torch.float64) != 0",
        "all": "keep = torch.stack(torch.broadcast_tensors(keep, also)).all(0)",
    }
    if x.joined == "fills":
        return ["keep", "also"]
    w(join[x.joined])
    return ["keep"]


def _write_keep(w: Writer, x: Spelling, kind: str, made: str, name: str) -> None:
    if kind in DATA:
        _write_data(w, x, kind, name)
        return
    if (kind, made) in TRIANGLES:
        w(f"{name} = ({TRIANGLES[kind, made]})[None, None]")
        return
    keep = KEEPS[kind]
    if made == "buffer":
        w.head += [
            "rows, columns = torch.arange(64)[:, None], torch.arange(64)[None]",
            f"stored = ({keep.format(i='rows', j='columns')})[None, None]",
        ]
        w(f"{name} = stored[:, :, :s, :t]")
        return
    w(*POSITIONS[x.positions])
    if made == "index":
        w("p = torch.arange(s + t)", "i, j = p[i], p[j]")
    if made == "packed":
        w("p = torch.arange(s + t)", "piece = (torch.diff(p, prepend=p[:1] - 1) != 1).cumsum(-1)")
        keep = f"({keep}) & (piece[{{i}}] == piece[{{j}}])"
    text = keep.format(i="i", j="j")
    spelled = {
        "floats": f"({text}).to(torch.float64) != 0",
        "where": f"torch.where({text}, 1, 0) == 1",
        "inverted": f"~torch.logical_not({text})",
    }
    w(f"{name} = ({spelled.get(made, text)})[None, None]")


def _write_data(w: Writer, x: Spelling, kind: str, name: str) -> None:
    if kind == "documents":
        rows, columns = w.take("row_ids", "b", "s", kind="ids"), w.take("ids", "b", "t", kind="ids")
        w(f"{name} = ({rows}[:, :, None] == {columns}[:, None])[:, None]")
    elif kind == "dense":
        r = random.Random(x.seed)
        some = w.take("dense", r.choice("1b"), r.choice(["1", "h * n"]), "s", "t", kind="bool")
        w(f"{name} = {some}")
    elif x.given == "lengths":
        size, n = ("s", "queries") if kind == "rows" else ("t", "lengths")
        lengths = w.take(n, "b", kind="lengths")
        row = f"(torch.arange({size})[None] < {lengths}[:, None])"
        w(f"{name} = {row}{_row(kind)}")
    else:
        valid = w.take(f"valid_{kind}", "b", "s" if kind == "rows" else "t", kind=x.given)
        w(f"{name} = ({GIVEN[x.given].format(valid)}){_row(kind)}")


def _row(kind: str) -> str:
    return "[:, None, :, None]" if kind == "rows" else "[:, None, None]"


ADDED = {
    "add": "torch.zeros_like({k}, dtype=torch.float64).masked_fill(~{k}, {f})",
    "subtract": "torch.zeros_like({k}, dtype=torch.float64).masked_fill(~{k}, -({f}))",
    "multiply": "(1 - {k}.to(torch.float64)) * {f}",
    "expanded": "(1.0 - {k}.to(torch.float64))"
    ".masked_fill((1.0 - {k}.to(torch.float64)).to(torch.bool), {f})",
    "log": "{k}.to(torch.float64).log()",
}
REPLACED = {
    "masked_fill": "{w}.masked_fill(~{k}, {f})",
    "where": "torch.where({k}, {w}, {f})",
    "where_not": "torch.where(~{k}, {f}, {w})",
    "full": "torch.where({k}, {w}, torch.full((), {f}, dtype=torch.float64))",
    "blend": "{w} * {k} + (1 - {k}.to(torch.float64)) * {f}",
}


def write_added(w: Writer, x: Spelling, names: list[str]) -> None:
    """Write what is added to the scores, where masks are added: once, before heads are looped over."""
    if x.applied in ADDED:
        w(*(f"{n}_added = {ADDED[x.applied].format(k=n, f=fill_of(x, n))}" for n in names))


def fill_of(x: Spelling, name: str) -> str:
    """Return what hidden positions of a mask are filled with."""
    return FILLS[x.fill if name == "keep" or x.more_fill == "same" else x.more_fill]


def hidden(x: Spelling, scores: str, name: str, placed: dict[str, str]) -> str:
    """Return the scores with what mask ``name`` hides filled; ``placed`` are tensors at the scores' axes."""
    if x.applied in ADDED:
        return f"{scores} {'-' if x.applied == 'subtract' else '+'} {placed[name + '_added']}"
    return REPLACED[x.applied].format(w=scores, k=placed[name], f=fill_of(x, name))


def truth_text(x: Spelling) -> str:
    """Return a function of sizes that says what a mask of positions keeps, rows and documents left aside."""
    w = Writer({})
    w("keep = torch.ones(1, 1, s, t, dtype=torch.bool)")
    for kind, made in ((x.mask, x.made), (x.more, "compare")):
        if kind not in ("none", *DATA):
            _write_keep(w, x, kind, made, "part")
            w("keep = keep & part")
    return "\n".join([*w.head, "def truth(s, t):", *w.lines, "    return keep"])
