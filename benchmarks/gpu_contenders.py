"""Who is measured by gpu.py: SDPA with a backend pinned, compiled FlexAttention, and the emitted kernels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gpu_cases import Case, Tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


class UnfitError(Exception):
    """A contender cannot run a case, for a reason that its row gives."""


@dataclass(frozen=True)
class Contender:
    """One implementation.

    ``prepare`` returns what runs a case on given tensors: forward the output ``[B, H, Sq, D]``, backward the
    gradients of q, k and v.  ``rounds_bias`` says that it takes ALiBi as a tensor of q's dtype.
    """

    name: str
    prepare: Callable[[Tensors], Call]
    rounds_bias: bool = False


def contenders() -> list[Contender]:
    """Return all of them, our own last."""
    return [
        Contender("sdpa cudnn", lambda t: _sdpa(t, SDPBackend.CUDNN_ATTENTION), rounds_bias=True),
        Contender("sdpa flash", lambda t: _sdpa(t, SDPBackend.FLASH_ATTENTION), rounds_bias=True),
        Contender("flex", _flex),
        Contender("attnc", _attnc),
    ]


def _passes(t: Tensors, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """Return the call of a case: the forward, or the backward after a forward that is not timed."""
    if t.case.way != "backward":
        return lambda: (forward(t.q, t.k, t.v),)
    inputs = tuple(x.detach().requires_grad_() for x in (t.q, t.k, t.v))
    out = forward(*inputs)
    return lambda: torch.autograd.grad(out, inputs, t.dout, retain_graph=True)


# ---------------------------------------------------------------- SDPA


def _sdpa(t: Tensors, backend: SDPBackend) -> Call:
    case = t.case
    if case.mask == "softcap":
        raise UnfitError("SDPA has no soft cap")
    options: dict[str, Any] = {"scale": case.scale, "is_causal": case.mask == "causal"}
    options["attn_mask"] = t.keep if t.keep is not None else t.added
    if case.heads != case.kv_heads:
        options["enable_gqa"] = True

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    with reasons():
        call = _passes(t, forward)
        call()
    return call


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Give SDPA's own words where it has no kernel: it raises one sentence, and warns of the reasons."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            words = [str(w.message).partition(" (Triggered")[0] for w in seen if w.category is UserWarning]
            raise UnfitError("; ".join([str(error).splitlines()[0], *words])) from error


# ---------------------------------------------------------------- FlexAttention


def _flex(t: Tensors) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    case = t.case
    if case.way == "blocks" and not t.q.is_cuda:
        raise UnfitError("FlexAttention that is not compiled ignores a list of blocks")
    attend = _compiled() if t.q.is_cuda else flex_attention
    options: dict[str, Any] = {"scale": case.scale, "score_mod": _score_mod(t), "block_mask": _block_mask(t)}
    if case.heads != case.kv_heads:
        options["enable_gqa"] = True
    return _passes(t, lambda q, k, v: attend(q, k, v, **options))


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._functorch.config.donated_buffer = False  # one forward, many backward runs
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(flex_attention)


def _score_mod(t: Tensors) -> Callable[..., Tensor] | None:
    if t.case.mask == "softcap":
        from gpu_cases import CAP

        return lambda s, b, h, q, k: CAP * torch.tanh(s / CAP)
    if t.case.mask == "alibi":
        slope = t.extra["slope"].view(-1)
        return lambda s, b, h, q, k: s + slope[h] * (k - q)
    if t.case.mask == "bias":
        rel = t.extra["rel"]
        return lambda s, b, h, q, k: s + rel[0, h, q, k]
    return None


def _block_mask(t: Tensors) -> Any:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    case = t.case
    if case.way == "blocks":
        blocks = t.extra["blocks"]
        counts = blocks.sum(3, dtype=torch.int32)
        order = blocks.to(torch.int32).argsort(dim=3, descending=True, stable=True).to(torch.int32)
        none = torch.zeros_like(counts)
        lengths = (case.sq, case.sk)
        return BlockMask.from_kv_blocks(
            none, order, counts, order, BLOCK_SIZE=(case.block, case.block), seq_lengths=lengths
        )
    mod = _mask_mod(case, t)
    return mod and create_block_mask(mod, None, None, case.sq, case.sk, device=t.q.device)


def _mask_mod(case: Case, t: Tensors) -> Callable[..., Tensor] | None:
    if case.mask == "window":
        width = case.window
        return lambda b, h, q, k: (k <= q) & (k > q - width)
    if case.mask == "document":
        ids = t.extra["ids"][0]
        return lambda b, h, q, k: (k <= q) & (ids[q] == ids[k])
    if case.mask in ("causal", "alibi", "softcap"):
        return lambda b, h, q, k: k <= q
    return None


# ---------------------------------------------------------------- attnc


def _attnc(t: Tensors) -> Call:
    from attnc.codegen.triton import can_run, emit, kinds, run
    from attnc.codegen.triton.store import load
    from attnc.printer import parse

    kind, spec = t.case.way, parse(t.case.spec(t.q.dtype))  # a way of calling has the name of its kind
    if kind not in kinds.KINDS:
        raise UnfitError(f"not emitted: there is no kernel of kind {kind}")
    miss = can_run(spec, kind)
    if miss is not None:
        raise UnfitError(f"not emitted: {miss.code}: {miss.why}")
    if kind == "forward":
        return _passes(t, lambda q, k, v: run(spec, q, k, v, t.captured)[0])
    if kind == "backward" and not t.q.is_cuda:
        raise UnfitError("not measured: on the CPU attend runs the spec, and no kernel")
    if kind == "backward":
        return _passes(t, lambda q, k, v: torch.ops.attnc.attend(q, k, v, t.captured, str(spec))[0])
    if kind == "blocks":
        return _listed(t, spec)
    if kind == "decode":
        attend = load(emit(spec, name="decode", kind=kind)).attend
        return _passes(t, lambda q, k, v: attend(q, k, v, *t.captured)[0])
    raise UnfitError(f"not measured: kernels of kind {kind} have no call here")


def _listed(t: Tensors, spec: Any) -> Call:
    """Return the call over listed blocks, all of them full; the list is made once, as FlexAttention's is."""
    from attnc.block_list import BlockList
    from attnc.codegen.triton import run_blocks

    blocks, case = t.extra["blocks"], t.case
    listed = BlockList.from_dense(blocks, blocks, block=(case.block, case.block))
    order = listed.order(case.batch, case.heads)
    return _passes(t, lambda q, k, v: run_blocks(spec, q, k, v, t.captured, listed, order)[0])
