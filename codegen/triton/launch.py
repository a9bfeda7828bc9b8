"""Run a spec on tensors through its emitted kernel: the CUDA implementation of ``torch.ops.attnc.attend``.

The first call of a spec emits the file, keeps it (``attnc.codegen.triton.store``) and imports it; later
calls find the launcher in memory.  A spec or a call that no kernel serves runs as plain torch, and the log
says why, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

from torch import Tensor

from attnc import logs
from attnc.codegen.caches import execute_paged
from attnc.codegen.ops import execute
from attnc.codegen.triton.emit import can_run, emit
from attnc.codegen.triton.store import load
from attnc.ir import AttentionSpec

log = logs.get("codegen")
kernel_log = logs.artifact("kernel")

Launcher = Callable[..., tuple[Tensor, Tensor]]

FEW, LONG = 16, 512
"""Queries at most, and keys at least, for which the keys are cut into shares."""


def run(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) as ``attnc::attend`` does, from the emitted kernel where it can serve this call.

    Raises:
        ValueError: shapes do not fit the spec.
        CodegenError: the emitted file does not import.
    """
    kernel = launcher(spec, kind_for(q, k))
    if kernel is None or not _fits(spec, q, k, v):
        return execute(spec, q, k, v, captured)
    return kernel(q, k, v, *captured)


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
    plain = q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    kernel = None if plain else launcher(spec, "paged")
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
def launcher(spec: AttentionSpec, kind: str) -> Launcher | None:
    """Return ``attend`` of the spec's kernel, emitted at the first call, or None if none can serve it."""
    miss = can_run(spec, kind)
    if miss is not None:
        log.warning("%s: %s; the site runs as plain torch", miss.node, miss.why)
        return None
    kernel = emit(spec, name="attend", kind=kind)
    kernel_log.debug("%s", kernel.source)
    return cast(Launcher, load(kernel).attend)


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
