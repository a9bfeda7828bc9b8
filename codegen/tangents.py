"""The derivative of a spec along a direction, and the gradients of that, in plain torch.

``tangent`` is the derivative of the results along tangents of the inputs: q, k, v and every captured float
tensor.  Both functions run the spec on dual numbers; grouped keys and values are not expanded, and autograd
records nothing.
Source: Terminal Velocity Matching (arXiv:2511.19797) for a softmax over ``scale * q k^T``; here any spec.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnc import pointwise as P
from attnc.codegen.calls import check, stack, work_dtype
from attnc.codegen.dropout import factors
from attnc.duals import Dual, plus
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Gain,
    Normalized,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
    Step,
)
from attnc.masks import Full, Grid

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""An output, its log-sum-exp, and the tangent of each."""


def tangent(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    seed: Tensor | None = None,
) -> Results:
    """Return out and lse as ``execute`` does, and the tangent of each, in its dtype.

    ``tangents`` are those of (q, k, v, *captured), in the shapes of these; None stands for zeros.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: head counts or the number of captured tensors are not the spec's.
    """
    at = _Point(spec, q, k, v, captured, tangents, seed)
    weights, lse = at.weigh(at.scores())
    out = at.rows(at.stacked(at.dropped(weights)) @ at.v)
    tout, tlse = (torch.zeros_like(x.value) if x.tangent is None else x.tangent for x in (out, lse))
    return out.value.to(q.dtype), lse.value.contiguous(), tout.to(q.dtype), tlse.contiguous()


def tangent_gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    dout: Tensor | None,
    dlse: Tensor | None,
    dtout: Tensor | None,
    dtlse: Tensor | None,
    seed: Tensor | None = None,
) -> list[Dual]:
    """Return the gradients of (q, k, v, *captured) from those of ``tangent``'s results, in working precision.

    A dual's tangent is the gradient of the tensor, and its value that of the tensor's tangent.  For with J(x)
    the derivative of ``execute``, the gradient of a tangent t is ``J(x)^T dtout``, and that of x is
    ``J(x)^T dout + d/de J(x + e t)^T dtout``, the tangent of ``J(x + e t)^T (dtout + e dout)``: so this is
    the backward pass on dual numbers.  Read the other way, it is a backward pass with the gradients ``dtout``
    and ``dtlse``, and its tangent along ``tangents``, ``dout`` and ``dlse``.  None stands for zeros.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: head counts or the number of captured tensors are not the spec's.
    """
    at = _Point(spec, q, k, v, captured, tangents, seed)
    before: list[Dual] = []
    scores = at.scores(before)
    weights, lse = at.weigh(scores)
    dy = at.stacked(at.cotangent(dtout, dout, (*q.shape[:3], v.shape[3])))
    row = at.cotangent(dtlse, dlse, q.shape[:3])
    sums: dict[str, Dual] = {}
    dw = at.dropped(at.rows(dy @ _turned(at.v)))
    ds = at.pull_weights(scores, weights, lse, dw, row, sums)
    for step, state in zip(reversed(spec.scores), reversed(before), strict=True):
        ds = at.pull(step, state, ds, sums)
    ds = at.stacked(ds)
    dq, dk = at.rows(ds @ at.k), _turned(ds) @ at.stacked(at.q)
    dv = _turned(at.stacked(at.dropped(weights))) @ dy
    zeros = {n: Dual(torch.zeros_like(x.value, dtype=at.work)) for n, x in at.named.items()}
    return [dq, dk, dv, *(zeros | sums).values()]


def _turned(x: Dual) -> Dual:
    return x.linear(lambda x: x.transpose(-2, -1))


def _spread(x: Dual, like: Tensor) -> Dual:
    return x.linear(lambda x: x.expand_as(like))


