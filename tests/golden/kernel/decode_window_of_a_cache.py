"""Attention, decode, as two Triton kernels; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,32]:float32 k=bhkd[b,hkv,sk,32]:float32 v=bhke[b,hkv,sk,32]:float32 group=2 scale(0.125) mask=(causal(end) & (window(left=20,right=0,align=end) | range(k,0,4))) fill(replace,-inf) softmax
kind    decode
formula out = softmax(steps(q @ k^T)) @ v, in shares of the keys, added by their log-sum-exp
source  Flash-Decoding (pytorch.org/blog/flash-decoding); online softmax (arXiv:1805.02867)
key     <key>

Layouts: q [B, H, Sq, 32], k [B, Hkv, Sk, 32], v [B, Hkv, Sk, 32]; out [B, H, Sq, 32] in q's dtype,
lse [B, H, Sq] in fp32, the natural logarithm of each row's sum of exponentials. Any strides.

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
# (BLOCK_M rows at most, BLOCK_N keys, warps, stages) of one program; a row is a query of one of the 2 heads
CONFIGS = {
    "sm_80": (16, 32, 4, 2),
    "sm_86": (16, 32, 4, 2),
    "sm_90": (16, 32, 4, 2),
    "sm_100": (16, 32, 4, 2),
    "gfx942": (16, 32, 4, 2),
    "interpreter": (16, 32, 1, 1),
}


@triton.jit
def _tile(
    acc, l, m, q, rows, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
    sq, sk,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add the keys n .. n + BLOCK_N - 1 to the running softmax (acc, l, m) of a tile of rows.

    Some of these keys may be hidden or lie past the end. Scores are in base 2.
    """
    cols = n + tl.arange(0, BLOCK_N)
    inside = cols < sk
    k_rows = tl.cast(cols, tl.int64) * k_n
    v_rows = tl.cast(cols, tl.int64) * v_n
    d = tl.arange(0, 32)
    k_tile = k_at + k_rows[:, None] + d[None, :] * k_d
    e = tl.arange(0, 32)
    v_tile = v_at + v_rows[:, None] + e[None, :] * v_d
    k = tl.load(k_tile, mask=inside[:, None], other=0.0)
    v = tl.load(v_tile, mask=inside[:, None], other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = s * 0.18033688011112042  # 0.125 * log2(e)
    qi = rows[:, None]
    ki = cols[None, :]
    keep = (ki <= qi + (sk - sq)) & (((ki >= qi + (sk - sq) - 20) & (ki <= qi + (sk - sq))) | (ki < 4))
    s = tl.where(keep, s, float("-inf"))
    s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, l * shrink + tl.sum(p, 1), new_m


@triton.jit(do_not_specialize=["heads", "sq", "sk", "splits"])
def window_of_a_cache_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, l_ptr, m_ptr,
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    heads, sq, sk, splits,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M of the rows that read a key/value head, and one share of the keys that they may see."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    blocks = tl.cdiv(2 * sq, BLOCK_M)
    pair = tl.cast(block // blocks, tl.int64)  # batch entry and key/value head
    b = pair // (heads // 2)
    kv = pair % (heads // 2)
    row = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < 2 * sq
    at = (pair * (2 * sq) + row) * splits + split
    row = tl.minimum(row, 2 * sq - 1)  # rows past the end repeat the last
    h = kv * 2 + row // sq
    rows = row % sq
    q_at = q_ptr + b * q_b + h * q_h + tl.cast(rows, tl.int64) * q_m
    k_at = k_ptr + b * k_b + kv * k_h
    v_at = v_ptr + b * v_b + kv * v_h
    d = tl.arange(0, 32)
    q_tile = q_at[:, None] + d[None, :] * q_d
    q = tl.load(q_tile)
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 32], tl.float32)
    first = 0
    last = sq - 1
    # Some query sees the keys lo .. hi and lo_1 .. hi_1; every split takes as many of their tiles.
    lo = 0
    hi = tl.minimum(last + sk - sq + 1, tl.minimum(4, sk))
    lo_1 = tl.maximum(tl.maximum(first + sk - sq - 20, 0) // BLOCK_N * BLOCK_N, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    hi_1 = tl.minimum(last + sk - sq + 1, sk)
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    early = tiles
    tiles += tl.cdiv(tl.maximum(hi_1 - lo_1, 0), BLOCK_N)
    share = tl.cdiv(tiles, splits)
    begin = tl.minimum(split * share, tiles)
    for t in range(begin, tl.minimum(begin + share, tiles)):
        n = tl.where(t < early, lo + t * BLOCK_N, lo_1 + (t - early) * BLOCK_N)
        acc, l, m = _tile(
            acc, l, m, q, rows, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            sq, sk,
            UPCAST=UPCAST, BLOCK_N=BLOCK_N,
        )
    tl.store(l_ptr + at, l, mask=exists)
    tl.store(m_ptr + at, m, mask=exists)
    e = tl.arange(0, 32)
    acc_tile = acc_ptr + at[:, None] * 32 + e[None, :]
    tl.store(acc_tile, acc, mask=exists[:, None])


@triton.jit(do_not_specialize=["splits"])
def window_of_a_cache_combine(
    acc_ptr, l_ptr, m_ptr, out_ptr, lse_ptr,
    splits,
):
    """One program: one query of one head. Its shares (acc, l, m) are added, 16 at a time."""
    row = tl.cast(tl.program_id(0), tl.int64)
    m = float("-inf")
    l = 0.0
    e = tl.arange(0, 32)
    acc = tl.zeros([32], tl.float32)
    for n in range(0, splits, 16):
        split = n + tl.arange(0, 16)
        exists = split < splits
        at = row * splits + split
        share_l = tl.load(l_ptr + at, mask=exists, other=0.0)
        share_m = tl.load(m_ptr + at, mask=exists, other=float("-inf"))
        new_m = tl.maximum(m, tl.max(share_m, 0))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)  # no share has seen anything yet
        weight = tl.exp2(share_m - base)
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(share_l * weight, 0)
        m = new_m
        share_tile = acc_ptr + at[:, None] * 32 + e[None, :]
        share = tl.load(share_tile, mask=exists[:, None], other=0.0)
        acc = acc * shrink + tl.sum(share * weight[:, None], 0)
    lse = (m + tl.log2(l)) * 0.6931471805599453
    out = acc / l
    out_tile = out_ptr + row * 32 + e
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, lse)


