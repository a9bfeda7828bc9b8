from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.codegen.caches import execute_paged, merge
from attnc.codegen.ops import execute
from attnc.codegen.triton import attend_paged
from attnc.printer import parse

TEXT = (
    "attn q=bhqd[b,h,s,8]:float32 k=bhkd[b,hkv,t,8]:float32 v=bhke[b,hkv,t,4]:float32 group=2 scale(0.3)"
    " {scores}mask={mask} fill(replace,{fill}) softmax{norm}"
)
PLAIN = parse(
    TEXT.format(scores="", mask="padding(key,pad)", fill="-inf", norm="") + " with pad=bk[b,t]:bool"
)
CAUSAL = parse(TEXT.format(scores="", mask="causal(end)", fill="-inf", norm=""))
BIASED = parse(
    TEXT.format(
        scores="bias(rel) ", mask="(causal(end) & padding(key,pad))", fill="-10000.0", norm="(sink=sk1)"
    )
    + " with rel=bhqk[1,h,s,t]:float32 with pad=bk[b,t]:bool with sk1=h[h]:float32"
)


def draw(b: int, hkv: int, sq: int, sk: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(sk)
    shapes = ((b, 2 * hkv, sq, 8), (b, hkv, sk, 8), (b, hkv, sk, 4))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3))
def test_parts_over_disjoint_keys_merge_to_attention_over_all_of_them(sizes, seed) -> None:
    q, k, v = draw(2, 2, 3, sum(sizes))
    pad = torch.rand(2, sum(sizes), generator=torch.Generator().manual_seed(seed)) < 0.5
    pad[:, -1] = True  # some parts hide all from a row, never all parts
    pieces = zip(*(x.split(sizes, 2) for x in (k, v)), pad.split(sizes, 1), strict=True)
    out, lse = merge([execute(PLAIN, q, k1, v1, [pad1]) for k1, v1, pad1 in pieces])
    want, want_lse = execute(PLAIN, q, k, v, [pad])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_a_row_that_saw_nothing_in_any_part_gets_zeros() -> None:
    q, k, v = draw(1, 1, 2, 3)
    nothing = execute(PLAIN, q, k, v, [torch.zeros(1, 3, dtype=torch.bool)])
    assert nothing[0].isnan().all()
    out, lse = merge([nothing, nothing])
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_row_of_fills_gets_the_mean_of_its_parts_and_not_their_sum() -> None:
    low, parts = torch.full((1, 1, 1), -3e38), [torch.full((1, 1, 1, 2), x) for x in (1.0, 3.0)]
    out, _ = merge([(x, low) for x in parts])
    assert out.tolist() == [[[[2.0, 2.0]]]]


def test_one_part_is_itself_in_its_dtype() -> None:
    out, lse = torch.randn(1, 2, 3, 4).half(), torch.randn(1, 2, 3)
    got, got_lse = merge([(out, lse)])
    assert torch.equal(got, out)
    assert torch.equal(got_lse, lse)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2))],
        [(torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n)) for n in (1, 2)],
    ],
    ids=["none", "lse-shape", "two-shapes"],
)
def test_parts_that_do_not_fit_are_refused(parts) -> None:
    with pytest.raises(ValueError, match=r"merge: expected parts .* of one shape, found"):
        merge(parts)


def paged(k: torch.Tensor, v: torch.Tensor, lengths: list[int], size: int, room: int):
    """Return caches, table and lengths: pages in a shuffled order, NaN where no key lies, -1 for no page."""
    b, hkv, _, _ = k.shape
    table = torch.full((b, room // size), -1)
    free = torch.randperm(b * room // size + 1, generator=torch.Generator().manual_seed(0)).tolist()
    caches = [torch.full((len(free), size, hkv, x.shape[3]), torch.nan, dtype=x.dtype) for x in (k, v)]
    for entry, n in enumerate(lengths):
        for at in range(n):
            if at % size == 0:
                table[entry, at // size] = free.pop()
            for cache, x in zip(caches, (k, v), strict=True):
                cache[table[entry, at // size], at % size] = x[entry, :, at]
    return (*caches, table, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("size", [1, 3, 4, 12])
@pytest.mark.parametrize("run", [execute_paged, attend_paged])
def test_each_sequence_attends_to_its_own_keys_wherever_they_lie(run, size: int) -> None:
    q, k, v = draw(3, 2, 2, 12, torch.float32)
    lengths = [12, 0, 5]
    rel, pad, sink = torch.randn(1, 4, 2, 12), torch.rand(3, 12) < 0.7, torch.randn(4)
    out, lse = run(BIASED, q, *paged(k, v, lengths, size, 12), [rel, pad, sink])
    for b, n in enumerate(lengths):
        own = (rel[..., :n], pad[b : b + 1, :n], sink)
        want, want_lse = BIASED(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], own)
        torch.testing.assert_close(out[b : b + 1], want)
        torch.testing.assert_close(lse[b : b + 1], want_lse)
    assert (out[1] == 0).all()


def test_a_sequence_that_computes_with_its_number_keeps_it() -> None:
    spec = parse(str(CAUSAL).replace("scale(0.3)", "scale(0.3) pointwise((s*(b+1.0)))"))
    q, k, v = draw(3, 2, 2, 12, torch.float32)
    out, lse = attend_paged(spec, q, *paged(k, v, [12, 12, 12], 4, 12))
    want, want_lse = spec(q, k, v)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_no_sequences_at_all() -> None:
    q, k, v = draw(1, 2, 2, 12, torch.float32)
    caches = paged(k, v, [12], 4, 12)
    out, lse = execute_paged(CAUSAL, q[:0], *caches[:2], caches[2][:0], caches[3][:0])
    assert (out.shape, lse.shape) == ((0, 4, 2, 4), (0, 4, 2))


@pytest.mark.parametrize(
    ("at", "change", "why"),
    [
        (1, lambda x: x.half(), r"k_cache: expected torch\.float32 \[4, 4, 2, 8\], found torch\.float16"),
        (2, lambda x: x[:2], r"v_cache: expected torch\.float32 \[4, 4, 2, 4\], found .* \[2, 4, 2, 4\]"),
        (
            3,
            lambda x: x.float(),
            r"block_table: expected torch\.int32 or torch\.int64 \[1, 3\], found torch\.float32",
        ),
        (4, lambda x: x.long(), r"seqlens: expected torch\.int32 \[1\], found torch\.int64"),
        (4, lambda x: x + 1, r"seqlens: expected lengths of 0 to 12, found \[13\]"),
    ],
)
def test_pages_that_do_not_fit_are_named(at: int, change, why: str) -> None:
    q, k, v = draw(1, 2, 2, 12, torch.float32)
    inputs = [q, *paged(k, v, [12], 4, 12)]
    inputs[at] = change(inputs[at])
    with pytest.raises(ValueError, match=why):
        execute_paged(CAUSAL, *inputs)
