"""The operator ``attnc::attend``: one attention site as one graph node, on every device, with a gradient.

``attend(q, k, v, captured, spec, seed=None)`` runs the spec with this text, and returns ``(out, lse)``.
Layouts are those of ``attnc.ir``: q ``[B, H, Sq, Dqk]``, k ``[B, Hkv, Sk, Dqk]``, v ``[B, Hkv, Sk, Dv]``;
out ``[B, H, Sq, Dv]`` in q's dtype, lse ``[B, H, Sq]`` (natural log; fp64 for fp64 inputs, else fp32).  The
spec executed is the implementation everywhere; on CUDA the emitted Triton kernel takes its place where it can
run.

Derivatives in reverse and in forward mode, and of one in the other: ``attnc.codegen.forward_mode``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.codegen.calls import check, stack, work_dtype
from attnc.codegen.dropout import factors
from attnc.codegen.forward_mode import attend_autograd, attend_backward_autograd
from attnc.codegen.operators import operator, select
from attnc.errors import UnsupportedError
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Gain,
    Normalized,
    Pointwise,
    Scale,
    Softcap,
    Softmax,
    Step,
)
from attnc.masks import Full, Grid
from attnc.pointwise import SCORE
from attnc.printer import parse

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] captured, str spec, Tensor? seed=None) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor[] captured, Tensor? out, Tensor? lse,"
    " str spec, bool[] needs, Tensor? seed=None) -> Tensor[]"
)


def execute(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor] = (),
    listed: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``spec`` in plain torch as ``spec(...)`` does, but never expand grouped keys and values.

    ``listed``, bool, broadcasts to ``[B, H, Sq, Sk]``: pairs that are not in it add nothing, whatever the
    spec's fill; a query without any is one that sees no key.
    ``seed``, one int64 number, is what dropout is drawn from.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: head counts or the number of captured tensors are not the spec's.
    """
    check(spec, q, k, v, captured, seed)
    named = {o.name: t for o, t in zip(spec.captured, captured, strict=True)}
    states, _ = _scores(spec, q, k, named)
    if listed is None:
        weights, lse = spec.norm.apply(states[-1], named)
    elif isinstance(spec.norm, Elementwise | Normalized):  # their functions need not vanish at -inf
        weights, lse = spec.norm.apply(states[-1], named, listed)
    else:
        weights, lse = spec.norm.apply(states[-1].masked_fill(~listed, -math.inf), named)
    out = stack(_dropped(spec, weights, seed), k) @ v.to(weights.dtype)
    return out.view(*q.shape[:3], v.shape[3]).to(q.dtype), lse.contiguous()


def _dropped(spec: AttentionSpec, weights: Tensor, seed: Tensor | None) -> Tensor:
    """Return weights, or their gradients, after dropout."""
    return weights * factors(seed, spec.dropout, weights) if spec.dropout else weights


