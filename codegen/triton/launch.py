"""Run a spec on tensors through its emitted kernels.

``run``, ``run_backward`` and ``run_tangent`` are the CUDA implementations of the operators, ``run_blocks``
computes listed blocks only, ``run_varlen`` takes packed sequences, ``run_varlen_backward`` is its gradient.
The first call of a spec at lengths of one size emits the file, with the tiles that tuning picked for them if
it was asked to, keeps it (``attnc.codegen.triton.store``) and imports it; later calls find the launcher in
memory.  A spec or a call that no kernel serves runs as plain torch, and the log says why, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnc import logs
from attnc.block_list import BlockList
from attnc.codegen.caches import execute_paged
from attnc.codegen.dropout import check_seed
from attnc.codegen.operators import is_recorded
from attnc.codegen.ops import execute, gradients
from attnc.codegen.tangents import Results, tangent
from attnc.codegen.triton import picks
from attnc.codegen.triton.emit import can_run, emit
from attnc.codegen.triton.packed import execute_packed, packed_gradients
from attnc.codegen.triton.picks import Place, place_of
from attnc.codegen.triton.store import load
from attnc.codegen.triton.tangents import takes_tangent
from attnc.ir import AttentionSpec

log = logs.get("codegen")
kernel_log = logs.artifact("kernel")

Launcher = Callable[..., tuple[Tensor, Tensor]]
Gradients = Callable[..., list[Tensor | None]]
Tangents = Callable[..., Results]
_ENTRIES = {"forward": "attend", "backward": "backward", "tangent": "tangent", "varlen_backward": "backward"}
"""The kernel's name, and that of the function which launches it, by kind."""

FEW, LONG = 16, 512
"""Queries at most, and keys at least, for which the keys are cut into shares."""


def run(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor] = (),
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as ``attnc::attend`` does, from the emitted kernel where it can serve this call.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v)
    kernel = launcher(spec, place_of(q, k), _kind(spec, kind_for(q, k)))
    if kernel is None or not _fits(spec, q, k, v) or k.shape[2] == 0:
        return execute(spec, q, k, v, captured, seed=seed)
    return kernel(q, k, v, *captured, *_seeds(spec, seed))


def _seeds(spec: AttentionSpec, seed: Tensor | None) -> list[Tensor]:
    """Return the seed as launchers take it, if the spec has dropout."""
    return [check_seed(seed, spec.dropout).reshape(1)] if spec.dropout else []


