"""Attention, decode from pages, as two Triton kernels; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,32]:float16 k=bhkd[b,hkv,sk,32]:float16 v=bhke[b,hkv,sk,32]:float16 group=4 scale(0.125) mask=(causal(end) & padding(key,valid)) fill(replace,-3.4028234663852886e+38) softmax(upcast) with valid=bk[b,sk]:bool
kind    paged
formula out = softmax(steps(q @ k^T)) @ v, in shares of the keys, added by their log-sum-exp
source  Flash-Decoding (pytorch.org/blog/flash-decoding); online softmax (arXiv:1805.02867)
key     <key>

Layouts: q [B, H, Sq, 32], k_cache [pages, page size, Hkv, 32], v_cache [pages, page size, Hkv, 32], block_table
[B, most pages per sequence] in int32 or int64, seqlens [B] in int32; out [B, H, Sq, 32] in q's dtype,
lse [B, H, Sq] in fp32, the natural logarithm of each row's sum of exponentials. Any strides.
A sequence has seqlens[b] keys, which is Sk in the spec, and no more than its row of the table has room for. Entries of
the table past them are never followed. A tensor along the keys has one element for each place that a row has room for.
A sequence without keys gets zeros.
valid [B, Sk]: bool, tokens that count.

Run this file to test the kernel against plain torch, in fp64: on a GPU if there is one, else in Triton's interpreter.
"""

import os
import sys

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import triton
import triton.language as tl

DTYPE = torch.float16
GROUP = 4  # query heads per key/value head
# (BLOCK_M rows at most, BLOCK_N keys, warps, stages) of one program; a row is a query of one of the 4 heads
CONFIGS = {
    "sm_80": (32, 64, 4, 5),
    "sm_86": (32, 64, 4, 5),
    "sm_90": (64, 64, 4, 5),
    "sm_100": (64, 64, 4, 5),
    "gfx942": (32, 64, 4, 5),
    "interpreter": (16, 32, 1, 1),
}


