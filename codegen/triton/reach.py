"""Bounds by ids: which keys may share a document with a tile of queries, and which all lie in its only one.

Ids are data, so that no formula over positions bounds them.  The launcher takes the least and the greatest id
of each tile and compares these (``_reach`` in emitted files); the kernel loads four numbers per tile.  Sound
for any ids; of documents that follow each other, as packing lays them, nothing in vain is visited but the
tiles in which one ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnc import expr as E
from attnc.codegen.triton.inputs import Input, atoms
from attnc.formula import reading
from attnc.formula_text import short
from attnc.masks import Formula, Mask


@dataclass(frozen=True, slots=True)
class Reach:
    """The atom of a mask that compares ids, and the name of its bounds, int32 ``[B, tiles, 4]``."""

    ids: Formula
    name: str

    def lines(self) -> list[str]:
        """Return the kernel lines that load a tile's bounds."""
        at = f"{self.name}_ptr + (b * tiles + tile) * 4"
        return [
            "# By ids: what lies outside see_lo .. see_hi shares no document with this tile, and all in",
            "# same_lo .. same_hi is of its only one.",
            *(f"{x} = tl.load({at}{f' + {n}' if n else ''})" for n, x in enumerate(BOUNDS)),
        ]


BOUNDS = ("see_lo", "see_hi", "same_lo", "same_hi")
"""Names of the bounds in a kernel."""


def reach(mask: Mask, name: str) -> Reach | None:
    """Return the first atom of ``mask`` that compares ids; None if there is none."""
    found = (x for x in atoms(mask) if isinstance(x, Formula) and (short(x.value) or ("",))[0] == "document")
    ids = next(found, None)
    return None if ids is None else Reach(ids, name)


def reach_holes(found: Reach | None, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Return the launcher's names of the ids of queries and of keys; none without bounds."""
    if found is None:
        return {"reach": None}
    loads = {(x.args[0], reading(x)) for x in E.walk(found.ids.value) if x.op == "load"}
    ids = {x.layout: x.name for x in inputs if (x.operand.name, x.layout) in loads}
    return {"reach": {"q": ids["bq"], "k": ids["bk"]}}
