"""Run a spec through compiled FlexAttention: what stands behind the operator ``attnc::flex_attend``.

Each spec is written as Python (``attnc.codegen.flex.source``), executed once and compiled once per *class* of
calls: dtype, heads, layout, which axes are broadcast, and the shapes of the captured tensors.  Lengths and
batch of q, k, v stay symbolic, so another length compiles nothing.  Captured tensors are padded to a few
sizes, because the C++ template of torch 2.13 mixes up the names of symbolic sizes inside a mask (it
replaces ``ks1`` inside ``ks14``).  Layouts are those of ``attnc.ir``.
"""

from __future__ import annotations

import hashlib
import linecache
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnc import logs
from attnc.codegen.flex.blocks import block_lists
from attnc.codegen.flex.repair import may_need_repair, repair
from attnc.codegen.flex.source import BLOCK, CPU_BLOCK, Sink, block_mask, source
from attnc.codegen.ops import execute
from attnc.ir import AttentionSpec
from attnc.printer import parse

log = logs.get("codegen")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Program:
    """One emitted module: its text, functions, ``attend`` compiled.  ``broken`` says why it is out of use."""

    text: str
    modifiers: Callable[..., tuple[Callable[..., Tensor], Callable[..., Tensor]]]
    attend: Callable[..., Any]
    compiled: Callable[..., Any]
    broken: str = ""


def flex_attend(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], spec_text: str) -> Tensor:
    """Return the output ``[B, H, Sq, Dv]`` of the spec with this text, in q's dtype.

    What flex has not runs as the spec in plain torch: fp64, a gradient, a single query on CPU, an empty
    tensor.

    Raises:
        ValueError: head counts or the number of captured tensors are not the spec's.
    """
    spec = parse(spec_text)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *captured))
    if trains or not _fits(spec, q, k, v, captured):
        return _in_bshd(execute(spec, q, k, v, captured)[0])
    sink: Sink = "lse" if q.device.type == "cuda" else "key"
    with torch.no_grad():
        q, k, v, *rest = (x.detach() for x in (q, k, v, *captured))
        out = run(spec, spec_text, q, k, v, rest, sink)
        return _in_bshd(execute(spec, q, k, v, rest)[0] if out is None else out)


def _fits(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]) -> bool:
    """Say whether flex takes this call; what does not fit the spec at all is left to ``execute`` to name."""
    heads = q.shape[1] == k.shape[1] * spec.group_size and v.shape[1] == k.shape[1]
    if len(captured) != len(spec.captured) or not heads or not q.shape[0] == k.shape[0] == v.shape[0]:
        return False
    sizes = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
    for x, o in zip(captured, spec.captured, strict=True):  # the kernel would read past the end
        axes = o.axes[-x.dim() :] if x.dim() else ""
        if len(axes) != x.dim() or any(n not in (1, sizes[a]) for n, a in zip(x.shape, axes, strict=True)):
            return False
    numbers = q.dtype in DTYPES and q.dtype == k.dtype == v.dtype
    single = q.device.type == "cpu" and q.shape[2] == 1
    return numbers and not single and min(q.numel(), k.numel(), v.numel()) > 0


def run(
    spec: AttentionSpec,
    text: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    sink: Sink = "key",
    compiled: bool = True,
) -> Tensor | None:
    """Run the program of a spec, then make the rows exact that see no key; None if it does not compile.

    Without ``compiled`` flex makes all scores, which is of use as an oracle only.
    """
    sq, sk = q.shape[2], k.shape[2]
    own_key = spec.norm.sink is not None and sink == "key"
    padded = [_padded(x, o.axes, own_key) for x, o in zip(captured, spec.captured, strict=True)]
    block = CPU_BLOCK if q.device.type == "cpu" else BLOCK
    blocks = block_lists(block_mask(spec), sq, sk, block, own_key, 2, str(q.device))
    made = program(text, sink, block, _class(q, k, v, padded), tuple(_ones(x) for x in padded))
    if compiled and made.broken:
        return None
    lengths = torch.tensor((sq, sk), device=q.device)
    keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) if own_key else x for x in (k, v))
    inputs = (q, keys, values, padded, lengths, tuple(blocks))
    found = _call(made, *inputs) if compiled else made.attend(*inputs)
    if found is None:
        return None
    out: Tensor = _with_sink(spec, captured, *found) if isinstance(found, tuple) else found
    if may_need_repair(spec, sq, sk):
        out = repair(out, spec, made.modifiers(*padded, lengths), q, k, v, captured)
    return out


