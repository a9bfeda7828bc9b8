"""Attention over lists of blocks, as one Triton kernel; emitted by attnc for one site of a model, complete on its own.

spec    attn q=bhqd[b,h,sq,32]:float32 k=bhkd[b,hkv,sk,32]:float32 v=bhke[b,hkv,sk,32]:float32 group=2 scale(0.125) mask=causal fill(replace,-inf) softmax
kind    blocks
formula out = softmax(steps(q @ k^T)) @ v in one pass over the keys, with a running maximum and sum per query
source  FlashAttention-2 (arXiv:2307.08691), algorithm 1; online softmax (arXiv:1805.02867)
key     <key>

Layouts: q [B, H, Sq, 32], k [B, Hkv, Sk, 32], v [B, Hkv, Sk, 32]; out [B, H, Sq, 32] in q's dtype,
lse [B, H, Sq] in fp32, the natural logarithm of each row's sum of exponentials. Any strides.

Lists: a block is block[0] queries by block[1] keys, multiples of 16; there are Mq by Nk of them. ranges, int32
[B or 1, H or 1, Mq, 3], says for each row of blocks where it begins in columns, int32 [L], where its partial blocks
begin, and where it ends. columns holds numbers of key blocks, each once in a row: the full ones ascending, then the
partial ones. What is not listed adds nothing. The mask holds within partial blocks; a full block claims that it hides
nothing there. order, None or int32 [B * H * Mq], is the order in which rows are started: longest first is best.

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
    "sm_80": (64, 32, 8, 2),
    "sm_86": (64, 32, 8, 2),
    "sm_90": (64, 32, 8, 2),
    "sm_100": (64, 32, 8, 2),
    "gfx942": (64, 32, 4, 2),
    "interpreter": (32, 32, 1, 1),
}
POINTERS = {  # where tensor descriptors cannot read k or v
    "sm_90": (64, 32, 8, 2),
    "sm_100": (64, 32, 8, 2),
}
DESCRIPTORS = ("sm_90", "sm_100", "interpreter")  # where TMA copies tiles of k and v, if they are aligned


@triton.jit
def _tile(
    acc, l, m, q, first, n,
    k_at, k_n, k_d, v_at, v_n, v_d,
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
    s = s * 0.18033688011112042  # 0.125 * log2(e)
    if MASKED:
        qi = rows[:, None]
        ki = cols[None, :]
        keep = ki <= qi
        s = tl.where(keep, s, float("-inf"))
        s = tl.where(inside[None, :], s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, l * shrink + tl.sum(p, 1), new_m


@triton.jit(do_not_specialize=["heads", "sq", "sk"])
def causal_blocks_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    ranges_ptr, columns_ptr, order_ptr,
    q_b, q_h, q_m, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    ranges_b, ranges_h,
    heads, sq, sk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, and the key blocks that its row lists."""
    height = tl.cdiv(sq, ROWS)  # rows of blocks in each head
    row = tl.program_id(0) // (ROWS // BLOCK_M)
    if order_ptr is not None:
        row = tl.load(order_ptr + row)
    block = row % height
    tile = block * (ROWS // BLOCK_M) + tl.program_id(0) % (ROWS // BLOCK_M)
    bh = tl.cast(row // height, tl.int64)
    b = bh // heads
    h = bh % heads
    first = tile * BLOCK_M
    if first >= sq:
        return
    i = tl.arange(0, BLOCK_M)
    rows = first + i
    q_at = q_ptr + b * q_b + h * q_h + tl.cast(first, tl.int64) * q_m
    k_at = k_ptr + b * k_b + h // 2 * k_h
    v_at = v_ptr + b * v_b + h // 2 * v_h
    if DESCRIPTORS:
        k_at = tl.make_tensor_descriptor(k_at, [sk, 32], [k_n, 1], [BLOCK_N, 32])
        v_at = tl.make_tensor_descriptor(v_at, [sk, 32], [v_n, 1], [BLOCK_N, 32])
    d = tl.arange(0, 32)
    q_tile = q_at + i[:, None] * q_m + d[None, :] * q_d
    q = tl.load(q_tile, mask=(rows < sq)[:, None], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, 32], tl.float32)
    range_at = ranges_ptr + b * ranges_b + h * ranges_h + block * 3
    begin = tl.load(range_at)
    partial = tl.load(range_at + 1)
    end = tl.load(range_at + 2)
    # A full block that the end of the keys cuts short needs their bound; only the last of them can be one.
    final = tl.load(columns_ptr + partial - 1, mask=partial > begin, other=0)
    partial -= ((partial > begin) & (final >= sk // COLUMNS)).to(tl.int32)
    # Both loops look up the next block before they compute, so that its keys can be loaded meanwhile.
    TILES: tl.constexpr = COLUMNS // BLOCK_N
    tiles = (partial - begin) * TILES
    n = tl.load(columns_ptr + begin, mask=tiles > 0, other=0) * COLUMNS
    for t in range(1, tiles + 1):
        following = tl.load(columns_ptr + begin + t // TILES, mask=t < tiles, other=0)
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            sq, sk,
            MASKED=False, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
        n = following * COLUMNS + t % TILES * BLOCK_N
    tiles = (end - partial) * TILES
    n = tl.load(columns_ptr + partial, mask=tiles > 0, other=0) * COLUMNS
    for t in range(1, tiles + 1):
        following = tl.load(columns_ptr + partial + t // TILES, mask=t < tiles, other=0)
        acc, l, m = _tile(
            acc, l, m, q, first, n,
            k_at, k_n, k_d, v_at, v_n, v_d,
            sq, sk,
            MASKED=True, DESCRIPTORS=DESCRIPTORS, UPCAST=UPCAST, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        )
        n = following * COLUMNS + t % TILES * BLOCK_N
    total = l[:, None]
    lse = (m + tl.log2(l)) * 0.6931471805599453
    at = bh * sq + first
    out_at = out_ptr + at * 32 + i[:, None] * 32
    e = tl.arange(0, 32)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_at + e[None, :], out, mask=(rows < sq)[:, None])
    tl.store(lse_ptr + at + i, lse, mask=rows < sq)


def attend(q, k, v, ranges, columns, block, order=None):
    """Return (out, lse) for these inputs; layouts as above.

    Raises:
        ValueError: a shape, a dtype or a device is not what the kernel was emitted for.
    """
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=torch.float32 if upcast else q.dtype)
    lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    launch(q, k, v, ranges, columns, block, order, out, lse)
    return out.to(q.dtype), lse


def launch(q, k, v, ranges, columns, block, order, out, lse):
    """Fill out and lse, both contiguous; raises as attend does."""
    batch, heads, sq, _ = q.shape
    sk = k.shape[2]
    _expect("q", q, (batch, k.shape[1] * GROUP, sq, 32), DTYPE)
    _expect("k", k, (batch, k.shape[1], sk, 32), DTYPE)
    _expect("v", v, (batch, k.shape[1], sk, 32), DTYPE)
    if sk == 0:
        raise ValueError("expected at least one key, found none")
    if len(block) != 2 or any(n < 16 or n % 16 for n in block):
        raise ValueError(f"block: expected multiples of 16, found {block}")
    height = triton.cdiv(sq, block[0])
    _expect("ranges", ranges, (*ranges.shape[:2], height, 3), torch.int32)
    _expect("columns", columns, (columns.numel(),), torch.int32)
    if order is not None:
        _expect("order", order, (batch * heads * height,), torch.int32)
    ranges = _spread("ranges", ranges.contiguous(), (batch, heads, height, 3))
    columns, order = columns.contiguous(), None if order is None else order.contiguous()
    if out.numel() == 0:
        return
    arch = _arch(q)
    descriptors = arch in DESCRIPTORS and _aligned(k) and _aligned(v)
    if descriptors:
        triton.set_allocator(_scratch)
    configs = CONFIGS if descriptors or arch not in POINTERS else POINTERS
    block_m, block_n, warps, stages = configs[arch]
    block_m, block_n, warps = _divide(block, block_m, block_n, warps)
    turns = batch * heads * height * (block[0] // block_m)
    with torch.cuda.device_of(q):
        causal_blocks_kernel[(turns,)](
            q, k, v, out, lse,
            ranges, columns, order,
            *q.stride(), *k.stride(), *v.stride(),
            ranges.stride(0), ranges.stride(1),
            heads, sq, sk,
            ROWS=block[0],
            COLUMNS=block[1],
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


def _divide(block, block_m, block_n, warps):
    """Halve tiles until they divide a block; half the queries get half the warps, but for the last four."""
    while block[0] % block_m:
        block_m //= 2
        if warps > 4:  # and half the keys, or their threads would need more registers than there are
            block_n, warps = max(block_n // 2, min(block_n, 32)), warps // 2
    while block[1] % block_n:
        block_n //= 2
    return block_m, block_n, warps


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


def reference(q, k, v, listed, work=torch.float64):
    """Return the same (out, lse) in plain torch, computed in the dtype work; listed is bool [B, H, Sq, Sk]."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    s = q.to(work) @ k.to(work).mT
    s = s * 0.125
    keep = ki <= qi
    s = s.masked_fill(~keep, float("-inf"))
    s = s.masked_fill(~listed, float("-inf"))
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


def _lists(case, inputs):
    """Return a random list as attend takes it (ranges, columns, block, order) and its blocks, bool [B, H, Mq, Nk]."""
    q, k = inputs[:2]
    batch, heads, sq, sk = *q.shape[:3], k.shape[2]
    rows, cols = BLOCKS[case]
    g = torch.Generator().manual_seed(case)
    shape = (batch, heads, triton.cdiv(sq, rows), triton.cdiv(sk, cols))
    listed = torch.rand(shape, generator=g) < 0.6
    listed[..., -1] |= case != 3
    listed[:, :, 0] &= case != 3  # a row without blocks
    full = torch.rand(shape, generator=g) < 0.7
    seen = torch.ones(batch, heads, shape[2] * rows, shape[3] * cols, dtype=torch.bool)
    seen[:, :, :sq, :sk] = _seen(*inputs)
    full &= seen.view(*shape[:3], rows, shape[3], cols).all(5).all(3)
    ranges, columns = [], []
    for x, f in zip(listed.flatten(0, 2), full.flatten(0, 2)):
        begin, first, then = len(columns), (x & f).nonzero().flatten(), (x & ~f).nonzero().flatten()
        columns += [*first.tolist(), *then.tolist()]
        ranges.append([begin, begin + len(first), len(columns)])
    ranges = torch.tensor(ranges, dtype=torch.int32).view(*shape[:3], 3)
    order = torch.randperm(shape[0] * shape[1] * shape[2], generator=g).to(torch.int32) if case % 2 else None
    lists = (ranges, torch.tensor(columns, dtype=torch.int32), order)
    ranges, columns, order = (x if x is None else x.to(q.device) for x in lists)
    return (ranges, columns, BLOCKS[case], order), listed.to(q.device)


def _seen(q, k, v):
    """Return which keys the mask shows, bool, of a shape that broadcasts to [B, H, Sq, Sk]."""
    sq, sk = q.shape[2], k.shape[2]
    qi = torch.arange(sq, device=q.device)[:, None]
    ki = torch.arange(sk, device=q.device)[None, :]
    return ki <= qi


BLOCKS = ((128, 128), (16, 32), (32, 16), (32, 64), (64, 64), (128, 32))


def _check(case, device):
    """Run one case; return its report and whether it passed.

    The kernel may be off by twice as much as plain torch in fp32 with weights rounded to the dtype, plus two rounding
    units of the largest value in v (four of its own size for lse, which base 2 adds to). A row that fp32 cannot hold,
    such as one of fills on top of fills, is what plain torch makes of it.
    """
    inputs = _sample(case, device)
    q, v = inputs[0], inputs[2]
    lists, blocks = _lists(case, inputs)
    listed = blocks.repeat_interleave(BLOCKS[case][0], 2)[:, :, : q.shape[2]]
    listed = listed.repeat_interleave(BLOCKS[case][1], 3)[..., : v.shape[2]]
    unread = ~listed.any(2).view(*v.shape[:2], GROUP, -1).any(2)[..., None]  # keys in no block of any query
    poisoned = [x.masked_fill(unread, float("nan")) for x in inputs[1:3]]
    poisoned = [(_surround(x) if case % 2 else x).to(device) for x in poisoned]
    upcast = _interpreted(q) and q.dtype == torch.bfloat16
    out, out_room = _guarded((*q.shape[:3], v.shape[3]), torch.float32 if upcast else q.dtype, device)
    lse, lse_room = _guarded(q.shape[:3], torch.float32, device)
    launch(q, *poisoned, *inputs[3:], *lists, out, lse)
    want, want_lse = reference(*inputs, listed)
    plain, plain_lse = reference(*inputs, listed, work=torch.float32)
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
    print(f"{'passed' if passed else 'FAILED'}: causal_blocks_kernel, {DTYPE}, on {device.type}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