@triton.jit
def _tile(
    acc, l, m, q, rows, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
    k_p, v_p, table_at, table_p,
    valid_at, valid_k,
    sq, sk,
    UPCAST: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Add the keys n .. n + BLOCK_N - 1 to the running softmax (acc, l, m) of a tile of rows.

    Some of these keys may be hidden or lie past the end. Scores are in base 2.
    """
    cols = n + tl.arange(0, BLOCK_N)
    inside = cols < sk
    page = tl.load(table_at + cols // PAGE * table_p, mask=inside, other=0).to(tl.int64)
    k_rows = page * k_p + cols % PAGE * k_n
    v_rows = page * v_p + cols % PAGE * v_n
    d = tl.arange(0, 32)
    k_tile = k_at + k_rows[:, None] + d[None, :] * k_d
    e = tl.arange(0, 32)
    v_tile = v_at + v_rows[:, None] + e[None, :] * v_d
    k = tl.load(k_tile, mask=inside[:, None], other=0.0)
    v = tl.load(v_tile, mask=inside[:, None], other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    s = tl.dot(q, tl.trans(k))
    s = s * 0.18033688011112042  # 0.125 * log2(e)
    qi = rows[:, None]
    ki = cols[None, :]
    valid_tile = valid_at + tl.cast(cols, tl.int64)[None, :] * valid_k
    valid = tl.load(valid_tile, mask=inside[None, :], other=0) != 0
    keep = (ki <= qi + (sk - sq)) & valid
    s = tl.where(keep, s, -3.4028234663852886e+38)
    s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
    return acc, l * shrink + tl.sum(p, 1), new_m


@triton.jit(do_not_specialize=["heads", "sq", "capacity", "splits"])
def padded_cache_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seqlens_ptr, valid_ptr, acc_ptr, l_ptr, m_ptr,
    q_b, q_h, q_m, q_d,
    k_p, k_n, k_h, k_d,
    v_p, v_n, v_h, v_d,
    table_b, table_p, seqlens_b,
    valid_b, valid_k,
    heads, sq, capacity, splits,
    UPCAST: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M of the rows that read a key/value head, and one share of the keys that they may see."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    blocks = tl.cdiv(4 * sq, BLOCK_M)
    pair = tl.cast(block // blocks, tl.int64)  # batch entry and key/value head
    b = pair // (heads // 4)
    kv = pair % (heads // 4)
    sk = tl.minimum(tl.load(seqlens_ptr + b * seqlens_b), capacity)
    table_at = table_ptr + b * table_b
    row = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < 4 * sq
    at = (pair * (4 * sq) + row) * splits + split
    row = tl.minimum(row, 4 * sq - 1)  # rows past the end repeat the last
    h = kv * 4 + row // sq
    rows = row % sq
    q_at = q_ptr + b * q_b + h * q_h + tl.cast(rows, tl.int64) * q_m
    k_at = k_ptr + kv * k_h
    v_at = v_ptr + kv * v_h
    valid_at = valid_ptr + b * valid_b
    d = tl.arange(0, 32)
    q_tile = q_at[:, None] + d[None, :] * q_d
    q = tl.load(q_tile)
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 32], tl.float32)
    # Some query sees the keys lo .. hi; every split takes as many of their tiles.
    lo = 0
    hi = sk
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N)
    share = tl.cdiv(tiles, splits)
    begin = tl.minimum(split * share, tiles)
    for t in range(begin, tl.minimum(begin + share, tiles)):
        n = lo + t * BLOCK_N
        acc, l, m = _tile(
            acc, l, m, q, rows, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            k_p, v_p, table_at, table_p,
            valid_at, valid_k,
            sq, sk,
            UPCAST=UPCAST, PAGE=PAGE, BLOCK_N=BLOCK_N,
        )
    tl.store(l_ptr + at, l, mask=exists)
    tl.store(m_ptr + at, m, mask=exists)
    e = tl.arange(0, 32)
    acc_tile = acc_ptr + at[:, None] * 32 + e[None, :]
    tl.store(acc_tile, acc, mask=exists[:, None])


@triton.jit(do_not_specialize=["heads", "sq", "splits"])
def padded_cache_combine(
    seqlens_ptr, acc_ptr, l_ptr, m_ptr, out_ptr, lse_ptr,
    seqlens_b, heads, sq, splits,
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
    sk = tl.load(seqlens_ptr + row // sq // heads * seqlens_b)
    total = tl.where(sk == 0, 1.0, l)  # a sequence without keys gets zeros
    lse = (m + tl.log2(l)) * 0.6931471805599453
    lse = tl.where(m < -2.3586574916681825e+38, m, lse)  # a row of scores that stood for themselves
    out = acc / total
    out_tile = out_ptr + row * 32 + e
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row, lse)


def attend(q, k_cache, v_cache, block_table, seqlens, valid, splits=None):
    """Return (out, lse) for these inputs; layouts as above.

    splits: into how many shares the keys are cut; None leaves it to the size of the GPU.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernel was emitted for.
    """
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out = torch.empty(*q.shape[:3], 32, device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    launch(q, k_cache, v_cache, block_table, seqlens, valid, out, lse, splits)
    return out.to(q.dtype), lse


def launch(q, k_cache, v_cache, block_table, seqlens, valid, out, lse, splits=None):
    """Fill out and lse, both contiguous; raises as attend does."""
    batch, heads, sq, _ = q.shape
    pages, page, kv_heads, _ = k_cache.shape
    _expect("q", q, (batch, kv_heads * GROUP, sq, 32), DTYPE)
    _expect("k_cache", k_cache, (pages, page, kv_heads, 32), DTYPE)
    _expect("v_cache", v_cache, (pages, page, kv_heads, 32), DTYPE)
    if block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block_table: expected torch.int32 or torch.int64, found {block_table.dtype}")
    _expect("block_table", block_table, (batch, block_table.shape[-1]), block_table.dtype)
    _expect("seqlens", seqlens, (batch,), torch.int32)
    sk = block_table.shape[1] * page  # the most that a sequence can hold
    if sk == 0:
        raise ValueError("block_table: expected room for at least one key, found none")
    if splits is not None and splits < 1:
        raise ValueError(f"splits: expected at least 1, found {splits}")
    if out.numel() == 0:
        return
    valid = _spread("valid", valid, (batch, sk), torch.bool).view(torch.uint8)
    most_m, block_n, warps, stages = CONFIGS[_arch(q)]
    block_m = min(most_m, max(16, triton.next_power_of_2(4 * sq)))  # 16: the least of a contraction
    programs = triton.cdiv(4 * sq, block_m) * batch * (heads // GROUP)
    splits = splits or _splits(q, programs, sk, block_n)
    # What each share computes is added up by the second kernel, also where there is only one.
    acc = torch.empty(batch * heads * sq, splits, 32, device=q.device, dtype=torch.float32)
    l, m = torch.empty(2, batch * heads * sq, splits, device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):
        padded_cache_kernel[(programs * splits,)](
            q, k_cache, v_cache, block_table, seqlens, valid, acc, l, m,
            *q.stride(), *k_cache.stride(), *v_cache.stride(),
            *block_table.stride(), *seqlens.stride(),
            valid.stride(0), valid.stride(1),
            heads, sq, sk, splits,
            UPCAST=_interpreted(q) and q.dtype == torch.bfloat16,
            PAGE=page,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        padded_cache_combine[(batch * heads * sq,)](
            seqlens, acc, l, m, out, lse,
            *seqlens.stride(), heads, sq, splits,
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


def _dense(q, k, v, valid, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    s = q.to(work) @ k.to(work).mT
    s = s * 0.125
    keep = (ki <= qi + (sk - sq)) & valid[:, None, None, :]
    s = s.masked_fill(~keep, -3.4028234663852886e+38)
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
    tensors.append(torch.rand(batch, sk, generator=g) < 0.7)
    if case == 3:  # rows or batch entries that see nothing
        tensors[3][..., :1, :] = False
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


CASES = [(1, 1, 1, 16), (2, 2, 1, 21), (3, 1, 3, 144), (2, 1, 3, 600), (2, 2, 1, 4096), (3, 2, 16, 1001)]
GUARD = 12344.0


PAGE_SIZES = (16, 7, 16, 30, 64, 7)


def _paged_sample(case, device):
    """Return inputs whose keys and values lie in shuffled pages; what no sequence uses is NaN, or no page at all."""
    q, k, v, *tensors = _sample(case, device)
    batch, hkv, sk, _ = k.shape
    size = PAGE_SIZES[case]
    g = torch.Generator().manual_seed(case)
    seqlens = torch.randint(0, sk + 1, (batch,), generator=g, dtype=torch.int32)
    seqlens[-1] = sk
    if case == 2:
        seqlens[0] = 0
    table = torch.full((batch, sk // size), 1 << 30, dtype=torch.int64 if case % 2 else torch.int32)
    free = torch.randperm(table.numel() + 1, generator=g).tolist()
    caches = [torch.full((len(free), hkv, size, x.shape[3]), float("nan"), dtype=DTYPE, device=device) for x in (k, v)]
    for b, length in enumerate(seqlens.tolist()):
        for at in range(0, length, size):
            page = free.pop()
            table[b, at // size] = page
            for cache, x in zip(caches, (k, v)):
                some = x[b, :, at : min(at + size, length)]
                cache[page, :, : some.shape[1]] = some
    caches = [x.transpose(1, 2) if case % 2 else x.transpose(1, 2).contiguous() for x in caches]
    return [q, *caches, table.to(device), seqlens.to(device), *tensors]


def reference(q, k_cache, v_cache, block_table, seqlens, valid, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work: each sequence by itself."""
    parts = []
    batch, heads, sq, _ = q.shape
    sk = block_table.shape[1] * k_cache.shape[1]
    valid = _spread("valid", valid, (batch, sk))
    for b, length in enumerate(seqlens.tolist()):
        pages = block_table[b, : triton.cdiv(length, k_cache.shape[1])].long()
        k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k_cache, v_cache))
        own = [valid[b : b + 1, ..., :length]]
        parts.append(_dense(q[b : b + 1], k, v, *own, work=work))
    return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])


def _check(case, device):
    """Run one case; return its report and whether it passed.

    The kernel may be off by twice as much as plain torch in fp32 with weights rounded to the dtype, plus two rounding
    units of the largest value in v (four of its own size for lse, which base 2 adds to). A row that fp32 cannot hold,
    such as one of fills on top of fills, is what plain torch makes of it.
    """
    inputs = _paged_sample(case, device)
    q, v = inputs[0], inputs[2].nan_to_num(0.0)
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
    print(f"{'passed' if passed else 'FAILED'}: padded_cache_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
