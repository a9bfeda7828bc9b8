"""What a normalizer finder returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.ir import Softmax
from attnc.passes.detect.graph import argument, base_name, normal_dims, op_name, shape

VIEWS = frozenset({"unsqueeze", "view", "expand", "clone", "_to_copy", "reshape"})


@dataclass(frozen=True, slots=True)
class Anchor:
    """A normalizer: ``weights`` = norm over axis ``dim`` of ``scores`` (same shape).

    With ``denominator`` set the weights are not divided yet: the value contraction's result is divided by that node later.
    ``inner`` are the nodes between scores and weights, weights included.
    """

    weights: fx.Node
    scores: fx.Node
    dim: int
    norm: Softmax
    inner: tuple[fx.Node, ...]
    denominator: fx.Node | None = None


def without_row_maximum(src: fx.Node, dim: int) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return ``s`` for ``s - max(s)`` with the maximum taken over the normalized axis, else the node itself."""
    if base_name(src) != "sub" or src.kwargs.get("alpha", 1) != 1:
        return src, ()
    s, m = src.args
    through: list[fx.Node] = [src]
    while isinstance(m, fx.Node) and base_name(m) in VIEWS | {"detach"}:
        through.append(m)
        m = m.args[0]
    if isinstance(m, fx.Node) and op_name(m) == "py.getitem" and m.args[1] == 0:
        through.append(m)
        m = m.args[0]
    if not isinstance(m, fx.Node) or not isinstance(s, fx.Node) or m.args[0] is not s:
        return src, ()
    name, dims = base_name(m), argument(m, 1, "dim")
    if name not in ("amax", "max") or dims is None or dims == []:
        return src, ()
    if normal_dims(dims, len(shape(s))) != (dim,) or not argument(m, 2, "keepdim", False):
        return src, ()
    return s, (*through, m)
