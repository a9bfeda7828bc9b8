"""Norms of queries and keys along their features: RMSNorm, L2, LayerNorm, fused or spelled out.

A spelled-out norm is ``u * r`` where ``r`` does not vary along the features and comes from a reduction over
them.  Which norm it is follows from the power that ``r`` takes of which reduction: the mean square to the
power -1/2 is RMSNorm (arXiv:1910.07467), the sum of squares L2 (QK-norm, arXiv:2010.04245), and with the mean
taken off first it is LayerNorm (arXiv:1607.06450).  A gain that follows changes nothing in the name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc import expr as E
from attnc.expr import ONE, ZERO
from attnc.passes.analyze.operands.place import feature_of
from attnc.passes.detect.env import step_into
from attnc.passes.detect.graph import (
    argument,
    base_name,
    is_float_cast,
    normal_dims,
    op_name,
    ratio_of_numbers,
    shape,
    tensor_of,
)
from attnc.passes.detect.views import At, stepped

LONGEST = 12
"""Ops between a reduction and the factor that is made of it."""
_FUSED = {"layer_norm": "layer-norm", "native_layer_norm": "layer-norm"}
_FUSED |= {"rms_norm": "rms-norm", "_fused_rms_norm": "rms-norm"}
_REDUCTIONS = frozenset({"mean", "sum", "linalg_vector_norm", "var", "std"})


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: its name, and the element that it is taken of."""

    name: str
    of: At


def norm_at(at: At) -> Norm | None:
    """Return the norm that made an element, None if none did or it is not along the features."""
    fused = _fused(at)
    if fused is not None:
        return fused
    split = _split(at)
    return None if split is None else _spelled(*split)


def is_normalized(at: At) -> bool:
    """Say whether an element is a product of a row's element with a factor reduced from a row."""
    return _split(at) is not None


def _fused(at: At) -> Norm | None:
    node = at.node
    if op_name(node) == "py.getitem" and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    name = _FUSED.get(base_name(node))
    axes = argument(node, 1, "normalized_shape")
    axis = _feature_axis(at)
    if name is None or axis is None or len(axes) != 1 or axis != len(at.index) - 1:
        return None
    src = node.args[0]
    assert isinstance(src, fx.Node), f"{node} normalizes no tensor"
    return Norm(name + _width(at, axis), At(src, at.index))


def _feature_axis(at: At) -> int | None:
    f = feature_of(at)
    axes = [i for i, x in enumerate(at.index) if f is not None and f in E.indices(x)]
    return axes[0] if len(axes) == 1 else None


def _width(at: At, axis: int) -> str:
    """Say in words where the norm runs over more than one head's features."""
    f = feature_of(at)
    return "" if f is not None and shape(at.node)[axis] == f.args[1] else " over all heads"


def _split(at: At) -> tuple[At, At, float] | None:
    """Return the row's element, its factor, and 1 for times or -1 for over; None if there is none."""
    node, f = at.node, feature_of(at)
    if f is None or base_name(node) not in ("mul", "div") or node.kwargs.get("rounding_mode"):
        return None
    a, b = node.args[:2]
    if (
        not isinstance(a, fx.Node)
        or not isinstance(b, fx.Node)
        or tensor_of(a) is None
        or tensor_of(b) is None
    ):
        return None
    orders = ((a, b), (b, a)) if base_name(node) == "mul" else ((a, b),)
    for u, r in orders:
        row = _through_views(step_into(at, r))
        if feature_of(row) is None and _reduction(row.node) is not None:
            whole = _through_casts(step_into(at, u))
            return (whole, row, 1.0 if base_name(node) == "mul" else -1.0) if feature_of(whole) else None
    return None


def _through_views(at: At) -> At:
    while True:
        step = stepped(at)
        if step is None and not is_float_cast(at.node):
            return at
        at = step[0] if step is not None else step_into(at, at.node.args[0])


def _through_casts(at: At) -> At:
    while is_float_cast(at.node):
        at = step_into(at, at.node.args[0])
    return at


# ---------------------------------------------------------------- from the factor to the reduction


@dataclass(slots=True)
class _Chain:
    """A reduction and what is done to its result: a power, and whether a number scales it."""

    node: fx.Node
    power: float
    scaled: bool


