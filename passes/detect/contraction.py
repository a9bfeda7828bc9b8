"""Contractions as one thing, an einsum with labels.

Matmul, bmm, baddbmm, addmm, mm, einsum, linear, inner, tensordot, and a product that is summed.
``contraction(node)`` names every axis of both operands and of the result; an axis that is in both operands
and not in the result is summed. Batched and broadcast matmuls, any letters and any layout come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from string import ascii_letters

from torch import fx

from attnc.expr import ONE, ZERO, Expr, index
from attnc.passes.detect.graph import (
    argument,
    base_name,
    normal_dims,
    op_name,
    ratio_of_numbers,
    shape,
    tensor_of,
    users,
)
from attnc.passes.detect.views import At, Index, inserted_axes


@dataclass(frozen=True, slots=True)
class Contraction:
    """A sum of products, ``node[out] = alpha * sum lhs[left] * rhs[right] + beta * base``.

    Labels are one letter per axis.
    """

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    left: str
    right: str
    out: str
    alpha: float = 1.0
    base: fx.Node | None = None
    beta: float = 1.0

    @property
    def summed(self) -> str:
        """Labels in both operands and not in the result."""
        return "".join(c for c in self.left if c in self.right and c not in self.out)

    @property
    def between(self) -> tuple[fx.Node, ...]:
        """The product of the operands, where it is a node of its own."""
        product = self.node.args[0]
        return (product,) if base_name(self.node) == "sum" and isinstance(product, fx.Node) else ()

    def sizes(self) -> dict[str, Expr]:
        """Return the size of each label (the larger one where an operand broadcasts)."""
        out: dict[str, Expr] = {}
        for labels, node in ((self.left, self.lhs), (self.right, self.rhs)):
            for c, n in zip(labels, shape(node), strict=True):
                if out.get(c, ONE) == ONE:
                    out[c] = n
        return out

    def operands(self, at: Index, tag: str) -> tuple[At, At, dict[str, Expr]]:
        """Return both operands' elements for result element ``at``.

        Summed labels get fresh indices named by ``tag``.
        """
        env = dict(zip(self.out, at, strict=True))
        sizes = self.sizes()
        fresh = {c: ZERO if sizes[c] == ONE else index(f"{tag}.{c}", sizes[c]) for c in self.summed}
        env.update(fresh)

        def pick(labels: str, node: fx.Node) -> At:
            return At(
                node, tuple(ZERO if n == ONE else env[c] for c, n in zip(labels, shape(node), strict=True))
            )

        return pick(self.left, self.lhs), pick(self.right, self.rhs), fresh


def contraction(node: fx.Node) -> Contraction | None:
    """Return the node as a labelled contraction of two tensors, None if it is not one."""
    rule = _RULES.get(base_name(node))
    return None if rule is None else rule(node)


def contractions_of(reader: fx.Node) -> list[Contraction]:
    """Return the contractions that ``reader`` is, or is the product of: itself, or sums of what it gives."""
    if base_name(reader) == "mul":
        return [c for u in users(reader) if base_name(u) == "sum" and (c := contraction(u)) is not None]
    c = contraction(reader)
    return [] if c is None else [c]


def _letters(n: int, but: str = "") -> str:
    """Return ``n`` labels that are not in ``but``."""
    return "".join(c for c in ascii_letters if c not in but)[:n]


def _product(node: fx.Node) -> Contraction | None:
    a, b = node.args[:2]
    return _matmul(node, a, b)


def _matmul(node: fx.Node, a: object, b: object) -> Contraction | None:
    if not _are_tensors(a, b):
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    m, n = len(shape(a)), len(shape(b))
    if m < 2 or n < 2:
        return None
    batch = _letters(max(m, n) - 2, "mnz")
    left, right = batch[len(batch) - (m - 2) :] + "mz", batch[len(batch) - (n - 2) :] + "zn"
    return Contraction(node, a, b, left, right, batch + "mn")


def _added(node: fx.Node) -> Contraction | None:
    """Read baddbmm and addmm, ``beta * base + alpha * a @ b``."""
    base, a, b = node.args[:3]
    beta, alpha = (ratio_of_numbers(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
    c = _matmul(node, a, b)
    if c is None or alpha is None or beta is None or not isinstance(base, fx.Node):
        return None
    return replace(c, alpha=alpha, base=base if beta else None, beta=beta)


def _linear(node: fx.Node) -> Contraction | None:
    """Read ``linear(a, b)``, which is ``a @ b.T``; with a bias it is a layer."""
    a, b = node.args[:2]
    if argument(node, 2, "bias") is not None or not _are_tensors(a, b):
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    if len(shape(b)) != 2:
        return None
    rows = _letters(len(shape(a)) - 1, "nz")
    return Contraction(node, a, b, rows + "z", "nz", rows + "n")


def _inner(node: fx.Node) -> Contraction | None:
    a, b = node.args[:2]
    if not _are_tensors(a, b) or not shape(a) or not shape(b):  # type: ignore[arg-type]
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    rows = _letters(len(shape(a)) - 1, "z")
    columns = _letters(len(shape(b)) - 1, rows + "z")
    return Contraction(node, a, b, rows + "z", columns + "z", rows + columns)


def _tensordot(node: fx.Node) -> Contraction | None:
    a, b = node.args[:2]
    ours, theirs = argument(node, 2, "dims_self"), argument(node, 3, "dims_other")
    if not _are_tensors(a, b) or not isinstance(ours, list | tuple) or not isinstance(theirs, list | tuple):
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    m, n = len(shape(a)), len(shape(b))
    left = _letters(m)
    right = list(_letters(n, left))
    for i, j in zip(normal_dims(ours, m), normal_dims(theirs, n), strict=True):
        right[j] = left[i]
    summed = {left[i] for i in normal_dims(ours, m)}
    out = "".join(c for c in (*left, *right) if c not in summed)
    return Contraction(node, a, b, left, "".join(right), out)


@dataclass(frozen=True, slots=True)
class _Axes:
    """The labels of an operand's axes: those longer than 1, and those of length 1 by who made them."""

    long: frozenset[str]
    own: frozenset[str]
    inserted: frozenset[str]

    @classmethod
    def of(cls, node: fx.Node, labels: str) -> _Axes:
        """Sort the axes of ``node``."""
        made = {labels[d] for d in inserted_axes(node)}
        long = {c for c, n in zip(labels, shape(node), strict=True) if n != ONE}
        return cls(frozenset(long), frozenset(labels) - long - made, frozenset(made - long))

    def beside(self, other: _Axes) -> frozenset[str]:
        """Return the axes that this operand has and the other has not."""
        return (self.long - other.long) | (self.own & other.inserted)

    def common(self, other: _Axes) -> frozenset[str]:
        """Return the axes that both operands have."""
        return (self.long & other.long) | (self.own & other.own)