def _scores(
    spec: AttentionSpec, q: Tensor, k: Tensor, named: dict[str, Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """Return the scores ``[B, H, Sq, Sk]`` before the first step, after each, and filled; and the kept."""
    work = work_dtype(q)
    s = stack(q.to(work), k) @ k.to(work).transpose(-2, -1)
    states = [s.view(*q.shape[:3], k.shape[2])]
    for step in spec.scores:
        states.append(step.apply(states[-1], named))
    if isinstance(spec.mask, Full):
        return [*states, states[-1]], None
    keep = spec.mask.keep(Grid(q.shape[2], k.shape[2], q.device, named, *q.shape[:2]))
    return [*states, spec.fill.apply(states[-1], keep)], keep


@operator("attend", _FORWARD)
def attend(
    q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the spec with this text; see the module for layouts and results.

    A spec with dropout needs a ``seed``: the same seed gives the same bits, and so do the backward and the
    Triton kernels.  See ``attnc.codegen.dropout``.
    """
    return execute(parse(spec), q, k, v, captured, seed=seed)


@attend.register_fake
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    b, h, sq, _ = q.shape
    return q.new_empty((b, h, sq, v.shape[3])), q.new_empty((b, h, sq), dtype=work_dtype(q))


@operator("attend_backward", _BACKWARD)
def attend_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of those of (q, k, v, *captured) that ``needs`` marks, in that order.

    ``out`` and ``lse`` are what ``attend`` returned, None if they were not kept; kernels read them, plain
    torch does not.  A gradient ``dout`` or ``dlse`` of None stands for zeros.
    """
    return gradients(parse(spec), q, k, v, captured, dout, dlse, needs, seed)


def gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of those of (q, k, v, *captured) that ``needs`` marks, in plain torch.

    The spec is run again: weights come from the scores and never from the log-sum-exp, so a row of large
    negative fills keeps its 1/n.  A gradient of None stands for zeros.
    Source: FlashAttention (arXiv:2205.14135), appendix B.4, with ``d lse / d s = weights`` added.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: head counts or the number of captured tensors are not the spec's.
    """
    grads = _gradients(spec, q, k, v, captured, dout, dlse, seed)
    wanted = (
        pair for pair, need in zip(zip((q, k, v, *captured), grads, strict=True), needs, strict=True) if need
    )
    return [g.to(x.dtype, memory_format=torch.contiguous_format, copy=True) for x, g in wanted]


def _gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    seed: Tensor | None,
) -> list[Tensor]:
    """Return the gradients of q, k, v and the captured tensors (zeros for masks), in working precision."""
    check(spec, q, k, v, captured, seed)
    named = {o.name: t for o, t in zip(spec.captured, captured, strict=True)}
    states, keep = _scores(spec, q, k, named)
    weights, lse = spec.norm.apply(states[-1], named)
    work = weights.dtype
    dy = (
        torch.zeros((*q.shape[:3], v.shape[3]), dtype=work, device=q.device)
        if dout is None
        else dout.to(work)
    )
    dw = _dropped(spec, (stack(dy, k) @ v.to(work).transpose(-2, -1)).view_as(weights), seed)
    sums = {name: torch.zeros_like(t, dtype=work) for name, t in named.items()}
    if isinstance(spec.norm, Softmax):
        row = -(dw * weights).sum(-1) if dlse is None else dlse.to(work) - (dw * weights).sum(-1)
        if isinstance(spec.norm.sink, str):
            sink = named[spec.norm.sink].to(work).view(1, -1, 1)
            sums[spec.norm.sink] += (torch.exp(sink - lse) * row).sum((0, 2))
        ds = weights * (dw + row[..., None])
    else:
        ds = spec.norm.pull_back(states[-1], dw, None if dlse is None else dlse.to(work))
    if keep is not None and spec.fill.how == "replace":
        ds = ds.masked_fill(~keep, 0.0)
    for step, before in zip(reversed(spec.scores), reversed(states[:-2]), strict=True):
        ds = _pull_back(step, before, ds, named, sums)
    ds = stack(ds, k)
    dq = (ds @ k.to(work)).view_as(q)
    dk = ds.transpose(-2, -1) @ stack(q.to(work), k)
    dv = stack(_dropped(spec, weights, seed), k).transpose(-2, -1) @ stack(dy, k)
    return [dq, dk, dv, *sums.values()]


def _pull_back(
    step: Step, before: Tensor, ds: Tensor, named: dict[str, Tensor], sums: dict[str, Tensor]
) -> Tensor:
    """Return the gradient of the scores ``before`` a step from that after; add an operand's to ``sums``."""
    match step:
        case Scale(factor):
            return ds * factor
        case Softcap(cap):
            return ds * (1 - torch.tanh(before / cap) ** 2)
        case Bias(operand, sign):
            sums[operand] += sign * ds.sum_to_size(named[operand].shape)
            return ds
        case Gain(operand):
            sums[operand] += (ds * before).sum_to_size(named[operand].shape)
            return ds * named[operand].to(ds.dtype)
        case Pointwise():
            grads = step.pull_back(before, named, ds)
            for operand in step.operands:
                if operand in grads:
                    sums[operand] += grads[operand]
            return grads.get(SCORE, torch.zeros_like(before))
        case _:
            raise UnsupportedError(
                f"attnc::attend_backward: expected a step with a known derivative, found {step}"
            )


@attend_backward.register_fake
def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    pairs = zip((q, k, v, *captured), needs, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in pairs if need]


attend.register_autograd(attend_autograd)
attend_backward.register_autograd(attend_backward_autograd)


def attend_vmap(
    info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Map ``attend``: fold the dimension into the batch where every tensor has one, else call per element.

    Dropout numbers the entries of a batch, so a folded one would draw otherwise.
    """
    q, k, v, captured, text, *_ = args
    n, spec = info.batch_size, parse(text)
    dims = _flat_dims(in_dims, len(captured))
    shared = any(d is not None and o.axes[:1] != "b" for d, o in zip(dims[3:], spec.captured, strict=True))
    if shared or spec.dropout:
        return _attend_loop(n, in_dims, args)
    batch = q.shape[0] if dims[0] is None else q.movedim(dims[0], 0).shape[1]
    folded = [_fold(x, d, n, batch) for x, d in zip((q, k, v), dims, strict=False)]
    rest = [
        x if d is None and (o.axes[:1] != "b" or x.shape[0] == 1) else _fold(x, d, n, batch)
        for x, d, o in zip(captured, dims[3:], spec.captured, strict=True)
    ]
    out, lse = torch.ops.attnc.attend(*folded, rest, text)
    return (out.unflatten(0, (n, batch)), lse.unflatten(0, (n, batch))), (0, 0)


attend.register_vmap(attend_vmap)


def _flat_dims(in_dims: tuple[Any, ...], count: int) -> list[int | None]:
    """Return one mapped dimension (None: not mapped) for each of q, k, v and ``count`` captured tensors."""
    captured = in_dims[3] if isinstance(in_dims[3], (list, tuple)) else [in_dims[3]] * count
    return [*in_dims[:3], *captured]


def _fold(x: Tensor, dim: int | None, n: int, batch: int) -> Tensor:
    """Return ``[n * batch, ...]`` from a tensor mapped at ``dim``; a batch of 1 is spread."""
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(n, batch, *x.shape[2:]).flatten(0, 1)


def _attend_loop(
    n: int, in_dims: tuple[Any, ...], args: Sequence[Any]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    results = [torch.ops.attnc.attend(*select(args, in_dims, i)) for i in range(n)]
    return (torch.stack([o for o, _ in results]), torch.stack([s for _, s in results])), (0, 0)


attend_backward.register_vmap_loop()


@attend.register_kernel("cuda")
def _attend_cuda(
    q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec: str, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the emitted Triton kernel, or the spec itself where no kernel can serve it."""
    from attnc.codegen.triton.launch import run

    return run(parse(spec), q, k, v, captured, seed)


@attend_backward.register_kernel("cuda")
def _backward_cuda(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Run the emitted Triton kernels, or plain torch where none can serve the spec."""
    from attnc.codegen.triton.launch import run_backward

    return run_backward(parse(spec), q, k, v, captured, out, lse, dout, dlse, needs, seed)