def _reduction(node: fx.Node) -> _Chain | None:
    """Follow a factor back to the reduction that it is a power of; added and least numbers do not matter."""
    power, scaled = 1.0, False
    for _ in range(LONGEST):
        name = base_name(node)
        if name in _REDUCTIONS:
            return _Chain(node, power, scaled)
        src = node.args[0] if node.args else None
        if not isinstance(src, fx.Node) or tensor_of(src) is None:
            return None
        other = argument(node, 1, "other")
        if name in ("rsqrt", "sqrt", "reciprocal"):
            power *= {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0}[name]
        elif name == "pow":
            exponent = ratio_of_numbers(other)
            if exponent is None:
                return None
            power *= exponent
        elif name in ("mul", "div") and ratio_of_numbers(other) is not None:
            scaled = scaled or ratio_of_numbers(other) != 1
        elif name in ("add", "clamp_min", "clamp", "maximum"):
            if isinstance(other, fx.Node) and tensor_of(other) is not None and shape(other):
                return None
        elif stepped(At(node, _origin(node))) is None and not is_float_cast(node):
            return None
        node = src
    return None


def _origin(node: fx.Node) -> tuple[E.Expr, ...]:
    return (ZERO,) * len(shape(node))


def _spelled(u: At, row: At, sign: float) -> Norm | None:
    """Name the norm ``u * r**sign`` by the reduction that ``r`` comes from."""
    chain, axis = _reduction(row.node), _feature_axis(u)
    if chain is None or axis is None or not _reduces(chain.node, axis, len(u.index)):
        return None
    src, power = chain.node.args[0], chain.power * sign
    assert isinstance(src, fx.Node), f"{chain.node} reduces no tensor"
    centered = _centered(u, axis)
    kind, wide = base_name(chain.node), _width(u, axis)
    if kind in ("mean", "sum"):
        square = _squared(src)
        if power != -0.5 or square is None or not _same_row(square, u.node):
            return None
        name = "rms-norm" if kind == "mean" or chain.scaled else "l2-norm"
        return Norm("layer-norm" + wide, centered) if centered is not None else Norm(name + wide, u)
    if kind == "linalg_vector_norm":
        if power != -1.0 or argument(chain.node, 1, "ord", 2) != 2 or not _same_row(src, u.node):
            return None
        return Norm(("rms-norm" if chain.scaled else "l2-norm") + wide, u)
    if centered is None or power != (-0.5 if kind == "var" else -1.0) or not _same_row(src, centered.node):
        return None
    return Norm("layer-norm" + wide, centered)


def _reduces(node: fx.Node, axis: int, rank: int) -> bool:
    """Say whether a reduction runs over exactly one axis of a tensor of ``rank`` axes."""
    dims = argument(node, 2 if base_name(node) == "linalg_vector_norm" else 1, "dim")
    src = node.args[0]
    assert isinstance(src, fx.Node), f"{node} reduces no tensor"
    return (
        isinstance(dims, int | list | tuple)
        and len(shape(src)) == rank
        and normal_dims(dims, rank) == (axis,)
    )


def _squared(node: fx.Node) -> fx.Node | None:
    """Return x for a node that is ``x * x``."""
    node = _uncast(node)
    if base_name(node) == "pow" and ratio_of_numbers(node.args[1]) == 2:
        return node.args[0]  # type: ignore[return-value]
    if base_name(node) == "square" or (base_name(node) == "mul" and node.args[0] is node.args[1]):
        return node.args[0]  # type: ignore[return-value]
    return None


def _same_row(a: fx.Node, b: fx.Node) -> bool:
    """Say whether two nodes hold the same value, casts apart: one node, or one elementwise op said twice."""
    a, b = _uncast(a), _uncast(b)
    if a is b:
        return True
    twice = op_name(a) == op_name(b) and base_name(a) in ("add", "sub", "mul") and a.kwargs == b.kwargs
    return twice and _uncast(a.args[0]) is _uncast(b.args[0]) and a.args[1:] == b.args[1:]  # type: ignore[arg-type]


def _uncast(node: fx.Node) -> fx.Node:
    while isinstance(node, fx.Node) and is_float_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _centered(u: At, axis: int) -> At | None:
    """Return x for an element of ``x - mean(x)`` along the axis."""
    node = u.node
    if base_name(node) != "sub" or argument(node, 2, "alpha", 1) != 1:
        return None
    x, m = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(m, fx.Node) or tensor_of(m) is None:
        return None
    mean = _through_views(step_into(u, m)).node
    if base_name(mean) != "mean" or not _reduces(mean, axis, len(u.index)):
        return None
    same = _same_row(mean.args[0], x)  # type: ignore[arg-type]
    return At(x, u.index) if same and shape(x)[axis] != ONE else None
