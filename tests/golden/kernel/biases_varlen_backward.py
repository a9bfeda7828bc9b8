"""Attention over packed sequences, backward, as fused Triton kernels without atomics; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,32]:float32 k=bhkd[b,hkv,sk,32]:float32 v=bhke[b,hkv,sk,32]:float32 group=1 bias(bias0) bias(-bias1) mask=dense(seen) fill(replace,-inf) softmax(safe) with bias0=bhqk[1,h,sq,sk]:float32 with bias1=bhqk[b,1,1,sk]:float32 with seen=bhqk[b,1,sq,sk]:bool
kind    varlen_backward
formula p = exp(s - lse), s = steps(q @ k^T); dv = p^T @ dout, ds = p * (dout @ v^T - delta) with
        delta = rowsum(dout * out) - dlse, and back through the steps: dq = ds @ k, dk = ds^T @ q; p is computed again
source  FlashAttention-2 (arXiv:2307.08691), algorithm 2, with one kernel for dq and one for dk and dv
key     <key>

Layouts: q [Tq, H, 32], k [Tk, Hkv, 32], v [Tk, Hkv, 32] hold the tokens of B sequences, one after the other;
cu_q and cu_k, int32 [B + 1] from 0 to Tq and Tk, say where each begins. Some may be empty. max_q and max_k are the
lengths of the longest, or more. Positions count within a sequence, and a mask knows its lengths. out and dout
[Tq, H, 32]; lse and dlse [H, Tq] in fp32. Any strides;
a gradient has the shape and the dtype of its tensor.
Other tensors have Sq = max_q and Sk = max_k; what is past the end of a shorter sequence counts for nothing, and its
gradient is zero. What sequences share has the sum of their gradients.
bias0 [1, H, Sq, Sk]: added to the scores.
bias1 [B, 1, 1, Sk]: added to the scores.
seen [B, 1, Sq, Sk]: bool, pairs that count.

Run this file to test the kernel against plain torch, in fp64: on a GPU if there is one, else in Triton's interpreter.
"""

import os
import sys

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import triton
import triton.language as tl

DTYPE = torch.float32
GROUP = 1  # query heads per key/value head
# (BLOCK_M queries, BLOCK_N keys, warps, stages) of one program
CONFIGS = {
    "sm_80": (32, 32, 8, 2),
    "sm_86": (32, 32, 8, 2),
    "sm_90": (32, 32, 8, 2),
    "sm_100": (32, 32, 8, 2),
    "gfx942": (64, 32, 4, 2),
    "interpreter": (32, 32, 1, 1),
}
# Likewise, of the programs that hold keys
KEYS_CONFIGS = {
    "sm_80": (16, 16, 4, 1),
    "sm_86": (16, 16, 4, 1),
    "sm_90": (16, 16, 4, 1),
    "sm_100": (16, 16, 4, 1),
    "gfx942": (32, 32, 4, 1),
    "interpreter": (32, 32, 1, 1),
}


@triton.jit
def _base2(x):
    """x * log2(e), or x itself where that is lower than fp32 can hold, so that the least finite bias stays finite."""
    return tl.where(x < -2.3586574916681825e+38, x, x * 1.4426950408889634)


@triton.jit
def _pull(
    s, dp, top, share, delta, first, n, i, j,
    bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
    sq, sk,
    MASKED: tl.constexpr,
):
    """Return s, p, ds, d_bias0, d_bias1 for queries first + i and keys n + j.

    s is their contraction on the way in, their score in base 2 on the way out; p is the weight, dp its gradient, ds the
    gradient of the contraction. d_.. are those of captured tensors, pair by pair. i and j are a column and a row, or a
    row and a column. MASKED: some of these pairs may be hidden or lie past an end.
    """
    qi = first + i
    ki = n + j
    bias0_tile = bias0_at + tl.cast(first, tl.int64) * bias0_q + i * bias0_q + tl.cast(n, tl.int64) * bias0_k + j * bias0_k
    if MASKED:
        bias0 = tl.load(bias0_tile, mask=(qi < sq) & (ki < sk), other=0).to(tl.float32)
    else:
        bias0 = tl.load(bias0_tile, mask=(qi < sq), other=0).to(tl.float32)
    bias1_tile = bias1_at + tl.cast(n, tl.int64) * bias1_k + j * bias1_k
    if MASKED:
        bias1 = tl.load(bias1_tile, mask=(ki < sk), other=0).to(tl.float32)
    else:
        bias1 = tl.load(bias1_tile).to(tl.float32)
    s = s * 1.4426950408889634 + _base2(bias0)
    s = s + _base2(-bias1)
    if MASKED:
        inside = (qi < sq) & (ki < sk)
        seen_tile = seen_at + tl.cast(first, tl.int64) * seen_q + i * seen_q + tl.cast(n, tl.int64) * seen_k + j * seen_k
        seen = tl.load(seen_tile, mask=(qi < sq) & (ki < sk), other=0) != 0
        keep = seen
        s = tl.where(keep, s, float("-inf"))
        s = tl.where(inside, s, float("-inf"))
    p = tl.exp2(s - top) * share
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(keep & inside, ds, 0.0)
    d_bias1 = -ds
    d_bias0 = ds
    return s, p, ds, d_bias0, d_bias1


