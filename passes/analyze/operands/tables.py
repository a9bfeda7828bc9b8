"""What is a table and what is data: tables of cosines and sines are checked where their values are known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.analyze.operands.products import Product
from attnc.passes.detect.env import Env

ROUNDINGS = 8
"""Units of rounding that a table's cos^2 + sin^2 may be off: each is rounded once, and squared."""


class Tables:
    """Facts about the tensors that elements are read from."""

    def __init__(
        self, env: Env, nodes: Mapping[str, fx.Node], values: Mapping[str, torch.Tensor | None]
    ) -> None:
        self.env, self.nodes, self.values = env, nodes, values

    def is_table(self, e: Expr) -> bool:
        """Say whether an expression reads nothing that depends on the user's inputs."""
        return all(self.env.pure(self.nodes[x.args[0]]) for x in E.loads(e))

    def source(self, p: Product) -> Expr | None:
        """Return the one factor of a product that is data, an element of a tensor computed by the model."""
        found = [f for f in p.factors if read(f) and not self.is_table(f)]
        return found[0] if len(found) == 1 else None

    def may_hold_angles(self, e: Expr) -> bool:
        """Say whether a factor may be an element of a table of cosines or sines.

        What the model trains is none, and of a weight that cannot be looked at nobody knows.
        """
        load = read(e)
        if load is None:
            return False
        node = self.nodes[load.args[0]]
        if node.name in self.values:
            t = self.values[node.name]
            return t is not None and not t.requires_grad
        return node.op == "placeholder" or self.env.pure(node)

    def same_turn(self, a: tuple[Expr, ...], b: tuple[Expr, ...]) -> bool | None:
        """Compare the angles of a pair: True if equal, False if that is left to tables, None if they differ.

        An angle is one expression, or two elements: its cosine and its sine.
        """
        if len(a) == 1:
            return True if a == b else None
        tables = [self._column(e) for e in (*a, *b)]
        if any(t is None for t in tables):
            return False
        c, s, other_c, other_s = (t.double() for t in tables if t is not None)
        unit = ROUNDINGS * max(torch.finfo(t.dtype).eps for t in tables if t is not None)
        radius = c * c + s * s
        level = float(radius.max()) if radius.numel() else 0.0
        even = level > 0 and bool(((radius - level).abs() <= unit * level).all())
        return True if even and torch.equal(c, other_c) and torch.equal(s, other_s) else None

    def _column(self, e: Expr) -> torch.Tensor | None:
        """Return all values that an element of a table takes as its free indices vary; None if unknown."""
        load = read(e)
        t = self.values.get(load.args[0]) if load is not None else None
        if load is None or t is None or isinstance(t, torch._subclasses.FakeTensor) or t.is_meta:
            return None
        place = tuple(slice(None) if (n := E.as_int(x)) is None else n for x in load.args[1])
        column = t.detach()[place]
        if column.is_complex():
            column = column.real if e.args[0] == "real" else column.imag
        return column if column.is_floating_point() else None


def read(e: Expr) -> Expr | None:
    """Return the load that a factor is, or is a part of."""
    if e.op == "load":
        return e
    if e.op == "call" and e.args[0] in ("real", "imag") and e.args[1][0].op == "load":
        return e.args[1][0]  # type: ignore[no-any-return]
    return None