def attend(q, k, v, splits=None):
    """Return (out, lse) for these inputs; layouts as above.

    splits: into how many shares the keys are cut; None leaves it to the size of the GPU.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernel was emitted for.
    """
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out = torch.empty(*q.shape[:3], 32, device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    launch(q, k, v, out, lse, splits)
    return out.to(q.dtype), lse


def launch(q, k, v, out, lse, splits=None):
    """Fill out and lse, both contiguous; raises as attend does."""
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    _expect("q", q, (batch, k.shape[1] * GROUP, sq, 32), DTYPE)
    _expect("k", k, (batch, k.shape[1], sk, 32), DTYPE)
    _expect("v", v, (batch, k.shape[1], sk, 32), DTYPE)
    if sk == 0:
        raise ValueError("expected at least one key, found none")
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected at least 1, found {splits}")
    if out.numel() == 0:
        return
    most_m, block_n, warps, stages = CONFIGS[_arch(q)]
    block_m = min(most_m, max(16, triton.next_power_of_2(2 * sq)))  # 16: the least of a contraction
    programs = triton.cdiv(2 * sq, block_m) * batch * (heads // GROUP)
    splits = splits or _splits(q, programs, sk, block_n)
    # What each share computes is added up by the second kernel, also where there is only one.
    acc = torch.empty(batch * heads * sq, splits, 32, device=q.device, dtype=torch.float32)
    l, m = torch.empty(2, batch * heads * sq, splits, device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        window_of_a_cache_kernel[(programs * splits,)](
            q, k, v, acc, l, m,
            *q.stride(), *k.stride(), *v.stride(),
            heads, sq, sk, splits,
            UPCAST=_interpreted(q) and q.dtype == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        window_of_a_cache_combine[(batch * heads * sq,)](
            acc, l, m, out, lse,
            splits,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def _splits(q, programs, sk, block_n):
    """Return into how many shares to cut the keys: two programs per processor, each with 4 tiles at least."""
    processors = 2 if _interpreted(q) else torch.cuda.get_device_properties(q.device).multi_processor_count
    return min(triton.cdiv(2 * processors, programs), triton.cdiv(sk, 4 * block_n))


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
    keep = (ki <= qi + (sk - sq)) & (((ki >= qi + (sk - sq) - 20) & (ki <= qi + (sk - sq))) | (ki < 4))
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


CASES = [(1, 1, 1, 1), (2, 2, 1, 17), (1, 2, 3, 129), (2, 1, 3, 600), (2, 2, 1, 4099), (1, 4, 16, 1000)]
GUARD = 12344.0


def _check(case, device):
    """Run one case; return its report and whether it passed.

    The kernel may be off by twice as much as plain torch in fp32 with weights rounded to the dtype, plus two rounding
    units of the largest value in v (four of its own size for lse, which base 2 adds to). A row that fp32 cannot hold,
    such as one of fills on top of fills, is what plain torch makes of it.
    """
    inputs = _sample(case, device)
    q, v = inputs[0], inputs[2]
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out, out_room = _guarded((*q.shape[:3], v.shape[3]), torch.float32 if upcast else q.dtype, device)
    lse, lse_room = _guarded(q.shape[:3], torch.float32, device)
    launch(*inputs, out, lse, splits=(None, 1, 3, 20)[case % 4])
    want, want_lse = reference(*inputs)
    plain, plain_lse = reference(*inputs, work=torch.float32)
    usual = want_lse.abs() < 1e6  # not a row of fills, whose scores fp32 cannot tell apart
    own, own_lse = (plain - want).abs().amax(-1), (plain_lse - want_lse).abs()
    own, own_lse = (torch.where(usual, torch.where(usual, x, 0.0).max(), x) for x in (own, own_lse))
    limit = 2 * own + 2 * torch.finfo(DTYPE).eps * v.abs().max()
    lse_limit = 2 * own_lse + 4 * torch.finfo(torch.float32).eps * (1 + want_lse.abs())
    wrong = _wrong((out - want).abs().amax(-1), limit, plain.isnan().any(-1) == out.isnan().any(-1))
    wrong += _wrong((lse - want_lse).abs(), lse_limit, (plain_lse == lse) | (plain_lse.isnan() & lse.isnan()))
    stray = sum(int((x[:128] != GUARD).sum() + (x[-128:] != GUARD).sum()) for x in (out_room, lse_room))
    error = (out - want).abs().nan_to_num(0.0).max().item()
    shapes = f"q {list(q.shape)}, k {list(inputs[1].shape)}"
    text = f"{shapes}: error {error:.1e}, {wrong} rows over the limit, {stray} stray writes"
    return text, wrong == 0 and stray == 0


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
    print(f"{'passed' if passed else 'FAILED'}: window_of_a_cache_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