def _call(
    made: Program, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], lengths: Tensor, blocks: Any
) -> Any:
    """Call the compiled function with symbolic lengths; if it does not compile, say so and return None."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported

    for x in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(x, (0, 2))
    for x in blocks:
        torch._dynamo.maybe_mark_dynamic(x, tuple(range(2, x.dim())))
    for x in (*captured, lengths):
        torch._dynamo.mark_static(x)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            return made.compiled(q, k, v, captured, lengths, blocks)
    except (BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported) as error:
        made.broken = str(error).strip().splitlines()[0]
        log.warning(
            "FlexAttention does not compile, the spec runs in plain torch: %s\n%s", made.broken, made.text
        )
        return None


@lru_cache(maxsize=256)
def program(
    text: str, sink: Sink, block: int, kind: tuple[Any, ...], broadcast: tuple[tuple[bool, ...], ...]
) -> Program:
    """Return the program of a spec's text for one class of calls; ``kind`` only tells classes apart.

    Each has a code object of its own, since torch.compile counts recompilations per code object.
    """
    written = source(parse(text), broadcast, sink, block)
    digest = hashlib.sha256(repr((text, sink, block, kind, broadcast)).encode()).hexdigest()[:16]
    name = f"<attnc flex {digest}>"
    linecache.cache[name] = (len(written), None, written.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": f"attnc_flex_{digest}"}
    exec(compile(written, name, "exec"), space)
    logs.artifact("kernel").debug("%s", written)
    return Program(
        written, space["modifiers"], space["attend"], torch.compile(space["attend"], fullgraph=True)
    )


def _class(q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return all that a compiled kernel is special to, so that no call recompiles a kernel of another.

    A symbolic size is never 1 in torch, so a batch of one is a class; block lists are made at least 2 x 2.
    """
    layouts = tuple((x.shape[1], x.shape[3], _order(x), x.stride(2)) for x in (q, k, v))
    ones = (q.shape[0] == 1, k.shape[2] == 1)
    bound = tuple((tuple(x.shape), x.dtype, x.stride()) for x in captured)
    return (str(q.device), q.dtype, layouts, ones, bound, torch.get_num_threads())


def _order(x: Tensor) -> tuple[int, ...]:
    """Return the axes from the outermost to the innermost, expanded ones first."""
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda i: (strides[i] != 0, -strides[i], i)))


def _ones(x: Tensor) -> tuple[bool, ...]:
    return tuple(n == 1 for n in x.shape)


def bucket(n: int, steps: int = 1) -> int:
    """Return ``n`` rounded up to one of ``steps`` (a power of two) sizes per power of two."""
    step = max(1, (1 << (n - 1).bit_length()) // (2 * steps))
    return -(-n // step) * step


def _padded(x: Tensor, axes: str, own_key: bool) -> Tensor:
    """Round the batch, query and key axes of a captured tensor up; what is added is never read.

    Rows are cheap and go to powers of two from 8 x 2048 on; a tensor over queries and keys grows by a
    quarter per axis at most.
    """
    letters = axes[-x.dim() :] if x.dim() else ""
    long = [a for n, a in zip(x.shape, letters, strict=True) if a in "qk" and n > 1]
    wanted = []
    for n, axis in zip(x.shape, letters, strict=True):
        size = n + 1 if axis == "k" and own_key else n
        if n == 1 or axis == "h":
            wanted.append(n)
        elif len(long) > 1:
            wanted.append(bucket(size, 4) if axis == "b" else max(BLOCK, bucket(size, 4)))
        else:
            wanted.append(max(8 if axis == "b" else 2048, bucket(size)))
    if list(x.shape) == wanted:
        return x.contiguous()
    out = x.new_zeros(wanted)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def _with_sink(spec: AttentionSpec, captured: Sequence[Tensor], out: Tensor, lse: Tensor) -> Tensor:
    """Rescale by the share of the sink: ``exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink)``."""
    named = {o.name: x for o, x in zip(spec.captured, captured, strict=True)}
    sink = spec.norm.sink
    logit = named[sink].to(lse.dtype).view(1, -1, 1) if isinstance(sink, str) else float(sink or 0.0)
    return (out * torch.sigmoid(lse - logit)[..., None]).to(out.dtype)


def _in_bshd(out: Tensor) -> Tensor:
    """Return ``[B, H, Sq, Dv]`` laid out as ``[B, Sq, H, Dv]``, so that merging heads copies nothing."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
