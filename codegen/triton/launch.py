"""Run a spec on tensors through its emitted kernels.

``run`` is the CUDA implementation of ``torch.ops.attnc.attend``, ``run_blocks`` computes listed blocks only.
The first call of a spec at lengths of one size emits the file, with the tiles that tuning picked for them if
it was asked to, keeps it (``attnc.codegen.triton.store``) and imports it; later calls find the launcher in
memory.  A spec or a call that no kernel serves runs as plain torch, and the log says why, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

from torch import Tensor

from attnc import logs
from attnc.block_list import BlockList
from attnc.codegen.ops import execute
from attnc.codegen.triton import picks
from attnc.codegen.triton.emit import can_run, emit
from attnc.codegen.triton.picks import Place, place_of
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec

log = logs.get("codegen")
kernel_log = logs.artifact("kernel")

Launcher = Callable[..., tuple[Tensor, Tensor]]


def run(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as ``attnc::attend`` does, from the emitted kernel where it can serve this call.

    Raises:
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    spec = _sized(spec, q, v)
    kernel = launcher(spec, place_of(q, k))
    if kernel is None or not _fits(spec, q, k, v):
        return execute(spec, q, k, v, captured)
    return kernel(q, k, v, *captured)


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
    if kernel is None or not _fits(spec, q, k, v):
        return execute(spec, q, k, v, captured, blocks.to_pairs(q.shape[2], k.shape[2]))
    return kernel(q, k, v, *captured, blocks.ranges, blocks.columns, blocks.block, order)


@cache
def launcher(spec: AttentionSpec, place: Place | None = None, kind: str = "forward") -> Launcher | None:
    """Return ``attend`` of the spec's kernel, emitted at the first call, or None if none can serve it.

    With what tuning picked for this place (``attnc.codegen.triton.tune``), else with the default tiles.
    """
    miss = can_run(spec, kind)
    if miss is not None:
        _warn(f"{miss.node}: {miss.why}; the site runs as plain torch")
        return None
    pick = picks.find(spec, kind, place) if place else None
    kernel = emit(spec, name="attend", kind=kind, configs={place.arch: pick} if place and pick else None)
    kernel_log.debug("%s", kernel.source)
    return cast(Launcher, load(kernel).attend)


def _sized(spec: AttentionSpec, q: Tensor, v: Tensor) -> AttentionSpec:
    """Return the spec with the head sizes of its tensors, where it leaves them free."""
    free = not all(isinstance(o.shape[3], int) for o in (spec.q, spec.v))
    return spec.with_head_sizes(q.shape[3], v.shape[3]) if free else spec


def _runs_kernels(x: Tensor) -> bool:
    """Say whether kernels run where the tensor is: on a GPU, or on the CPU in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _warn(text: str) -> None:
    log.warning("%s", text)


def _fits(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Say whether tensors have the dtypes and head sizes of the kernel, and any keys at all."""
    found = [(x.dtype, x.shape[3]) for x in (q, k, v)]
    wanted = [(o.dtype, o.shape[3]) for o in (spec.q, spec.k, spec.v)]
    if found != wanted:
        _warn(
            f"attend: expected dtypes and head sizes {wanted}, found {found}; this call runs as plain torch"
        )
        return False
    return k.shape[2] > 0