class _Point:
    """Where a spec is differentiated: its inputs in working precision, with their tangents."""

    def __init__(
        self,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        tangents: Sequence[Tensor | None],
        seed: Tensor | None,
    ) -> None:
        check(spec, q, k, v, captured, seed)
        self.spec, self.work, self.seed = spec, work_dtype(q), seed
        given = (self._input(x, t) for x, t in zip((q, k, v, *captured), tangents, strict=True))
        self.q, self.k, self.v, *rest = given
        self.named = {o.name: x for o, x in zip(spec.captured, rest, strict=True)}
        self.keep: Tensor | None = None
        if not isinstance(spec.mask, Full):
            grid = Grid(q.shape[2], k.shape[2], q.device, self._values(), *q.shape[:2])
            self.keep = spec.mask.keep(grid)

    def _input(self, x: Tensor, t: Tensor | None) -> Dual:
        return Dual(x, t).linear(lambda x: x.to(self.work)) if x.is_floating_point() else Dual(x)

    def _values(self) -> dict[str, Tensor]:
        return {n: x.value for n, x in self.named.items()}

    def stacked(self, x: Dual) -> Dual:
        """Return ``[B, Hkv, group * Sq, D]`` from ``[B, H, Sq, D]``."""
        return x.linear(lambda x: stack(x, self.k.value))

    def dropped(self, x: Dual) -> Dual:
        """Return weights ``[B, H, Sq, Sk]``, or their gradients, after dropout."""
        if not self.spec.dropout:
            return x
        kept = factors(self.seed, self.spec.dropout, x.value)
        return x.linear(lambda x: x * kept)

    def rows(self, x: Dual) -> Dual:
        """Return ``[B, H, Sq, D]`` from ``[B, Hkv, group * Sq, D]``."""
        return x.linear(lambda x: x.view(*self.q.value.shape[:3], x.shape[3]))

    def cotangent(self, value: Tensor | None, tangent: Tensor | None, shape: Sequence[int]) -> Dual:
        """Return a gradient with its tangent; None stands for zeros."""
        if value is None:
            value = torch.zeros(shape, dtype=self.work, device=self.q.value.device)
        return Dual(value, tangent).linear(lambda x: x.to(self.work))

    def scores(self, before: list[Dual] | None = None) -> Dual:
        """Return the filled scores ``[B, H, Sq, Sk]``; append those before each step to ``before``."""
        s = self.rows(self.stacked(self.q) @ _turned(self.k))
        for step in self.spec.scores:
            if before is not None:
                before.append(s)
            s = self.push(step, s)
        if self.keep is None:
            return s
        return Dual(self.spec.fill.apply(s.value, self.keep), self._passed(s).tangent)

    def _passed(self, x: Dual) -> Dual:
        """Return what gets past the mask: nothing at a score that the fill replaces."""
        if self.keep is None or self.spec.fill.how == "add":
            return x
        hidden = ~self.keep
        return x.linear(lambda x: x.masked_fill(hidden, 0.0))

    def push(self, step: Step, s: Dual) -> Dual:
        """Return the scores after a step."""
        match step:
            case Scale(factor):
                return s.linear(lambda x: x * factor)
            case Bias(operand, sign):
                return s + _spread(self.named[operand], s.value).linear(lambda x: sign * x)
            case Gain(operand):
                return s * _spread(self.named[operand], s.value)
        step = _pointwise(step)
        return _spread(P.push_forward(step.term, self._read(step, s)), s.value)

    def pull(self, step: Step, s: Dual, ds: Dual, sums: dict[str, Dual]) -> Dual:
        """Return the gradient of the scores ``s`` before a step from that after; ``sums`` takes operands'."""

        def add(operand: str, gradient: Dual) -> None:
            shape = self.named[operand].value.shape
            found = gradient.linear(lambda x: x.sum_to_size(shape))
            sums[operand] = sums[operand] + found if operand in sums else found

        match step:
            case Scale(factor):
                return ds.linear(lambda x: x * factor)
            case Bias(operand, sign):
                add(operand, ds.linear(lambda x: sign * x))
                return ds
            case Gain(operand):
                add(operand, ds * s)
                return ds * self.named[operand]
        step = _pointwise(step)
        found = P.pull_back_duals(step.term, self._read(step, s), ds)
        for operand in step.operands:
            if operand in found:
                add(operand, found[operand])
        return found.get(P.SCORE, Dual(torch.zeros_like(s.value)))

    def _read(self, step: Pointwise, s: Dual) -> dict[str, Dual]:
        """Return what each name of an expression stands for."""
        found = {n: Dual(x) for n, x in step.values(s.value, self._values()).items()}
        return found | {n: self.named[n] for n in step.operands} | {P.SCORE: s}

    def weigh(self, s: Dual) -> tuple[Dual, Dual]:
        """Return the weights ``[B, H, Sq, Sk]`` and the log-sum-exp ``[B, H, Sq]``."""
        norm = self.spec.norm
        if isinstance(norm, Elementwise):
            nothing = Dual(s.value.new_zeros(s.value.shape[:-1]))
            return P.push_forward(P.parse_term(norm.expr), {P.SCORE: s}), nothing
        if isinstance(norm, Normalized):
            f = P.push_forward(P.parse_term(norm.expr), {P.SCORE: s})
            total, _ = _divisor(norm, f)
            share = _inverse(total)
            change = None if total.tangent is None else total.tangent * share.value
            return f * share, Dual(total.value.log(), change).linear(lambda x: x[..., 0])
        assert isinstance(norm, Softmax | SignedSoftmax | RoundedSoftmax), f"no tangent of {norm}"
        w, lse = norm.apply(s.value, self._values())
        mean = None if s.tangent is None else (w * s.tangent).sum(-1)
        moved = self.named[norm.sink].tangent if isinstance(norm.sink, str) else None
        if moved is not None:
            mean = plus(mean, self._sink_share(Dual(lse)).value * moved.view(1, -1, 1))
        if mean is None:
            return Dual(w), Dual(lse)
        fall = -mean[..., None]
        change = fall if s.tangent is None else self._signed(s, s.tangent) + fall
        return Dual(w, w * change), Dual(lse, mean)

    def pull_weights(self, s: Dual, w: Dual, lse: Dual, dw: Dual, row: Dual, sums: dict[str, Dual]) -> Dual:
        """Return the gradient of the scores before the fill from those of the weights and the log-sum-exp."""
        norm = self.spec.norm
        if isinstance(norm, Elementwise):
            found = P.pull_back_duals(P.parse_term(norm.expr), {P.SCORE: s}, dw)
            return self._passed(found.get(P.SCORE, Dual(torch.zeros_like(s.value))))
        row = row - (dw * w).linear(lambda x: x.sum(-1))
        if isinstance(norm, Normalized):
            term = P.parse_term(norm.expr)
            total, fixed = _divisor(norm, P.push_forward(term, {P.SCORE: s}))
            rows = row.linear(lambda x: x[..., None].masked_fill(fixed, 0.0).expand_as(dw.value))
            found = P.pull_back_duals(term, {P.SCORE: s}, (dw + rows) * _inverse(total))
            return self._passed(found.get(P.SCORE, Dual(torch.zeros_like(s.value))))
        if isinstance(norm.sink, str):
            sums[norm.sink] = (self._sink_share(lse) * row).linear(lambda x: x.sum((0, 2)))
        inner = dw.linear(lambda x: self._signed(s, x))
        return self._passed(w * (inner + row.linear(lambda x: x[..., None].expand_as(dw.value))))

    def _signed(self, s: Dual, x: Tensor) -> Tensor:
        return s.value.sign() * x if isinstance(self.spec.norm, SignedSoftmax) else x

    def _sink_share(self, lse: Dual) -> Dual:
        """Return the weight of the sink ``[B, H, Sq]``."""
        sink = self.named[str(self.spec.norm.sink)].linear(lambda x: x.view(1, -1, 1).expand_as(lse.value))
        moved = sink - lse
        share = torch.exp(moved.value)
        return Dual(share, None if moved.tangent is None else share * moved.tangent)


def _divisor(norm: Normalized, f: Dual) -> tuple[Dual, Tensor]:
    """Return what each row is divided by, ``[B, H, Sq, 1]``, and whether that is fixed."""
    total = f.linear(lambda x: x.sum(-1, keepdim=True))
    fixed = total.value + norm.added < norm.least
    moved = None if total.tangent is None else total.tangent.masked_fill(fixed, 0.0)
    return Dual((total.value + norm.added).clamp(min=norm.least), moved), fixed


def _inverse(x: Dual) -> Dual:
    y = 1 / x.value
    return Dual(y, None if x.tangent is None else -x.tangent * y * y)


def _pointwise(step: Step) -> Pointwise:
    """Return a step as an expression."""
    if isinstance(step, Softcap):
        return Pointwise(f"({step.cap!r}*tanh((s/{step.cap!r})))")
    assert isinstance(step, Pointwise), f"expected a step with a known derivative, found {step}"
    return step
