"""A spelling as a program: the text of a plain function, its inputs, and the function itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.axes import Spelling
from tests.fuzz.masks import truth_text, write_added, write_mask
from tests.fuzz.near_misses import NEAR_MISSES
from tests.fuzz.operands import write_copies, write_edits, write_operands
from tests.fuzz.scores import (
    FRAMES,
    Frame,
    write_before,
    write_scores,
    write_values,
    write_weights,
)
from tests.fuzz.text import Input, Sizes, Writer, sizes_of

IMPORTS = "import math\n\nimport torch\nimport torch.nn.functional as F\n"
OTHER_SIZES = ((0, -6, -6), (3, 4, 4))
"""What is added to batch, queries and keys to run a symbolic trace at sizes it was not traced at."""


@dataclass(frozen=True)
class Program:
    """The text, its inputs in order, and its sizes."""

    spelling: Spelling
    text: str
    inputs: tuple[Input, ...]
    sizes: Sizes

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The program itself."""
        return _compiled(IMPORTS + self.text)["attention"]  # type: ignore[no-any-return]

    def draw(self, sizes: Sizes, seed: int, how: str) -> tuple[Tensor, ...]:
        """Return inputs at the sizes given."""
        g = torch.Generator().manual_seed(seed)
        return tuple(i.draw(sizes, g, how) for i in self.inputs)

    def other_sizes(self) -> list[Sizes]:
        """Return sizes to run a symbolic trace at."""
        z = self.sizes
        return [z | {"b": z["b"] + b, "s": z["s"] + s, "t": z["t"] + t} for b, s, t in OTHER_SIZES]

    def truth(self, s: int, t: int) -> Tensor:
        """Return what the masks of positions keep, [1, 1, S, T]."""
        return _compiled(IMPORTS + truth_text(self.spelling))["truth"](s, t).expand(1, 1, s, t)  # type: ignore[no-any-return]


def _compiled(text: str) -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(compile(text, "<program>", "exec"), space)
    return space


SYMBOLIC = {"distinct": (10, 17, 21), "square": (10, 19, 19), "short": (10, 23, 21)}
"""Batch, queries, keys of symbolic traces: an equal size of another meaning would get their symbol."""


def rendered(x: Spelling) -> Program:
    """Write the program of a spelling."""
    z = sizes_of(x.sizes, int(x.group))
    if "symbolic" in x.trace:
        z |= dict(zip("bst", SYMBOLIC[x.sizes], strict=True))
    w, near, frame = Writer(z), NEAR_MISSES[x.near_miss].lines, FRAMES[x.heads]
    write_operands(w, x)
    write_edits(w, x)
    write_before(w, x)
    w(*near.get("operands", ()))
    if "copies" in near:
        w(*near["copies"])
    else:
        write_copies(w, x)
    masks = write_mask(w, x)
    write_added(w, x, masks)
    _write_heads(w, x, frame, masks)
    _write_output(w, x)
    w(*near.get("out", ()))
    _write_return(w, x)
    order = ", ".join(i.name for i in w.inputs)
    text = "\n".join([*w.head, *([""] if w.head else []), f"def attention({order}):", *w.lines, ""])
    return Program(x, text, tuple(w.inputs), z)


def _write_heads(w: Writer, x: Spelling, f: Frame, masks: list[str]) -> None:
    """Write the body, once or in a loop, and put its outputs together as [B, H, Sq, Dv]."""
    if x.heads in ("whole", "flat", "grouped"):
        _write_body(w, x, f, masks)
        together = {"flat": "out = out.unflatten(0, (b, h * n))", "grouped": "out = out.flatten(1, 2)"}
        if x.heads in together:
            w(together[x.heads])
        return
    w("outs = []")
    loops = {
        "loop_heads": "for m in range(h * n):",
        "loop_pairs": "for r, m in [(r, m) for r in range(b) for m in range(h * n)]:",
        "chunks": "for begin in range(0, s, 2):",
    }
    with w.block(loops[x.heads]):
        _write_body(w, x, f, masks)
        w("outs.append(out)")
    together = {
        "loop_heads": "out = torch.stack(outs, 1)",
        "loop_pairs": "out = torch.stack(outs).view(b, h * n, s, e)",
        "chunks": "out = torch.cat(outs, 2)",
    }
    w(together[x.heads])


def _write_body(w: Writer, x: Spelling, f: Frame, masks: list[str]) -> None:
    write_scores(w, x, f, masks)
    w(*NEAR_MISSES[x.near_miss].lines.get("scores", ()))
    if x.extra in ("scores", "lse"):
        w("raw = w")
    write_weights(w, x, f)
    write_values(w, x, f)


def _write_output(w: Writer, x: Spelling) -> None:
    if x.output == "merged":
        w("out = out.transpose(1, 2).reshape(b, out.shape[2], h * n * e)")
    elif x.output == "moved":
        w("out = out.permute(2, 0, 1, 3).contiguous().view(s, b, h * n * e)")
    elif x.output == "projected":
        w.take("wo", "5", "h * n * e")
        w("out = F.linear(out.transpose(1, 2).flatten(2), wo)")
    elif x.output == "gated":
        w.take("gate", "b", "h * n", "s", "e")
        w("out = out * gate.sigmoid()")
    if x.dropout == "output":
        w("out = F.dropout(out, 0.2, False)")


def _write_return(w: Writer, x: Spelling) -> None:
    d = -2 if x.orientation == "keys_first" else -1
    more = {"weights": ", w", "scores": ", raw", "lse": f", raw.logsumexp({d})"}
    if x.extra == "sizes":
        w("out = out * w.shape[-1]")
    w("return out" + more.get(x.extra, ""))