def run_blocks(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    blocks: BlockList,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as ``run`` does, over the listed blocks only; others add nothing, whatever the fill.

    A query without any listed block is one that sees no key: NaN, or zeros under a safe softmax, and a
    log-sum-exp of -inf (of the sink's logit, if there is one).  Calls over disjoint lists merge by their
    log-sum-exp, but for rows of nothing but large finite fills, which fp32 cannot tell apart.

    ``order`` is the order in which a GPU starts rows of blocks, as ``blocks.order`` gives it.  On the CPU,
    Triton's interpreter apart, this is plain torch over all pairs.

    Raises:
        ValueError: shapes do not fit the spec or the list.
        CodegenError: the emitted file does not import.
    """
    blocks.expect(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    spec = _sized(spec, q, v)
    kernel = launcher(spec, kind="blocks") if _runs_kernels(q) else None
    if kernel is None or not _fits(spec, q, k, v) or k.shape[2] == 0:
        return execute(spec, q, k, v, captured, blocks.to_pairs(q.shape[2], k.shape[2]))
    return kernel(q, k, v, *captured, blocks.ranges, blocks.columns, blocks.block, order)


def run_varlen(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    captured: Sequence[Tensor] = (),
    max_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a spec over B packed sequences, each as if it were alone in a batch of one.

    q is ``[Tq, H, Dqk]``, k ``[Tk, Hkv, Dqk]``, v ``[Tk, Hkv, Dv]``; ``cu_q`` and ``cu_k``, int32 ``[B + 1]``
    on their device, begin with 0 and end with Tq and Tk: sequence b has the tokens ``cu[b] .. cu[b + 1]``,
    perhaps none.  ``max_q`` is the length in queries of the longest, which is not looked up since that would
    wait for a GPU.  Positions and lengths in masks and steps are those of the sequence.  ``captured`` are the
    spec's tensors ``[B, ...]``, padded along tokens to the longest sequence; the padding counts for nothing.
    ``max_k`` is the length in keys of the longest; only gradients read it, and without it their kernels start
    programs for every sequence as if it had all the keys.

    Returns out ``[Tq, H, Dv]`` in q's dtype and the log-sum-exp ``[H, Tq]``; a sequence without keys gives
    zeros and -inf.  On the CPU, Triton's interpreter apart, this is plain torch, sequence by sequence.

    Raises:
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v)
    kernel = launcher(spec, kind="varlen") if _runs_kernels(q) else None
    if kernel is None or not _fits(spec, q, k, v):
        return execute_packed(spec, q, k, v, cu_q, cu_k, captured)
    if is_recorded(q, k, v, *captured):
        found: tuple[Tensor, Tensor] = _Varlen.apply(spec, cu_q, cu_k, max_q, max_k, q, k, v, *captured)
        return found
    return kernel(q, k, v, *captured, cu_q, cu_k, max_q, _padded_keys(spec, captured) or k.shape[0])


class _Varlen(torch.autograd.Function):
    """``run_varlen`` in a graph."""

    apply: ClassVar[Callable[..., Any]]

    @staticmethod
    def forward(
        spec: AttentionSpec,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *captured: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return run_varlen(spec, q, k, v, cu_q, cu_k, max_q, captured, max_k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.spec, cu_q, cu_k, ctx.max_q, ctx.max_k, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_q, cu_k, *output, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[5:]
        if dout is None and dlse is None:
            return (None,) * (5 + len(needs))
        cu_q, cu_k, out, lse, q, k, v, *captured = ctx.saved_tensors
        lengths = (cu_q, cu_k, ctx.max_q)
        grads = run_varlen_backward(
            ctx.spec, q, k, v, *lengths, captured, out, lse, dout, dlse, needs, ctx.max_k
        )
        rest = iter(grads)
        return *(None,) * 5, *(next(rest) if need else None for need in needs)


def run_varlen_backward(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    captured: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
    max_k: int | None = None,
) -> list[Tensor]:
    """Return the gradients of those of (q, k, v, *captured) that ``needs`` marks, in that order.

    ``out`` and ``lse`` are what ``run_varlen`` returned, whose arguments the others are; a gradient ``dout``
    or ``dlse`` of None stands for zeros.  What sequences share has the sum of their gradients, the padding of
    captured tensors has zeros.  Kernels wait for nothing; plain torch, where none serves, reads ``cu_q``.

    Raises:
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v)
    kernels = varlen_backward_launcher(spec) if _runs_kernels(q) else None
    if kernels is None or not _fits(spec, q, k, v) or k.shape[0] == 0:
        return packed_gradients(spec, q, k, v, cu_q, cu_k, captured, dout, dlse, needs)
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    longest = _padded_keys(spec, captured) or (k.shape[0] if max_k is None else max_k)
    found = kernels(q, k, v, *captured, cu_q, cu_k, max_q, longest, out, lse, dout, dlse, needs)
    return [g for g in found if g is not None]


@cache
def varlen_backward_launcher(spec: AttentionSpec) -> Gradients | None:
    """Return ``backward`` of the spec's kernels for packed sequences, emitted at the first call, or None."""
    return cast(Gradients | None, _load(spec, "varlen_backward", None))


def attend_paged(
    spec: AttentionSpec,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    captured: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a spec on keys and values in pages, from the emitted kernel where it can serve.

    The tensors are those of ``attnc.codegen.caches.execute_paged``, which runs on the CPU and where no kernel
    serves.  The kernel waits for nothing: it reads the lengths on the device, and takes one that is more
    than the table has room for as just that room.

    Raises:
        ValueError: a shape or a dtype does not fit.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v_cache)
    kernel = launcher(spec, kind="paged") if _runs_kernels(q) else None
    if kernel is None or not _fits(spec, q, k_cache, v_cache):
        return execute_paged(spec, q, k_cache, v_cache, block_table, seqlens, captured)
    return kernel(q, k_cache, v_cache, block_table, seqlens, *captured)


def kind_for(q: Tensor, k: Tensor) -> str:
    """Return the kind of kernel for q ``[B, H, Sq, D]`` and k ``[B, Hkv, Sk, D]``, from their sizes alone.

    A forward program takes one head and all keys that its queries see.  With few queries that leaves most of
    a GPU idle or most of a tile empty, and reads the keys once for each head of a group.
    """
    return "decode" if q.shape[2] <= FEW and k.shape[2] >= LONG else "forward"


@cache
def _kind(spec: AttentionSpec, wanted: str) -> str:
    """Return the wanted kind where it serves the spec, else that which serves most."""
    return wanted if can_run(spec, wanted) is None else "forward"


@cache
def launcher(spec: AttentionSpec, place: Place | None = None, kind: str = "forward") -> Launcher | None:
    """Return ``attend`` of the spec's kernel, emitted at the first call, or None if none can serve it.

    With what tuning picked for this place (``attnc.codegen.triton.tune``), else with the default tiles.
    """
    return cast(Launcher | None, _load(spec, kind, place))


def run_backward(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Return gradients as ``attnc::attend_backward`` does, from emitted kernels where they serve this call.

    ``out`` and ``lse`` are what the forward gave, None if nobody kept them: then plain torch runs.

    Raises:
        UnsupportedError: the spec has dropout, and the call no seed.
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    if not all(isinstance(o.shape[3], int) for o in (spec.q, spec.v)):
        spec = spec.with_head_sizes(q.shape[3], v.shape[3])
    kernels = backward_launcher(spec, place_of(q, k))
    if kernels is None or out is None or lse is None or not _fits(spec, q, k, v):
        return gradients(spec, q, k, v, captured, dout, dlse, needs, seed)
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    found = kernels(q, k, v, *captured, *_seeds(spec, seed), out, lse, dout, dlse, needs)
    return [g for g in found if g is not None]


@cache
def backward_launcher(spec: AttentionSpec, place: Place | None = None) -> Gradients | None:
    """Return ``backward`` of the spec's kernels, emitted at the first call, or None if none can serve it."""
    return cast(Gradients | None, _load(spec, "backward", place))


def run_tangent(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    seed: Tensor | None = None,
) -> Results:
    """Return results and tangents as ``attnc::attend_tangent`` does, from the emitted kernel where it serves.

    Raises:
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v)
    kernel = tangent_launcher(spec)
    if kernel is None or not _fits(spec, q, k, v) or k.shape[2] == 0:
        return tangent(spec, q, k, v, captured, tangents, seed)
    moved = [t for t, x in zip(tangents[3:], spec.captured, strict=True) if takes_tangent(spec, x)]
    return kernel(q, k, v, *captured, *tangents[:3], *moved)


@cache
def tangent_launcher(spec: AttentionSpec) -> Tangents | None:
    """Return ``tangent`` of the spec's kernel, emitted at the first call, or None if none can serve it."""
    return cast(Tangents | None, _load(spec, "tangent", None))


def _load(spec: AttentionSpec, kind: str, place: Place | None) -> Callable[..., object] | None:
    """Return the entry point of an emitted file of this kind, None if ``can_run`` has a reason against it."""
    miss = can_run(spec, kind)
    if miss is not None:
        _warn(f"{miss.node}: {miss.why}; the site runs as plain torch")
        return None
    pick = picks.find(spec, kind, place) if place else None
    name = _ENTRIES.get(kind, "attend")
    kernel = emit(spec, name=name, kind=kind, configs={place.arch: pick} if place and pick else None)
    kernel_log.debug("%s", kernel.source)
    return cast(Callable[..., object], getattr(load(kernel), name))


def _sized(spec: AttentionSpec, q: Tensor, v: Tensor) -> AttentionSpec:
    """Return the spec with the head sizes of its tensors, where it leaves them free."""
    free = not all(isinstance(o.shape[3], int) for o in (spec.q, spec.v))
    return spec.with_head_sizes(q.shape[-1], v.shape[-1]) if free else spec


def _padded_keys(spec: AttentionSpec, captured: Sequence[Tensor]) -> int | None:
    """Return the number of keys to which captured tensors are padded, None if they broadcast along them."""
    pairs = zip(captured, spec.captured, strict=True)
    sizes = (x.shape[o.axes.index("k") - len(o.axes)] for x, o in pairs if "k" in o.axes)
    return max((n for n in sizes if n > 1), default=None)


def _runs_kernels(x: Tensor) -> bool:
    """Say whether kernels run where the tensor is: on a GPU, or on the CPU in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _warn(text: str) -> None:
    log.warning("%s", text)


def _fits(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether tensors have the dtypes and head sizes of the kernel."""
    found = [(x.dtype, x.shape[-1]) for x in (q, k, v)]
    wanted = [(o.dtype, o.shape[3]) for o in (spec.q, spec.k, spec.v)]
    if found != wanted:
        _warn(
            f"attend: expected dtypes and head sizes {wanted}, found {found}; this call runs as plain torch"
        )
    return found == wanted
