"""Attention and its tangent, as one fused Triton kernel; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,32]:float32 k=bhkd[b,hkv,sk,32]:float32 v=bhke[b,hkv,sk,32]:float32 group=2 scale(0.125) mask=causal fill(replace,-inf) softmax
kind    tangent
formula out = p @ v, tout = (p * ts) @ v + p @ tv - mean * out with mean = rowsum(p * ts) in one pass over the keys,
        p the weights, s = steps(q @ k^T), ts = steps' along (tq @ k^T + q @ tk^T)
source  Terminal Velocity Matching (arXiv:2511.19797); tiles as FlashAttention-2 (arXiv:2307.08691), algorithm 1
key     <key>

Layouts: q [B, H, Sq, 32], k [B, Hkv, Sk, 32], v [B, Hkv, Sk, 32]; out [B, H, Sq, 32] in q's dtype,
lse [B, H, Sq] in fp32, the natural logarithm of each row's sum of exponentials. Any strides.
A tangent has the shape and the dtype of its tensor; t_.. is that of a tensor.

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
GROUP = 2  # query heads per key/value head
# (BLOCK_M queries, BLOCK_N keys, warps, stages) of one program
CONFIGS = {
    "sm_80": (32, 16, 8, 1),
    "sm_86": (32, 16, 8, 1),
    "sm_90": (32, 16, 8, 1),
    "sm_100": (32, 16, 8, 1),
    "gfx942": (32, 16, 8, 1),
    "interpreter": (32, 32, 1, 1),
}


@triton.jit
def _tile(
    acc, tacc, l, dl, m, q, tq, first, n,
    k_at, k_n, k_d, tk_at, tk_n, tk_d, v_at, v_n, v_d, tv_at, tv_n, tv_d,
    sq, sk,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add the keys n .. n + BLOCK_N - 1 to the sums (acc, tacc, l, dl, m) of one tile of queries.

    acc sums weighted values and tacc their tangents, l the weights and dl their tangents.
    ts is the tangent of the score s, in natural units; s is in base 2.
    MASKED: some of these keys may be hidden or lie past the end.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    rows = first + i
    cols = n + j
    inside = cols < sk
    d = tl.arange(0, 32)
    e = tl.arange(0, 32)
    k_tile = k_at + tl.cast(n, tl.int64) * k_n + j[:, None] * k_n + d[None, :] * k_d
    tk_tile = tk_at + tl.cast(n, tl.int64) * tk_n + j[:, None] * tk_n + d[None, :] * tk_d
    v_tile = v_at + tl.cast(n, tl.int64) * v_n + j[:, None] * v_n + e[None, :] * v_d
    tv_tile = tv_at + tl.cast(n, tl.int64) * tv_n + j[:, None] * tv_n + e[None, :] * tv_d
    if MASKED:
        k = tl.load(k_tile, mask=inside[:, None], other=0.0)
        tk = tl.load(tk_tile, mask=inside[:, None], other=0.0)
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
        tv = tl.load(tv_tile, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_tile)
        tk = tl.load(tk_tile)
        v = tl.load(v_tile)
        tv = tl.load(tv_tile)
    if UPCAST:
        k = k.to(tl.float32)
        tk = tk.to(tl.float32)
        v = v.to(tl.float32)
        tv = tv.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    ts = tl.dot(tq, tl.trans(k), input_precision="ieee")
    ts = tl.dot(q, tl.trans(tk), ts, input_precision="ieee")
    s = s * 0.18033688011112042  # 0.125 * log2(e)
    ts = ts * 0.125
    if MASKED:
        qi = rows[:, None]
        ki = cols[None, :]
        keep = ki <= qi
        s = tl.where(keep, s, float("-inf"))
        ts = tl.where(keep, ts, 0.0)
        s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    tp = p * ts
    new_l = l * shrink + tl.sum(p, 1)
    new_dl = dl * shrink + tl.sum(tp, 1)
    # a sum of its own: LLVM 22 aborts where three exact products follow each other on sm_90 and sm_100
    move = tl.dot(p.to(tv.dtype), tv, input_precision="ieee")
    move = tl.dot(tp.to(v.dtype), v, move, input_precision="ieee")
    tacc = tacc * shrink[:, None] + move
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, tacc, new_l, new_dl, new_m


@triton.jit(do_not_specialize=["heads", "sq", "sk"])
def causal_tangent_kernel(
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr,
    out_ptr, lse_ptr, tout_ptr, tlse_ptr,
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    tq_b, tq_h, tq_m, tq_d,
    tk_b, tk_h, tk_n, tk_d,
    tv_b, tv_h, tv_n, tv_d,
    heads, sq, sk,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, and all the keys that they may see."""
    tiles = tl.cdiv(sq, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b = bh // heads
    h = bh % heads
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, sq) - 1
    i = tl.arange(0, BLOCK_M)
    rows = first + i
    q_at = q_ptr + b * q_b + h * q_h + tl.cast(first, tl.int64) * q_m
    tq_at = tq_ptr + b * tq_b + h * tq_h + tl.cast(first, tl.int64) * tq_m
    k_at = k_ptr + b * k_b + h // 2 * k_h
    tk_at = tk_ptr + b * tk_b + h // 2 * tk_h
    v_at = v_ptr + b * v_b + h // 2 * v_h
    tv_at = tv_ptr + b * tv_b + h // 2 * tv_h
    d = tl.arange(0, 32)
    q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
    tq_tile = tq_at + i[:, None] * tq_m + d[None, :] * tq_d
    q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
    tq = tl.load(tq_tile, mask=(rows < sq)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        tq = tq.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 32], tl.float32)
    tacc = tl.zeros([BLOCK_M, 32], tl.float32)
    dl = tl.zeros([BLOCK_M], tl.float32)
    # Some query of this tile may see the keys lo .. hi; all of them see lo .. full_hi.
    lo = 0
    hi = tl.minimum(last + 1, sk)
    full_hi = tl.maximum(tl.minimum(first + 1, hi) // BLOCK_N * BLOCK_N, lo)
    for n in range(lo, full_hi, BLOCK_N):
        acc, tacc, l, dl, m = _tile(
            acc, tacc, l, dl, m, q, tq, first, n,
            k_at, k_n, k_d, tk_at, tk_n, tk_d, v_at, v_n, v_d, tv_at, tv_n, tv_d,
            sq, sk,
            MASKED=False, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    for n in range(full_hi, hi, BLOCK_N):
        acc, tacc, l, dl, m = _tile(
            acc, tacc, l, dl, m, q, tq, first, n,
            k_at, k_n, k_d, tk_at, tk_n, tk_d, v_at, v_n, v_d, tv_at, tv_n, tv_d,
            sq, sk,
            MASKED=True, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    total = l
    lse = (m + tl.log2(l)) * 0.6931471805599453
    mean = dl / total
    at = bh * sq + first
    out_at = out_ptr + at * 32 + i[:, None] * 32
    tout_at = tout_ptr + at * 32 + i[:, None] * 32
    e = tl.arange(0, 32)
    held = (rows < sq)[:, None]
    out = acc / total[:, None]
    tout = tacc / total[:, None] - mean[:, None] * out
    tl.store(out_at + e[None, :], out.to(out_ptr.dtype.element_ty), mask=held)
    tl.store(tout_at + e[None, :], tout.to(tout_ptr.dtype.element_ty), mask=held)
    tl.store(lse_ptr + at + i, lse, mask=rows < sq)
    tl.store(tlse_ptr + at + i, mean, mask=rows < sq)


def tangent(q, k, v, tq=None, tk=None, tv=None):
    """Return (out, lse, tout, tlse) for these inputs and their tangents, None for zeros; layouts as above.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernel was emitted for.
    """
    dtype = torch.float32 if _interpreted(q) and q.dtype == torch.bfloat16 else q.dtype
    out, tout = (torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=dtype) for _ in range(2))
    lse, tlse = (torch.empty(q.shape[:3], device=q.device, dtype=torch.float32) for _ in range(2))
    launch(q, k, v, tq, tk, tv, out, lse, tout, tlse)
    return out.to(q.dtype), lse, tout.to(q.dtype), tlse


def launch(q, k, v, tq, tk, tv, out, lse, tout, tlse):
    """Fill out, lse and their tangents, all contiguous; raises as tangent does."""
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    tq, tk, tv = (x.new_zeros(()).expand_as(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    for name, x, shape in (
        ("q", q, (batch, k.shape[1] * GROUP, sq, 32)),
        ("k", k, (batch, k.shape[1], sk, 32)),
        ("v", v, (batch, k.shape[1], sk, 32)),
        ("tq", tq, q.shape),
        ("tk", tk, k.shape),
        ("tv", tv, v.shape),
    ):
        _expect(name, x, shape, DTYPE)
    if sk == 0:
        raise ValueError("expected at least one key, found none")
    if out.numel() == 0:
        return
    block_m, block_n, warps, stages = CONFIGS[_arch(q)]
    with torch.cuda.device_of(q):
        causal_tangent_kernel[(triton.cdiv(sq, block_m) * batch * heads,)](
            q, k, v, tq, tk, tv,
            out, lse, tout, tlse,
            *q.stride(), *k.stride(), *v.stride(), *tq.stride(), *tk.stride(), *tv.stride(),
            heads, sq, sk,
            UPCAST=_interpreted(q) and q.dtype == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )


def _expect(name, x, shape, dtype):
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, found {x.dtype} {list(x.shape)}")


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


def reference(q, k, v, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    s = q.to(work) @ k.to(work).mT
    s = s * 0.125
    keep = ki <= qi
    s = s.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(s, -1)
    weights = torch.softmax(s, -1)
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


CASES = [(1, 1, 1, 1), (2, 2, 33, 17), (1, 2, 17, 65), (2, 1, 65, 65), (1, 2, 300, 300), (2, 2, 129, 513)]
GUARD = 12344.0


def _check(case, device):
    """Run one case; return its report and whether it passed: errors within limits, no stray write."""
    inputs = _sample(case, device)
    tangents = _directions(case, inputs)
    q, v = inputs[0], inputs[2]
    dtype = torch.float32 if _interpreted(q) and DTYPE == torch.bfloat16 else DTYPE
    shapes = ((*q.shape[:3], v.shape[3]), dtype), (q.shape[:3], torch.float32)
    rooms = [_guarded(*shape, device) for shape in 2 * shapes]
    launch(*inputs, *_moved(tangents), *(view for view, _ in rooms))
    worst, wrong = 0.0, 0
    for (x, _), (y, limit, undefined) in zip(rooms, _expected(inputs, tangents)):
        error = torch.where(x == y, 0.0, (x - y).abs())
        wrong += int(((error > limit) | (x.isnan() != undefined)).sum())
        worst = max(worst, (error / limit).nan_to_num(0.0, 0.0).max().item())
    stray = sum(int((room[:128] != GUARD).sum() + (room[-128:] != GUARD).sum()) for _, room in rooms)
    shapes = f"q {list(q.shape)}, k {list(inputs[1].shape)}"
    text = f"{shapes}: error {worst:.2f} of the limit, {wrong} values over it, {stray} stray writes"
    return text, wrong == 0 and stray == 0


def _directions(case, inputs):
    """Return a tangent per input, None for bools and integers; in case 2 some others have none either."""
    g = torch.Generator().manual_seed(200 + case)
    moved = [x.is_floating_point() and (case != 2 or at % 2 == 0) for at, x in enumerate(inputs)]
    found = [torch.randn(x.shape, generator=g).to(x.dtype) if m else None for x, m in zip(inputs, moved)]
    around = _surround if case % 2 else lambda x: x
    return [None if t is None else around(t).to(x.device) for t, x in zip(found, inputs)]


def _expected(inputs, tangents):
    """Return what each result should be, how far it may be off, and where it is to be NaN.

    Off by twice as much as plain torch in fp32 with weights rounded to the dtype, plus two rounding units of what the
    products would sum to, had they no signs. A row that fp32 cannot hold, such as one of fills, is what plain torch
    makes of it. A tangent is NaN where its result is.
    """
    v, tv = inputs[2], tangents[2]
    sk = v.shape[2]
    every = torch.eye(sk, device=v.device, dtype=v.dtype).expand(*v.shape[:2], sk, sk)  # such values show the weights
    shown = ([*x[:2], y, *x[3:]] for x, y in ((inputs, every), (tangents, None)))
    weights, lse, moves, mean = (x.abs() for x in _along(*shown, torch.float64))
    moves = moves + weights * mean[..., None]  # at least the tangent of a score times its weight
    size = moves @ v.double().abs().repeat_interleave(GROUP, 1)
    if tv is not None:
        size = size + weights @ tv.double().abs().repeat_interleave(GROUP, 1)
    want, plain = (_along(inputs, tangents, work) for work in (torch.float64, torch.float32))
    usual = lse < 1e6
    unit, fine = torch.finfo(DTYPE).eps, torch.finfo(torch.float32).eps
    least = unit * v.abs().max(), 2 * fine * (1 + lse), unit * size.amax(-1, keepdim=True), 2 * fine * moves.sum(-1)
    lost, lost_lse = plain[0].isnan(), plain[1].isnan()
    undefined = lost, lost_lse, lost, lost.any(-1)
    found = []
    for at, (x, y, z) in enumerate(zip(want, plain, least)):
        rows = usual.view(*usual.shape, *(1,) * (x.dim() - 3))
        limit = 2 * torch.where(rows, y - x, 0.0).abs().nan_to_num(0.0).max() + 2 * z
        found.append((torch.where(rows, x, y), limit, undefined[at]))
    return found


def _moved(tangents):
    """Return the tangents that a launch takes: those of captured bools and integers are left out."""
    return [tangents[at] for at in [0, 1, 2]]


def _along(inputs, tangents, work):
    """Return out and lse of the reference and the tangent of each, computed in the dtype work."""
    wide = [x.to(work) if x.is_floating_point() and work == torch.float64 else x for x in inputs]
    moved = [at for at, t in enumerate(tangents) if t is not None]

    def call(*points):
        every = list(wide)
        for at, x in zip(moved, points):
            every[at] = x
        return reference(*every, work=work)

    along = tuple(tangents[at].to(wide[at].dtype) for at in moved)
    results, moves = torch.func.jvp(call, tuple(wide[at] for at in moved), along)
    return *results, *moves


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
    print(f"{'passed' if passed else 'FAILED'}: causal_tangent_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
