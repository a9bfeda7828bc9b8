"""Attention, forward, as one fused Triton kernel; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,16]:float32 k=bhkd[b,hkv,sk,16]:float32 v=bhke[b,hkv,sk,16]:float32 group=1 scale(0.25) mask=(causal & document(ids0,ids1)) fill(add,-3.4028234663852886e+38) softmax with ids0=bq[b,sq]:int64 with ids1=bk[b,sk]:int64
kind    forward
formula out = softmax(steps(q @ k^T)) @ v in one pass over the keys, with a running maximum and sum per query
source  FlashAttention-2 (arXiv:2307.08691), algorithm 1; online softmax (arXiv:1805.02867)
key     <key>

Layouts: q [B, H, Sq, 16], k [B, Hkv, Sk, 16], v [B, Hkv, Sk, 16]; out [B, H, Sq, 16] in q's dtype,
lse [B, H, Sq] in fp32, the natural logarithm of each row's sum of exponentials. Any strides.
ids0 [B, Sq]: integers that the mask compares.
ids1 [B, Sk]: integers that the mask compares.

Run this file to test the kernel against plain torch, in fp64: on a GPU if there is one, else in Triton's interpreter.
With --bench it is timed instead, on a GPU.
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
POINTERS = {  # where tensor descriptors cannot read k or v
    "sm_90": (32, 32, 8, 2),
    "sm_100": (32, 32, 8, 2),
}
DESCRIPTORS = ("sm_90", "sm_100", "interpreter")  # where TMA copies tiles of k and v, if they are aligned


@triton.jit
def _tile(
    acc, l, m, q, first, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
    ids0, ids1_at, ids1_k,
    sq, sk,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add the keys n .. n + BLOCK_N - 1 to the running softmax (acc, l, m) of one tile of queries.

    MASKED: some of these keys may be hidden or lie past the end. Scores are in base 2.
    """
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    rows = first + i
    cols = n + j
    inside = cols < sk
    if DESCRIPTORS:  # rows past the end, and features past the head size, are zeros
        k = k_at.load([n, 0])
        v = v_at.load([n, 0])
    else:
        d = tl.arange(0, 16)
        k_tile = k_at + tl.cast(n, tl.int64) * k_n + j[:, None] * k_n + d[None, :] * k_d
        e = tl.arange(0, 16)
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
    s = s * 0.36067376022224085  # 0.25 * log2(e)
    if MASKED:
        qi = rows[:, None]
        ki = cols[None, :]
        ids1_tile = ids1_at + tl.cast(n, tl.int64) * ids1_k + j[None, :] * ids1_k
        ids1 = tl.load(ids1_tile, mask=inside[None, :], other=0)
        keep = (ki <= qi) & (ids1 == ids0)
        s = tl.where(keep, s, s + -3.4028234663852886e+38)
        s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, l * shrink + tl.sum(p, 1), new_m