@triton.jit
def _visit(
    q, dout, top, share, delta, first, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
    bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
    sq, sk,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Return the keys n .. n + BLOCK_N - 1, and what _pull returns for them and a tile of queries."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    inside = n + j < sk
    d = tl.arange(0, 32)
    k_tile = k_at + tl.cast(n, tl.int64) * k_n + j[:, None] * k_n + d[None, :] * k_d
    e = tl.arange(0, 32)
    v_tile = v_at + tl.cast(n, tl.int64) * v_n + j[:, None] * v_n + e[None, :] * v_d
    if MASKED:
        k = tl.load(k_tile, mask=inside[:, None], other=0.0)
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_tile)
        v = tl.load(v_tile)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    s, p, ds, d_bias0, d_bias1 = _pull(
        s, dp, top[:, None], share[:, None], delta[:, None], first, n, i[:, None], j[None, :],
        bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
        sq, sk, MASKED=MASKED,
    )
    return k, s, p, ds, d_bias0, d_bias1


@triton.jit
def _add_keys(
    dq,
    q, dout, top, share, delta, first, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
    bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
    sq, sk,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add what the keys n .. n + BLOCK_N - 1 give to dq of one tile of queries."""
    k, s, p, ds, d_bias0, d_bias1 = _visit(
        q, dout, top, share, delta, first, n,
        k_at, k_n, k_d, v_at, v_n, v_d,
        bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
        sq, sk,
        MASKED=MASKED, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
    )
    dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    return dq


@triton.jit
def _add_queries(
    dk, dv, d_bias1_sum,
    k, v, b, h, first, n,
    q_ptr, q_m, q_h, q_d, dout_ptr, dout_m, dout_h, dout_e,
    bias0_ptr, bias1_ptr, seen_ptr, top_ptr, share_ptr, delta_ptr,
    bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
    tokens, q_start, sq, sk,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add what the queries first .. of head h give to dk, dv, d_bias1_sum of one tile of keys."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    rows = first + i
    q_at = q_ptr + q_start * q_m + h * q_h + tl.cast(first, tl.int64) * q_m
    dout_at = dout_ptr + q_start * dout_m + h * dout_h + tl.cast(first, tl.int64) * dout_m
    d = tl.arange(0, 32)
    q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
    e = tl.arange(0, 32)
    dout_tile = dout_at + i[:, None] * dout_m + e[None, :] * dout_e
    q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
    dout = tl.load(dout_tile, mask=(rows < sq)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        dout = dout.to(tl.float32)
    at = h * tokens + q_start
    top = tl.load(top_ptr + at + rows, mask=rows < sq, other=float("inf"))
    share = tl.load(share_ptr + at + rows, mask=rows < sq, other=1.0)
    delta = tl.load(delta_ptr + at + rows, mask=rows < sq, other=0.0)
    bias0_at = bias0_ptr + h * bias0_h
    bias1_at = bias1_ptr + b * bias1_b
    seen_at = seen_ptr + b * seen_b
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    s, p, ds, d_bias0, d_bias1 = _pull(
        s, dp, top[None, :], share[None, :], delta[None, :], first, n, i[None, :], j[:, None],
        bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
        sq, sk, MASKED=MASKED,
    )
    dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
    dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    d_bias1_sum += tl.sum(d_bias1, 1)
    return dk, dv, d_bias1_sum


@triton.jit(do_not_specialize=["heads", "tokens", "longest"])
def biases_varlen_backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, out_ptr, bias0_ptr, bias1_ptr, seen_ptr, lse_ptr, top_ptr, share_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    q_m, q_h, q_d,
    k_n, k_h, k_d,
    v_n, v_h, v_d,
    dout_m, dout_h, dout_e,
    out_m, out_h, out_e,
    bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
    heads, tokens, longest,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head; from out, dout and lse what each row contributes to ds."""
    tiles = tl.cdiv(longest, BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b = bh // heads
    h = bh % heads
    first = tile * BLOCK_M
    q_start = tl.load(cu_q_ptr + b).to(tl.int64)
    k_start = tl.load(cu_k_ptr + b).to(tl.int64)
    sq = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
    sk = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
    if first >= sq:
        return
    last = tl.minimum(first + BLOCK_M, sq) - 1
    at = h * tokens + q_start + first
    i = tl.arange(0, BLOCK_M)
    rows = first + i
    out_at = out_ptr + q_start * out_m + h * out_h + tl.cast(first, tl.int64) * out_m
    dout_at = dout_ptr + q_start * dout_m + h * dout_h + tl.cast(first, tl.int64) * dout_m
    delta = tl.zeros([BLOCK_M], tl.float32)
    e = tl.arange(0, 32)
    out_tile = out_at + i[:, None] * out_m + e[None, :] * out_e
    dout_tile = dout_at + i[:, None] * dout_m + e[None, :] * dout_e
    out = tl.load(out_tile, mask=(rows < sq)[:, None], other=0.0).to(tl.float32)
    delta += tl.sum(out * tl.load(dout_tile, mask=(rows < sq)[:, None], other=0.0).to(tl.float32), 1)
    lse = tl.load(lse_ptr + at + i, mask=rows < sq, other=0.0)
    top = _base2(lse)
    top = tl.where(top == float("-inf"), float("inf"), top)  # a query that sees no key weighs none
    share = tl.full([BLOCK_M], 1.0, tl.float32)
    # Next to such scores fp32 does not hold the sum of exponentials: it is taken again, apart from the maximum.
    low = top <= -1442.6950408889634
    if tl.max(low.to(tl.int32), 0) > 0:
        q_at = q_ptr + q_start * q_m + h * q_h + tl.cast(first, tl.int64) * q_m
        d = tl.arange(0, 32)
        q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
        e = tl.arange(0, 32)
        dout_tile = dout_at + i[:, None] * dout_m + e[None, :] * dout_e
        q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
        dout = tl.load(dout_tile, mask=(rows < sq)[:, None], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
            dout = dout.to(tl.float32)
        k_at = k_ptr + k_start * k_n + h * k_h
        v_at = v_ptr + k_start * v_n + h * v_h
        bias0_at = bias0_ptr + h * bias0_h
        bias1_at = bias1_ptr + b * bias1_b
        seen_at = seen_ptr + b * seen_b
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        for n in tl.range(0, sk, BLOCK_N, num_stages=1):
            k, s, p, ds, d_bias0, d_bias1 = _visit(
                q, dout, top, share, delta, first, n,
                k_at, k_n, k_d, v_at, v_n, v_d,
                bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
                sq, sk,
                MASKED=True, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            )
            new_m = tl.maximum(m, tl.max(s, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
            l = l * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            m = new_m
        share = tl.where(low, 1.0 / l, share)
        top = tl.where(low, m, top)
    tl.store(share_ptr + at + i, share, mask=rows < sq)
    tl.store(top_ptr + at + i, top, mask=rows < sq)
    tl.store(delta_ptr + at + i, delta, mask=rows < sq)


@triton.jit(do_not_specialize=["heads", "tokens", "longest"])
def biases_varlen_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias0_ptr, bias1_ptr, seen_ptr, top_ptr, share_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    q_m, q_h, q_d,
    k_n, k_h, k_d,
    v_n, v_h, v_d,
    dout_m, dout_h, dout_e,
    bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
    heads, tokens, longest,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: the gradient of BLOCK_M queries of one head, over all the keys that they may see."""
    tiles = tl.cdiv(longest, BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b = bh // heads
    h = bh % heads
    first = tile * BLOCK_M
    q_start = tl.load(cu_q_ptr + b).to(tl.int64)
    k_start = tl.load(cu_k_ptr + b).to(tl.int64)
    sq = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
    sk = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
    if first >= sq:
        return
    last = tl.minimum(first + BLOCK_M, sq) - 1
    at = h * tokens + q_start + first
    i = tl.arange(0, BLOCK_M)
    rows = first + i
    q_at = q_ptr + q_start * q_m + h * q_h + tl.cast(first, tl.int64) * q_m
    dout_at = dout_ptr + q_start * dout_m + h * dout_h + tl.cast(first, tl.int64) * dout_m
    k_at = k_ptr + k_start * k_n + h * k_h
    v_at = v_ptr + k_start * v_n + h * v_h
    bias0_at = bias0_ptr + h * bias0_h
    bias1_at = bias1_ptr + b * bias1_b
    seen_at = seen_ptr + b * seen_b
    d = tl.arange(0, 32)
    q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
    e = tl.arange(0, 32)
    dout_tile = dout_at + i[:, None] * dout_m + e[None, :] * dout_e
    q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
    dout = tl.load(dout_tile, mask=(rows < sq)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        dout = dout.to(tl.float32)
    top = tl.load(top_ptr + at + i, mask=rows < sq, other=float("inf"))
    share = tl.load(share_ptr + at + i, mask=rows < sq, other=1.0)
    delta = tl.load(delta_ptr + at + i, mask=rows < sq, other=0.0)
    dq = tl.zeros([BLOCK_M, 32], tl.float32)
    # Some query of this tile may see the keys lo .. hi.
    lo = 0
    hi = sk
    for n in range(lo, hi, BLOCK_N):
        dq = _add_keys(
            dq,
            q, dout, top, share, delta, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
            sq, sk,
            MASKED=True, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    dq_at = dq_ptr + ((q_start + first) * heads + h) * 32 + i[:, None] * (heads * 32)
    tl.store(dq_at + d[None, :], (dq).to(dq_ptr.dtype.element_ty), mask=(rows < sq)[:, None])


@triton.jit(do_not_specialize=["kv_heads", "tokens", "wide"])
def biases_varlen_backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias0_ptr, bias1_ptr, seen_ptr, top_ptr, share_ptr, delta_ptr, dk_ptr, dv_ptr, d_bias1_ptr, cu_q_ptr, cu_k_ptr,
    q_m, q_h, q_d,
    k_n, k_h, k_d,
    v_n, v_h, v_d,
    dout_m, dout_h, dout_e,
    bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
    kv_heads, tokens, wide,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: the gradients of BLOCK_N keys and values of one head, over all the queries that may see them."""
    tiles = tl.cdiv(wide, BLOCK_N)
    tile = tl.program_id(0) % tiles
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b = bh // kv_heads
    kv_head = bh % kv_heads
    n = tile * BLOCK_N
    q_start = tl.load(cu_q_ptr + b).to(tl.int64)
    k_start = tl.load(cu_k_ptr + b).to(tl.int64)
    sq = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
    sk = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
    if n >= sk:
        return
    n_last = tl.minimum(n + BLOCK_N, sk) - 1
    j = tl.arange(0, BLOCK_N)
    cols = n + j
    k_at = k_ptr + k_start * k_n + kv_head * k_h + tl.cast(n, tl.int64) * k_n
    v_at = v_ptr + k_start * v_n + kv_head * v_h + tl.cast(n, tl.int64) * v_n
    d = tl.arange(0, 32)
    k_tile = k_at + j[:, None] * k_n + d[None, :] * k_d
    e = tl.arange(0, 32)
    v_tile = v_at + j[:, None] * v_n + e[None, :] * v_d
    k = tl.load(k_tile, mask=(cols < sk)[:, None], other=0.0)
    v = tl.load(v_tile, mask=(cols < sk)[:, None], other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    dk = tl.zeros([BLOCK_N, 32], tl.float32)
    dv = tl.zeros([BLOCK_N, 32], tl.float32)
    # The queries lo .. hi may see some key of this tile.
    lo = 0
    hi = sq
    heads = kv_heads
    h = kv_head
    d_bias1_sum = tl.zeros([BLOCK_N], tl.float32)
    for first in range(lo, hi, BLOCK_M):
        dk, dv, d_bias1_sum = _add_queries(
            dk, dv, d_bias1_sum,
            k, v, b, h, first, n,
            q_ptr, q_m, q_h, q_d, dout_ptr, dout_m, dout_h, dout_e,
            bias0_ptr, bias1_ptr, seen_ptr, top_ptr, share_ptr, delta_ptr,
            bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
            tokens, q_start, sq, sk,
            MASKED=True, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    if d_bias1_ptr is not None:
        d_bias1_at = d_bias1_ptr + (b * heads + h) * wide
        tl.store(d_bias1_at + cols, d_bias1_sum, mask=cols < sk)
    at = (k_start + n) * kv_heads + kv_head
    dk_at = dk_ptr + at * 32 + j[:, None] * (kv_heads * 32)
    dv_at = dv_ptr + at * 32 + j[:, None] * (kv_heads * 32)
    tl.store(dk_at + d[None, :], (dk).to(dk_ptr.dtype.element_ty), mask=(cols < sk)[:, None])
    tl.store(dv_at + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=(cols < sk)[:, None])


@triton.jit(do_not_specialize=["batch", "heads", "tokens", "longest", "wide"])
def biases_varlen_backward_d_bias0_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, bias0_ptr, bias1_ptr, seen_ptr, top_ptr, share_ptr, delta_ptr, d_bias0_ptr, cu_q_ptr, cu_k_ptr,
    q_m, q_h, q_d,
    k_n, k_h, k_d,
    v_n, v_h, v_d,
    dout_m, dout_h, dout_e,
    bias0_h, bias0_q, bias0_k, bias1_b, bias1_k, seen_b, seen_q, seen_k,
    batch, heads, tokens, longest, wide,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: one tile of the gradient of bias0, summed over sequences."""
    across = tl.cdiv(wide, BLOCK_N)
    tiles = tl.cdiv(longest, BLOCK_M) * across
    place = tl.cast(tl.program_id(0) // tiles, tl.int64)
    first = tl.program_id(0) % tiles // across * BLOCK_M
    n = tl.program_id(0) % across * BLOCK_N
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    rows = first + i
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for other in range(0, batch):
        b = tl.cast(other, tl.int64)
        h = tl.cast(place, tl.int64)
        q_start = tl.load(cu_q_ptr + b).to(tl.int64)
        k_start = tl.load(cu_k_ptr + b).to(tl.int64)
        sq = (tl.load(cu_q_ptr + b + 1) - q_start).to(tl.int32)
        sk = (tl.load(cu_k_ptr + b + 1) - k_start).to(tl.int32)
        last = tl.minimum(first + BLOCK_M, sq) - 1
        q_at = q_ptr + q_start * q_m + h * q_h + tl.cast(first, tl.int64) * q_m
        dout_at = dout_ptr + q_start * dout_m + h * dout_h + tl.cast(first, tl.int64) * dout_m
        at = h * tokens + q_start + first
        top = tl.load(top_ptr + at + i, mask=rows < sq, other=float("inf"))
        share = tl.load(share_ptr + at + i, mask=rows < sq, other=1.0)
        delta = tl.load(delta_ptr + at + i, mask=rows < sq, other=0.0)
        if (first < sq) & (n < sk):
            k_at = k_ptr + k_start * k_n + h * k_h
            v_at = v_ptr + k_start * v_n + h * v_h
            bias0_at = bias0_ptr + h * bias0_h
            bias1_at = bias1_ptr + b * bias1_b
            seen_at = seen_ptr + b * seen_b
            d = tl.arange(0, 32)
            q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
            e = tl.arange(0, 32)
            dout_tile = dout_at + i[:, None] * dout_m + e[None, :] * dout_e
            q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
            dout = tl.load(dout_tile, mask=(rows < sq)[:, None], other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
                dout = dout.to(tl.float32)
            k, s, p, ds, d_bias0, d_bias1 = _visit(
                q, dout, top, share, delta, first, n,
                k_at, k_n, k_d, v_at, v_n, v_d,
                bias0_at, bias0_q, bias0_k, bias1_at, bias1_k, seen_at, seen_q, seen_k,
                sq, sk,
                MASKED=True, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            )
            total += d_bias0
    pair = (place * longest + rows[:, None]) * wide + (n + j)[None, :]
    inside = (rows < longest)[:, None] & (n + j < wide)[None, :]
    tl.store(d_bias0_ptr + pair, total.to(d_bias0_ptr.dtype.element_ty), mask=inside)


def backward(q, k, v, bias0, bias1, seen, cu_q, cu_k, max_q, max_k, out, lse, dout, dlse=None, needs=None, new=torch.empty):
    """Return the gradients of (q, k, v, bias0, bias1, seen) as a list, from those of (out, lse); layouts as above.

    dlse is None for zeros. needs has one bool per gradient, None for all; what is not needed, or has no gradient, is
    None. new(shape, dtype=.., device=..) makes what the kernels write to.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernels were emitted for.
    """
    tokens, heads, _ = q.shape
    kv_heads, batch = k.shape[1], cu_q.numel() - 1
    sq, sk = max_q, max_k  # of the longest
    _expect("q", q, (tokens, kv_heads * GROUP, 32), DTYPE)
    _expect("k", k, (k.shape[0], kv_heads, 32), DTYPE)
    _expect("v", v, (k.shape[0], kv_heads, 32), DTYPE)
    _expect("cu_q", cu_q, (batch + 1,), torch.int32)
    _expect("cu_k", cu_k, (batch + 1,), torch.int32)
    _expect("out", out, (tokens, heads, 32), DTYPE)
    _expect("dout", dout, (tokens, heads, 32), DTYPE)
    _expect("lse", lse, (heads, tokens), torch.float32)
    for name, longest, count in (("max_q", sq, tokens), ("max_k", sk, k.shape[0])):
        if longest * batch < count:
            raise ValueError(f"{name}: expected the longest of {batch} sequences of {count} tokens, found {longest}")
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    given = (q, k, v, bias0, bias1, seen,)
    needs = [x.is_floating_point() and (needs is None or needs[at]) for at, x in enumerate(given)]
    if q.numel() == 0 or k.numel() == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(given, needs)]
    bias0 = _spread("bias0", bias0, (1, heads, sq, sk))
    bias1 = _spread("bias1", bias1, (batch, 1, 1, sk))
    seen = _spread("seen", seen, (batch, 1, sq, sk), torch.bool).view(torch.uint8)

    def room(dtype, *shape):
        wide = _interpreted(q) and dtype == torch.bfloat16  # which the interpreter cannot round
        return new(shape, dtype=torch.float32 if wide else dtype, device=q.device)

    config, keys_config = CONFIGS[_arch(q)], KEYS_CONFIGS[_arch(q)]
    row_tiles = triton.cdiv(sq, config[0]) * batch * heads
    top, share, delta = (room(torch.float32, heads, tokens) for _ in range(3))
    lse = lse.contiguous()
    _start(
        biases_varlen_backward_rows_kernel, row_tiles, config,
        q, k, v, dout, out, bias0, bias1, seen, lse, top, share, delta, cu_q, cu_k,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *out.stride(),
        bias0.stride(1), bias0.stride(2), bias0.stride(3),
        bias1.stride(0), bias1.stride(3),
        seen.stride(0), seen.stride(2), seen.stride(3),
        heads, tokens, sq,
    )
    if dlse is not None:
        delta -= dlse
    dq = dk = dv = d_bias0 = d_bias1 = None
    if needs[0]:
        dq = room(DTYPE, *q.shape)
        _start(
            biases_varlen_backward_dq_kernel, row_tiles, config,
            q, k, v, dout, bias0, bias1, seen, top, share, delta, dq, cu_q, cu_k,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
            bias0.stride(1), bias0.stride(2), bias0.stride(3),
            bias1.stride(0), bias1.stride(3),
            seen.stride(0), seen.stride(2), seen.stride(3),
            heads, tokens, sq,
        )
    if needs[1] or needs[2] or needs[4]:
        dk, dv = room(DTYPE, *k.shape), room(DTYPE, *v.shape)
        d_bias1 = room(torch.float32, batch, heads, 1, sk).zero_() if needs[4] else None
        _start(
            biases_varlen_backward_dkdv_kernel, triton.cdiv(sk, keys_config[1]) * batch * kv_heads, keys_config,
            q, k, v, dout, bias0, bias1, seen, top, share, delta, dk, dv, d_bias1, cu_q, cu_k,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
            bias0.stride(1), bias0.stride(2), bias0.stride(3),
            bias1.stride(0), bias1.stride(3),
            seen.stride(0), seen.stride(2), seen.stride(3),
            kv_heads, tokens, sk,
        )
    if needs[3]:
        d_bias0 = room(bias0.dtype, *(1, heads, sq, sk))
        _start(
            biases_varlen_backward_d_bias0_kernel, triton.cdiv(sq, config[0]) * triton.cdiv(sk, config[1]) * heads, config,
            q, k, v, dout, bias0, bias1, seen, top, share, delta, d_bias0, cu_q, cu_k,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(),
            bias0.stride(1), bias0.stride(2), bias0.stride(3),
            bias1.stride(0), bias1.stride(3),
            seen.stride(0), seen.stride(2), seen.stride(3),
            batch, heads, tokens, sq, sk,
        )
    grads = [dq, dk, dv, d_bias0, d_bias1, None]
    return [_fit(grad, x) if need else None for grad, x, need in zip(grads, given, needs)]


def _fit(grad, x):
    """Return a gradient summed to the shape of its tensor, in its dtype; zeros where nothing reads the tensor."""
    return torch.zeros_like(x) if grad is None else grad.sum_to_size(x.shape).to(x.dtype)


def _start(kernel, programs, config, *args):
    block_m, block_n, warps, stages = config
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](
            *args,
            UPCAST=_interpreted(args[0]) and DTYPE == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )


def _expect(name, x, shape, dtype):
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, found {x.dtype} {list(x.shape)}")


def _spread(name, x, shape, dtype=None):
    """Return x as a view of this shape; axes of size 1 broadcast."""
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, found {x.dtype}")
    try:
        return x.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected what broadcasts to {list(shape)}, found {list(x.shape)}") from error


def _interpreted(q):
    return q.device.type == "cpu"


def _arch(q):
    """Return the key of CONFIGS for q's device; an unknown GPU gets the smallest tiles."""
    if _interpreted(q):
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("expected tensors on a GPU, or TRITON_INTERPRET=1 set before triton is imported")
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(q.device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_86")


def _dense(q, k, v, bias0, bias1, seen, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    s = q.to(work) @ k.to(work).mT
    s = s + bias0.to(work)
    s = s - bias1.to(work)
    keep = seen
    s = s.masked_fill(~keep, float("-inf"))
    unseen = (s == float("-inf")).all(-1, keepdim=True)  # such rows get zeros
    s = s.masked_fill(unseen, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(unseen[..., 0], float("-inf"))
    weights = torch.softmax(s, -1).masked_fill(unseen, 0.0)
    if work != torch.float64:
        weights = weights.to(q.dtype).to(work)
    return weights @ v.to(work), lse


def _sample(case, device):
    """Return inputs for a case (batch, key/value heads, Sq, Sk); every other one with NaN all around each tensor."""
    batch, hkv, sq, sk = CASES[case]
    heads = hkv * GROUP
    g = torch.Generator().manual_seed(case)
    q = torch.randn(batch, heads, sq, 32, generator=g) * (1 + 3 * (case % 2))
    k = torch.randn(batch, hkv, sk, 32, generator=g)
    v = torch.randn(batch, hkv, sk, 32, generator=g)
    tensors = [q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)]
    tensors.append(torch.randn(1, heads, sq, sk, generator=g).to(torch.float32))
    tensors.append(torch.randn(batch, 1, 1, sk, generator=g).to(torch.float32))
    tensors.append(torch.rand(batch, 1, sq, sk, generator=g) < 0.7)
    if case == 3:  # rows or batch entries that see nothing
        tensors[5][..., :1, :] = False
    return [(_surround(x) if case % 2 else x).to(device) for x in tensors]


def _surround(x):
    """Return x as a view into memory that is NaN before, between and after its rows, so that stray reads show."""
    room = torch.full([n + 2 for n in x.shape], float("nan") if x.is_floating_point() else True, dtype=x.dtype)
    view = room[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def _guarded(shape, dtype, device):
    """Return a tensor to write to, and the memory that it is a part of; all of it holds GUARD."""
    size = torch.Size(shape).numel()
    room = torch.full((size + 256,), GUARD, dtype=dtype, device=device)
    return room[128 : 128 + size].view(shape), room


CASES = [(1, 1, 1, 1), (3, 2, 33, 17), (2, 2, 17, 65), (2, 1, 65, 65), (4, 2, 300, 513), (5, 2, 200, 1000)]
GUARD = 12344.0


LENGTHS = [  # queries and keys of each sequence, by case
    ((1,), (1,)),
    ((33, 0, 5), (17, 9, 0)),
    ((17, 1), (65, 64)),
    ((65, 33), (40, 65)),
    ((300, 129, 0, 77), (300, 513, 20, 0)),
    ((64, 1, 1, 200, 128), (64, 1000, 1, 129, 128)),
]
CAPTURED = ('bhqk', 'bhqk', 'bhqk')  # the axes of the other tensors


def _pack(x, lengths):
    """Return [T, H, D] from [B, H, S, D]."""
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths)])


def _cut(x, axes, entries, sq, sk):
    """Return what of a captured tensor belongs to these batch entries and to so many tokens."""
    part = {"b": entries, "h": slice(None), "q": slice(sq), "k": slice(sk)}
    return x[tuple(part[a] if n > 1 else slice(None) for a, n in zip(axes, x.shape))]


def _poisoned(x, axes, lengths):
    """Return a captured tensor with NaN in place of what belongs to no token."""
    out = torch.full_like(x, float("nan") if x.is_floating_point() else 1)
    for b, (sq, sk) in enumerate(zip(*lengths)):
        _cut(out, axes, slice(b, b + 1), sq, sk).copy_(_cut(x, axes, slice(b, b + 1), sq, sk))
    return out


def reference(q, k, v, bias0, bias1, seen, cu_q, cu_k, work=torch.float64):
    """Return (out [H, Tq, 32], lse [H, Tq]) in plain torch, which takes one sequence at a time."""
    parts = []
    for b, (first, last, low, high) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:])):
        entries = slice(b, b + 1)
        own = [x.transpose(0, 1)[None] for x in (q[first:last], k[low:high], v[low:high])]
        rest = [_cut(x, axes, entries, last - first, high - low) for x, axes in zip((bias0, bias1, seen,), CAPTURED)]
        out, lse = _dense(*own, *rest, work=work)
        parts.append((out[-1], lse[-1]))
    return [torch.cat(x, 1) for x in zip(*parts)]


def _check(case, device):
    """Run one case twice; return its report and whether it passed: errors within limits, the same bits, no stray write."""
    padded, lengths = _sample(case, device), LENGTHS[case]
    q, k, v = (_pack(x, n) for x, n in zip(padded, (lengths[0], lengths[1], lengths[1])))
    inputs = [q, k, v, *(_poisoned(x, axes, lengths) for x, axes in zip(padded[3:], CAPTURED))]
    inputs = [(_surround(x) if case % 2 else x).to(device) for x in inputs]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    inputs += [cu_q, cu_k]
    g = torch.Generator().manual_seed(100 + case)
    out, lse = (x.to(y) for x, y in zip(reference(*inputs, work=torch.float32), (DTYPE, torch.float32)))
    dout, dlse = (torch.randn(x.shape, generator=g).to(x) for x in (out, lse))
    dlse = torch.where(lse.abs() < 1e6, dlse, 0.0)  # autograd takes each weight behind the lse of a row of fills for 1
    given = [_surround(x.cpu()).to(device) if case % 2 else x for x in (out, lse, dout, dlse)]
    out, lse, dout_, dlse_ = given
    given = [max(lengths[0]), max(lengths[1]), out.transpose(0, 1), lse, dout_.transpose(0, 1), dlse_]
    rooms = []

    def new(shape, dtype, device):
        view, room = _guarded(shape, dtype, device)
        rooms.append(room)
        return view

    found = backward(*inputs, *given, new=new)
    again = backward(*inputs, *given)
    want = _gradients(inputs, dout, dlse, torch.float64)
    worst, wrong, same = 0.0, 0, True
    for x, y, z, (limit, undefined) in zip(found, again, want, _limits(inputs, dout, dlse)):
        if x is not None:
            error = (x - z).abs()
            wrong += _wrong(error, limit, x.isnan() & undefined)
            worst = max(worst, (error / limit).nan_to_num(0.0, 0.0).max().item())
            same &= torch.equal(x.nan_to_num(), y.nan_to_num())
    stray = sum(int((x[:128] != GUARD).sum() + (x[-128:] != GUARD).sum()) for x in rooms)
    shapes = f"q {list(inputs[0].shape)}, k {list(inputs[1].shape)}"
    text = f"{shapes}: error {worst:.2f} of the limit, {wrong} values over it, {stray} stray writes"
    return text + ("" if same else ", not repeatable"), wrong == 0 and stray == 0 and same


def _limits(inputs, dout, dlse):
    """Return how far each gradient may be off, and where it may be NaN since plain torch has NaN there.

    Three times as far as autograd through plain torch in fp32 with weights rounded to the dtype, plus two rounding units
    of the largest value, had v and dout no signs and were no delta taken off, plus what an lse rounded to fp32 makes
    weights uncertain.
    """
    want = _gradients(inputs, dout, dlse, torch.float64)
    plain = _gradients(inputs, dout, dlse, torch.float32)
    bare, size = [*inputs[:2], inputs[2].abs(), *inputs[3:]], dout.double().abs()
    out, lse = reference(*bare)
    usual = lse.abs() < 1e6  # not a row of fills
    delta = (out * size).sum(-1) / torch.where(usual, 1, inputs[-1].diff().clamp(min=1).repeat_interleave(inputs[-2].diff()))
    whole = _gradients(bare, size, delta, torch.float64)
    unit = torch.finfo(DTYPE).eps + torch.finfo(torch.float32).eps * torch.where(usual, lse.abs(), 0.0).max()

    def most(*grads):
        return max(x.abs().nan_to_num(0.0, 0.0).max() for x in grads)

    rows = zip(want, plain, whole)
    return [(3 * most(y - x) + 2 * unit * most(x, z), y.isnan()) if y is not None else (None, None) for x, y, z in rows]


def _gradients(inputs, dout, dlse, work):
    """Return the gradients of inputs by autograd through the reference, computed in the dtype work; None for bools."""
    leaves = [x.detach().to(work if work == torch.float64 else x.dtype) if x.is_floating_point() else x for x in inputs]
    wanted = [x.requires_grad_() for x in leaves if x.is_floating_point()]
    out, lse = reference(*leaves, work=work)
    found = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), wanted, allow_unused=True)
    grads = iter(torch.zeros_like(x) if y is None else y for x, y in zip(wanted, found))
    return [next(grads) if x.is_floating_point() else None for x in leaves]


def _wrong(error, limit, same):
    """Count the rows over their limit; where the limit is undefined, those that are not the same."""
    undefined = ~(error.isfinite() & limit.isfinite())
    return int(torch.where(undefined, ~same, error > limit).sum())


def main():
    """Test the kernel; return the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        import numpy

        numpy.seterr(all="ignore")  # the interpreter computes in numpy; 0 / 0 is meant where a query sees no key
    passed = True
    for case in range(4 if device.type == "cpu" else len(CASES)):  # the interpreter takes 10 ms per tile
        text, ok = _check(case, device)
        print(f"{'ok  ' if ok else 'FAIL'} {text}")
        passed &= ok
    print(f"{'passed' if passed else 'FAILED'}: biases_varlen_backward_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
