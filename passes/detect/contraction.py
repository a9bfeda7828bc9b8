"""Contractions: matmul, bmm, baddbmm, mm, einsum and linear as one thing, an einsum with labels.

``contraction(node)`` names every axis of both operands and of the result; an axis that is in both operands
and not in the result is summed. Batched and broadcast matmuls, any letters and any layout come out the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnc.expr import ONE, ZERO, Expr, index
from attnc.passes.detect.graph import argument, base_name, ratio_of_numbers, shape, tensor_of
from attnc.passes.detect.views import At, Index


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
    name = base_name(node)
    if name in ("matmul", "bmm", "mm"):
        a, b = node.args[:2]
        return _matmul(node, a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None
    if name == "baddbmm":
        base, a, b = node.args[:3]
        beta, alpha = (ratio_of_numbers(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
        c = _matmul(node, a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None
        if c is None or alpha is None or beta is None or not isinstance(base, fx.Node):
            return None
        return Contraction(node, c.lhs, c.rhs, c.left, c.right, c.out, alpha, base if beta else None, beta)
    if name == "einsum":
        return _einsum(node)
    return None


def _matmul(node: fx.Node, a: fx.Node, b: fx.Node) -> Contraction | None:
    if tensor_of(a) is None or tensor_of(b) is None:
        return None
    m, n = len(shape(a)), len(shape(b))
    if m < 2 or n < 2:
        return None
    batch = "abcdefgh"[: max(m, n) - 2]
    return Contraction(
        node, a, b, batch[len(batch) - (m - 2) :] + "mz", batch[len(batch) - (n - 2) :] + "zn", batch + "mn"
    )


def _einsum(node: fx.Node) -> Contraction | None:
    equation, tensors = argument(node, 0, "equation"), argument(node, 1, "tensors")
    if (
        not isinstance(equation, str)
        or not isinstance(tensors, list | tuple)
        or len(tensors) != 2
        or "..." in equation
    ):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    letters = left + right
    if not arrow:
        out = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    repeated = len(set(left)) < len(left) or len(set(right)) < len(right)
    if repeated or any(c not in out and (c in left) != (c in right) for c in letters):
        return None
    a, b = tensors
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    return Contraction(node, a, b, left, right, out)
