"""What a normalizer finder returns, and what finders share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import ONE, ZERO, index, indices
from attnc.ir import Normalizer
from attnc.passes.detect.env import step_into
from attnc.passes.detect.graph import (
    argument,
    base_name,
    is_float_cast,
    normal_dims,
    op_name,
    shape,
    tensor_of,
)
from attnc.passes.detect.views import At, Index, stepped


@dataclass(frozen=True, slots=True)
class Sink:
    """A logit that is an operand of ``logaddexp``, whose value ``reader`` takes off the scores."""

    reader: fx.Node
    total: fx.Node
    operand: fx.Node

    def at(self, weights: Index) -> At:
        """Return where the logit is read for the element ``weights`` of the weights."""
        row, _ = source_of(step_into(At(self.reader, weights), self.total))
        at = step_into(row, self.operand)
        while (further := stepped(at)) is not None:
            at = further[0]
        return at


@dataclass(frozen=True, slots=True)
class Anchor:
    """A normalizer: ``weights`` = norm over axis ``dim`` of ``scores`` (same shape).

    With ``denominator`` set the weights are not divided yet: the value contraction's result is divided by
    that node later. ``sink`` is where a logit beside the scores enters the denominator. ``bare`` says that
    exponentials are summed from which the row's own maximum was not taken off; ``rounds`` that the log-sum-
    exp itself is subtracted, which loses a row's count of keys in rounding where all its scores are huge.
    ``inner`` are the nodes between scores and weights, weights included.
    """

    weights: fx.Node
    scores: fx.Node
    dim: int
    norm: Normalizer
    inner: tuple[fx.Node, ...]
    denominator: fx.Node | None = None
    sink: Sink | None = None
    rounds: bool = False
    bare: bool = False


def anywhere(node: fx.Node) -> Index:
    """Return the index of any element of a node: one fresh index variable per axis that is longer than 1."""
    return tuple(ZERO if n == ONE else index(f"n{i}", n) for i, n in enumerate(shape(node)))


def source_of(at: At) -> tuple[At, tuple[fx.Node, ...]]:
    """Follow an element back through views, casts and the first result of a pair.

    Returns where it ends and the nodes passed.
    """
    passed: list[fx.Node] = []
    while True:
        step = stepped(at)
        if step is not None:
            following = step[0]
        elif is_float_cast(at.node):
            following = step_into(at, at.node.args[0])
        elif (
            op_name(at.node) == "py.getitem" and at.node.args[1] == 0 and isinstance(at.node.args[0], fx.Node)
        ):
            following = At(at.node.args[0], at.index)
        else:
            return at, tuple(passed)
        passed.append(at.node)
        at = following


def without_maximum(src: fx.Node, dim: int) -> tuple[fx.Node, tuple[fx.Node, ...], bool]:
    """Return ``s`` and the nodes passed for ``s - m``, ``m`` a maximum of ``s``; else the node itself.

    ``m`` must be the same along the normalized axis, whichever axes the maximum was taken over. The third
    value says that it is the maximum of the row: then the row's greatest exponential is 1, which that of a
    maximum over more axes does not promise.
    """
    if base_name(src) != "sub" or argument(src, 2, "alpha", 1) != 1:
        return src, (), False
    s, m = src.args[:2]
    if not isinstance(s, fx.Node) or not isinstance(m, fx.Node) or tensor_of(m) is None:
        return src, (), False
    here = anywhere(src)
    found, passed = source_of(step_into(At(src, here), m))
    if base_name(found.node) not in ("amax", "max") or found.node.args[0] is not s or shape(s) != shape(src):
        return src, (), False
    along = set(indices(here[dim]))
    if any(along & set(indices(x)) for x in found.index):
        return src, (), False
    dims = argument(found.node, 1, "dim")
    own = isinstance(dims, int | list | tuple) and normal_dims(dims, len(shape(s))) == (dim,)
    return s, (src, *passed, found.node), own


def divisor_of(node: fx.Node, numerator: fx.Node, index: Index) -> tuple[At, tuple[fx.Node, ...]] | None:
    """Return where the divisor of ``numerator / x`` or ``numerator * (1 / x)`` is read, and the nodes passed.

    ``index`` is that of the element of ``node``. None if ``node`` is no such division.
    """
    if len(node.args) < 2 or node.kwargs.get("rounding_mode") or numerator not in node.args[:2]:
        return None
    a, b = node.args[:2]
    if base_name(node) == "div" and a is numerator:
        return _read(At(node, index), b)
    if base_name(node) != "mul":
        return None
    factor = _read(At(node, index), b if a is numerator else a)
    if factor is None:
        return None
    at, passed = factor
    if base_name(at.node) == "mul" and at.node.args[1] == 1:  # what 1 / x is in Python
        factor = _read(at, at.node.args[0])
        assert factor is not None, "a product has a tensor"
        at, passed = factor[0], (*passed, at.node, *factor[1])
    if base_name(at.node) == "reciprocal":
        below = _read(at, at.node.args[0])
    elif base_name(at.node) == "div" and at.node.args[0] == 1 and not at.node.kwargs.get("rounding_mode"):
        below = _read(at, at.node.args[1])
    else:
        return None
    return None if below is None else (below[0], (*passed, at.node, *below[1]))


def _read(at: At, x: object) -> tuple[At, tuple[fx.Node, ...]] | None:
    if not isinstance(x, fx.Node) or tensor_of(x) is None:
        return None
    return source_of(step_into(at, x))