@triton.jit(do_not_specialize=["heads", "sq", "sk"])
def documents_kernel(
    q_ptr, k_ptr, v_ptr, ids0_ptr, ids1_ptr, reach_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    ids0_b, ids0_q, ids1_b, ids1_k,
    heads, sq, sk,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, and all the keys that they may see."""
    tiles = tl.cdiv(sq, BLOCK_M)
    tile = tl.program_id(0) % tiles
    bh = tl.cast(tl.program_id(0) // tiles, tl.int64)
    b = bh // heads
    h = bh % heads
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, sq) - 1
    i = tl.arange(0, BLOCK_M)
    rows = first + i
    q_at = q_ptr + b * q_b + h * q_h + tl.cast(first, tl.int64) * q_m
    k_at = k_ptr + b * k_b + h * k_h
    v_at = v_ptr + b * v_b + h * v_h
    if DESCRIPTORS:
        k_at = tl.make_tensor_descriptor(k_at, [sk, 16], [k_n, 1], [BLOCK_N, 16])
        v_at = tl.make_tensor_descriptor(v_at, [sk, 16], [v_n, 1], [BLOCK_N, 16])
    ids0_at = ids0_ptr + b * ids0_b + tl.cast(first, tl.int64) * ids0_q
    ids1_at = ids1_ptr + b * ids1_b
    d = tl.arange(0, 16)
    q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
    q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    ids0 = tl.load(ids0_at + i[:, None] * ids0_q, mask=(rows < sq)[:, None], other=0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 16], tl.float32)
    # By ids: what lies outside see_lo .. see_hi shares no document with this tile, and all in
    # same_lo .. same_hi is of its only one.
    see_lo = tl.load(reach_ptr + (b * tiles + tile) * 4)
    see_hi = tl.load(reach_ptr + (b * tiles + tile) * 4 + 1)
    same_lo = tl.load(reach_ptr + (b * tiles + tile) * 4 + 2)
    same_hi = tl.load(reach_ptr + (b * tiles + tile) * 4 + 3)
    # Some query of this tile may see the keys lo .. hi; all of them see full_lo .. full_hi.
    lo = tl.maximum(see_lo, 0) // BLOCK_N * BLOCK_N
    hi = tl.minimum(last + 1, tl.minimum(see_hi, sk))
    full_lo = tl.cdiv(same_lo, BLOCK_N) * BLOCK_N
    full_lo = tl.maximum(tl.minimum(full_lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N), lo)
    full_hi = tl.maximum(tl.minimum(first + 1, tl.minimum(same_hi, hi)) // BLOCK_N * BLOCK_N, full_lo)
    for n in range(lo, full_lo, BLOCK_N):
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            ids0, ids1_at, ids1_k,
            sq, sk,
            MASKED=True, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    for n in range(full_lo, full_hi, BLOCK_N):
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            ids0, ids1_at, ids1_k,
            sq, sk,
            MASKED=False, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    for n in range(full_hi, hi, BLOCK_N):
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            ids0, ids1_at, ids1_k,
            sq, sk,
            MASKED=True, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    # A query that saw no key spreads over all of them, hidden ones too: such a tile, a rare one, visits everything.
    again = tl.min(tl.where(rows < sq, m, float("inf")), 0) <= -1.7014117331926443e+38
    if again:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, 16], tl.float32)
    for n in tl.range(0, tl.where(again, sk, 0), BLOCK_N, num_stages=1):
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            ids0, ids1_at, ids1_k,
            sq, sk,
            MASKED=True, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
    total = l[:, None]
    lse = (m + tl.log2(l)) * 0.6931471805599453
    lse = tl.where(m < -2.3586574916681825e+38, m, lse)  # a row of scores that stood for themselves
    at = bh * sq + first
    out_at = out_ptr + at * 16 + i[:, None] * 16
    e = tl.arange(0, 16)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_at + e[None, :], out, mask=(rows < sq)[:, None])
    tl.store(lse_ptr + at + i, lse, mask=rows < sq)


def attend(q, k, v, ids0, ids1):
    """Return (out, lse) for these inputs; layouts as above.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernel was emitted for.
    """
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    launch(q, k, v, ids0, ids1, out, lse)
    return out.to(q.dtype), lse


def launch(q, k, v, ids0, ids1, out, lse):
    """Fill out and lse, both contiguous; raises as attend does."""
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    _expect("q", q, (batch, k.shape[1] * GROUP, sq, 16), DTYPE)
    _expect("k", k, (batch, k.shape[1], sk, 16), DTYPE)
    _expect("v", v, (batch, k.shape[1], sk, 16), DTYPE)
    if sk == 0:
        raise ValueError("expected at least one key, found none")
    if out.numel() == 0:
        return
    ids0 = _spread("ids0", ids0, (batch, sq))
    ids1 = _spread("ids1", ids1, (batch, sk))
    arch = _arch(q)
    descriptors = arch in DESCRIPTORS and _aligned(k) and _aligned(v)
    if descriptors:
        triton.set_allocator(_scratch)
    configs = CONFIGS if descriptors or arch not in POINTERS else POINTERS
    block_m, block_n, warps, stages = configs[arch]
    reach = _reach(ids0, ids1, block_m, block_n)
    turns = triton.cdiv(sq, block_m) * batch * heads
    with torch.cuda.device_of(q):
        documents_kernel[(turns,)](
            q, k, v, ids0, ids1, reach, out, lse,
            *q.stride(), *k.stride(), *v.stride(),
            ids0.stride(0), ids0.stride(1),
            ids1.stride(0), ids1.stride(1),
            heads, sq, sk,
            DESCRIPTORS=descriptors,
            UPCAST=_interpreted(q) and q.dtype == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )


def _aligned(x):
    """Say whether tensor descriptors can read x: whole rows, all addresses multiples of 16 bytes."""
    steps = [x.data_ptr(), *(n * x.element_size() for n in x.stride()[:3])]
    return x.stride(3) == 1 and x.stride(2) > 0 and all(n % 16 == 0 for n in steps)


def _scratch(size, alignment, stream):
    """Return memory in which a kernel builds its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


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


def _reach(ids, others, size, step):
    """Return what each tile of size ids sees of the others: int32 [B, tiles, 4].

    From the first number up to the second some of the others may have an id of the tile, from the third up to the
    fourth all have its only id. Bounds of ids by tile are compared, which holds for ids in any order.
    """
    (low, high), (first, last) = _extremes(ids, size), _extremes(others, step)
    low, high, first, last = low.unsqueeze(2), high.unsqueeze(2), first.unsqueeze(1), last.unsqueeze(1)
    some = (first <= high) & (last >= low)
    same = some & (low == high) & (first == last)
    at = torch.arange(some.shape[2], device=ids.device)
    (see, see_end), (all_, all_end) = (
        (torch.where(x, at, len(at)).amin(2), torch.where(x, at + 1, 0).amax(2)) for x in (some, same)
    )
    all_end = torch.where(all_end - all_ == same.sum(2), all_end, all_)  # none, where they lie apart
    bounds = torch.stack([see, see_end, all_, all_end], 2)
    return (bounds * step).to(torch.int32)


def _extremes(ids, size):
    """Return the least and the greatest of each size ids, the last ones repeated to a whole tile."""
    tail = ids.narrow(1, ids.shape[1] - 1, 1).expand(-1, -ids.shape[1] % size)
    return torch.cat([ids, tail], 1).unflatten(1, (-1, size)).aminmax(dim=2)


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


def reference(q, k, v, ids0, ids1, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    s = q.to(work) @ k.to(work).mT
    s = s * 0.25
    keep = (ki <= qi) & (ids1[:, None, None, :] == ids0[:, None, :, None])
    s = s + torch.zeros_like(s).masked_fill(~keep, -3.4028234663852886e+38)
    lse = torch.logsumexp(s, -1)
    weights = torch.softmax(s, -1)
    if work != torch.float64:
        weights = weights.to(q.dtype).to(work)
    return weights @ v.to(work), lse


def _sample(case, device, sizes=None):
    """Return inputs for a case (batch, key/value heads, Sq, Sk); every other one with NaN all around each tensor."""
    batch, hkv, sq, sk = sizes or CASES[case]
    heads = hkv * GROUP
    g = torch.Generator().manual_seed(case)
    q = torch.randn(batch, heads, sq, 16, generator=g) * (1 + 3 * (case % 2))
    k = torch.randn(batch, hkv, sk, 16, generator=g)
    v = torch.randn(batch, hkv, sk, 16, generator=g)
    tensors = [q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)]
    tensors.append(torch.randint(0, 3, (batch, sq), generator=g).sort(-1)[0].to(torch.int64))
    tensors.append(torch.randint(0, 3, (batch, sk), generator=g).sort(-1)[0].to(torch.int64))
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
    launch(*inputs, out, lse)
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
    print(f"{'passed' if passed else 'FAILED'}: documents_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


BENCH = (2, 8, 4096, 4096)


def _bench():
    """Time the kernel and plain torch on tensors of the sizes BENCH; return the exit code."""
    if not torch.cuda.is_available():
        print("--bench: expected a GPU, found none", file=sys.stderr)
        return 2
    inputs = _sample(0, "cuda", BENCH)
    calls = {
        "this kernel": lambda: attend(*inputs),
        "plain torch": lambda: reference(*inputs, work=torch.float32),
    }
    flops = 2 * inputs[0].shape[1] * BENCH[0] * BENCH[2] * BENCH[3] * (16 + 16)
    room = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")  # filled before each run, which empties the L2 cache
    print(f"(batch, key/value heads, Sq, Sk) {BENCH}; TFLOP/s count every pair of query and key")
    for name, call in calls.items():
        times = []
        for _ in range(23):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            room.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        ms = sorted(times[2:])[10]  # the median, after two runs to warm up
        print(f"{name} {ms:9.3f} ms {flops / ms / 1e9:8.1f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(_bench() if "--bench" in sys.argv else main())