def _summed_product(node: fx.Node) -> Contraction | None:
    """Read ``(a * b).sum(dims)``, where each operand is constant along an axis that the other has.

    An axis of length 1 is one that an operand lacks if an ``unsqueeze`` made it, and its own otherwise.
    """
    product, dims = node.args[0], argument(node, 1, "dim")
    if op_name(node) != "sum.dim_IntList" or not dims or not isinstance(product, fx.Node):
        return None
    a, b = product.args[:2] if base_name(product) == "mul" else (None, None)
    t, u = tensor_of(node), tensor_of(product)
    if not _are_tensors(a, b) or a is b or t is None or u is None or t.dtype != u.dtype:
        return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    labels = _letters(len(shape(product)))
    left, right = labels[len(labels) - len(shape(a)) :], labels[len(labels) - len(shape(b)) :]
    over = {labels[d] for d in normal_dims(dims, len(labels))}
    ours, theirs = _Axes.of(a, left), _Axes.of(b, right)
    if not ours.beside(theirs) - over or not theirs.beside(ours) - over or not over <= ours.common(theirs):
        return None
    kept = iter(_letters(len(over), labels))
    keeps_dims = bool(argument(node, 2, "keepdim", False))
    out = "".join(c if c not in over else next(kept) for c in labels if c not in over or keeps_dims)
    return Contraction(node, a, b, left, right, out)


def _einsum(node: fx.Node) -> Contraction | None:
    equation, tensors = argument(node, 0, "equation"), argument(node, 1, "tensors")
    if not isinstance(equation, str) or not isinstance(tensors, list | tuple) or len(tensors) != 2:
        return None
    a, b = tensors
    if not _are_tensors(a, b):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    if "." in equation:
        spelled = _without_ellipsis(left, right, out, bool(arrow), len(shape(a)), len(shape(b)))
        left, right, out, arrow = *spelled, "->"
    letters = left + right
    if not arrow:
        out = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    repeated = len(set(left)) < len(left) or len(set(right)) < len(right)
    if repeated or any(c not in out and (c in left) != (c in right) for c in letters):
        return None
    return Contraction(node, a, b, left, right, out)


def _without_ellipsis(left: str, right: str, out: str, arrow: bool, m: int, n: int) -> tuple[str, str, str]:
    """Spell out the axes that ``...`` stands for, aligned at the right as einsum does."""
    sides = ((left, m), (right, n))
    ranks = [rank - len(side.replace("...", "")) if "..." in side else 0 for side, rank in sides]
    extra = _letters(max(ranks), left + right)
    if not arrow:
        letters = (left + right).replace(".", "")
        out = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    left, right = (
        side.replace("...", extra[len(extra) - r :]) for (side, _), r in zip(sides, ranks, strict=True)
    )
    return left, right, out.replace("...", extra)


def _are_tensors(*xs: object) -> bool:
    return all(isinstance(x, fx.Node) and tensor_of(x) is not None for x in xs)


_RULES: dict[str, Callable[[fx.Node], Contraction | None]] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "linalg_matmul"), _product),
    **dict.fromkeys(("baddbmm", "addmm"), _added),
    "linear": _linear,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "sum": _summed_product,
}
