"""Emit a symbolic condition or integer as graph nodes: a bool or int64 tensor with one axis per role."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from attnc import expr as E
from attnc.editing import Builder
from attnc.expr import Expr
from attnc.passes.detect.found import Computed
from attnc.passes.detect.layout import size_of, to_roles
from attnc.passes.detect.views import At

aten = torch.ops.aten
Resolve = Callable[[str], fx.Node]


def emit(
    c: Computed, build: Builder, resolve: Resolve, work: Mapping[str, fx.Node], device: torch.device
) -> fx.Node:
    """Return the node of ``c.value``.

    ``resolve`` maps names of the working graph to nodes of the edited one.
    """
    emitter = _Emitter(c, build, resolve, work, device)
    out = emitter.number(c.value) if E.is_int(c.value) else emitter.predicate(c.value)
    return out if len(c.axes) == 4 else build.expand(out, [size_of(a) for a in c.axes])


class _Emitter:
    """Emit one condition.

    Every number and predicate has one axis per role, of size 1 where it does not vary.
    """

    def __init__(
        self, c: Computed, build: Builder, resolve: Resolve, work: Mapping[str, fx.Node], device: torch.device
    ) -> None:
        self.axes, self.build, self.resolve, self.work, self.device = c.axes, build, resolve, work, device

    def predicate(self, e: Expr) -> fx.Node:
        call = self.build.call
        if e.op in ("and", "or"):
            target = aten.bitwise_and.Tensor if e.op == "and" else aten.bitwise_or.Tensor
            parts = [self.predicate(p) for p in e.args[0]]
            out = parts[0]
            for p in parts[1:]:
                out = call(target, out, p)
            return out
        if e.op == "not":
            inner = e.args[0]
            if inner.op == "eq0":
                return self._compare(inner.args[0], aten.ne.Scalar)
            return call(aten.bitwise_not.default, self.predicate(inner))
        if e.op == "le0":
            return self._compare(e.args[0], aten.le.Scalar)
        if e.op == "eq0":
            return self._compare(e.args[0], aten.eq.Scalar)
        if e.op == "load":
            return self._load(e)
        if e.op in ("true", "false"):
            return call(
                aten.full.default, [1] * len(self.axes), e.op == "true", dtype=torch.bool, device=self.device
            )
        raise AssertionError(f"a {e.op} is no predicate that can be emitted")

    def _load(self, e: Expr) -> fx.Node:
        at = At(self.work[e.args[0]], e.args[1])
        recipe = to_roles(at, self.axes, expand=False)
        recipe = to_roles(at, self.axes) if recipe is None else recipe
        assert recipe is not None, f"{e} was accepted by detection, but has no recipe"
        return self.build.apply(self.resolve(recipe.source), recipe.steps)

    def _whole(self, x: fx.Node) -> fx.Node:
        """Return a tensor of whole numbers as int64, so that differences neither wrap nor lose a sign."""
        return x if x.meta["val"].dtype == torch.int64 else self.build.call(aten.to.dtype, x, torch.int64)

    def _compare(self, p: Expr, target: Callable[..., object]) -> fx.Node:
        """Emit ``p <op> 0``, as ``terms <op> -constant``."""
        const = sum(c for m, c in E.terms(p) if not m)
        rest = E.sub(p, E.integer(const))
        return self.build.call(target, self.number(rest), -const)

    def number(self, p: Expr) -> fx.Node:
        """Emit an integer polynomial that varies along some axis."""
        call = self.build.call
        total: fx.Node | None = None
        loose = E.ZERO
        for mono, c in E.terms(p):
            varying = [g for g in mono if g.op not in ("size", "opaque")]
            if not varying:
                loose = E.add(loose, E.mul(E.integer(c), E.product(E.generator(g) for g in mono)))
                continue
            part = self._generator(varying[0])
            for g in varying[1:]:
                part = call(aten.mul.Tensor, part, self._generator(g))
            fixed = E.product(E.generator(g) for g in mono if g not in varying)
            factor = self.build.size(E.mul(E.integer(c), fixed))
            if factor != 1:
                part = call(aten.mul.Scalar, part, factor)
            total = part if total is None else call(aten.add.Tensor, total, part)
        if total is None:
            ones = [1] * len(self.axes)
            total = call(
                aten.full.default, ones, self.build.size(loose), dtype=torch.int64, device=self.device
            )
            return total
        return total if loose == E.ZERO else call(aten.add.Scalar, total, self.build.size(loose))

    def _generator(self, g: Expr) -> fx.Node:
        if g.op == "load":
            return self._whole(self._load(g))
        if g.op == "where":
            c, a, b = g.args
            return self.build.call(aten.where.self, self.predicate(c), self.number(a), self.number(b))
        if g.op in ("floordiv", "mod"):
            x, n = self.number(g.args[0]), E.as_int(g.args[1])
            assert n is not None, f"{g} was accepted by detection, but has no constant divisor"
            if g.op == "mod":
                return self.build.call(aten.remainder.Scalar, x, n)
            return self.build.call(aten.div.Scalar_mode, x, n, rounding_mode="floor")
        return self._position(g)

    def _position(self, g: Expr) -> fx.Node:
        axis = next(i for i, atoms in enumerate(self.axes) if g in atoms)
        atoms = self.axes[axis]
        call, size = self.build.call, self.build.size
        x = call(aten.arange.default, size(size_of(atoms)), device=self.device)
        below = E.product(a.args[1] for a in atoms[atoms.index(g) + 1 :])
        if below != E.ONE:
            x = call(aten.div.Scalar_mode, x, size(below), rounding_mode="floor")
        if atoms.index(g) > 0:
            x = call(aten.remainder.Scalar, x, size(g.args[1]))
        shape = [E.ONE] * len(self.axes)
        shape[axis] = size_of(atoms)
        return self.build.reshape(x, shape)
