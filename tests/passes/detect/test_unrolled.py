"""A loop over heads, batch entries or query chunks is one site where its turns are alike and in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.rewriting import exported, rounding, traced

B, H, SQ, SK, D, DV = 2, 3, 8, 5, 4, 6


def draw(*sizes: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=g, dtype=torch.float64)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


def four_axes(heads: int = H) -> tuple[Tensor, ...]:
    return draw(B, heads, SQ, D), draw(B, heads, SK, D), draw(B, heads, SK, DV)


def rewritten(f: Callable[..., Tensor], args: tuple[Tensor, ...], sites: int) -> list[str]:
    """Check the number of sites and the rewritten values; return the specs."""
    expected, t = f(*args), traced(f, args)
    found, missed = t.detect()
    assert (len(found), missed) == (sites, [])
    t.rewrite(found)
    assert not any("softmax" in n.name for n in t.graph.nodes)
    torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, D + SQ))
    return [str(x.match.spec) for x in found]


def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in range(q.shape[1])], 1)


def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = range(q.shape[1])
    return torch.cat([attend(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in parts], 1)


def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(
        [attend(*p) for p in zip(q.split(1, 1), k.chunk(k.shape[1], 1), v.split(1, 1), strict=True)], 1
    )


def unbound(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(*p) for p in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], 1)


def narrowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [
        attend(*(x.narrow(1, i, 1).squeeze(1) for x in (q, k, v))).unsqueeze(1) for i in range(q.shape[1])
    ]
    return torch.cat(parts, 1)


def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The layout of a loop that ends in one projection: [B, Sq, H * Dv]."""
    heads = [attend(*p) for p in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)]
    return torch.cat(heads, -1).reshape(B, SQ, -1, DV).transpose(1, 2)


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("f", [selected, sliced, split, unbound, narrowed, side_by_side])
def test_heads_one_by_one_are_the_site_of_all_heads(f, heads):
    (spec,) = rewritten(f, four_axes(heads), 1)
    sizes = f"q=bhqd[{B},{heads},{SQ},{D}]:float64 k=bhkd[{B},{heads},{SK},{D}]:float64"
    assert sizes in spec


def test_parts_of_a_packed_projection_are_heads():
    def f(x: Tensor) -> Tensor:
        q, k, v = x.split(H * D, -1)
        cut = [slice(i * D, (i + 1) * D) for i in range(H)]
        return torch.cat([attend(q[..., c], k[..., c], v[..., c]) for c in cut], -1)

    (spec,) = rewritten(f, (draw(B, SQ, 3 * H * D),), 1)
    assert f"q=bhqd[{B},{H},{SQ},{D}]" in spec


class Rows(torch.nn.Module):
    """Heads in turn, each with its own view of the mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(2 * SQ, 2 * SQ).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hide = [self.keep[:SQ, :SQ] == 0 for _ in range(H)]
        scores = [(q[:, i] @ k[:, i].mT).masked_fill(hide[i], -torch.inf) for i in range(H)]
        return torch.stack([scores[i].softmax(-1) @ v[:, i] for i in range(H)], 1)


def test_every_turn_may_read_the_mask_anew():
    args = tuple(draw(B, H, SQ, D) for _ in range(3))
    t = exported(model := Rows(), args)
    t.tensors = {**t.tensors, "b_keep": model.keep}
    found, _ = t.detect()
    assert [str(x.match.spec.mask) for x in found] == ["causal"]
    assert len(found[0].match.conditions) == 1
    t.rewrite(found)
    torch.testing.assert_close(t.run(*args), model(*args), rtol=0, atol=rounding(args, D + SQ))


def test_loops_in_loops_are_one_site():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [[attend(q[b, h], k[b, h], v[b, h]) for h in range(H)] for b in range(B)]
        return torch.stack([torch.cat(row, -1) for row in rows])

    (spec,) = rewritten(f, four_axes(), 1)
    assert f"q=bhqd[{B},{H},{SQ},{D}]" in spec


def test_grouped_heads_keep_their_groups():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([attend(q[:, i], k[:, i // 2], v[:, i // 2]) for i in range(4)], 1)

    (spec,) = rewritten(f, (draw(B, 4, SQ, D), draw(B, 2, SK, D), draw(B, 2, SK, DV)), 1)
    assert "group=2" in spec


def test_one_loop_over_batch_and_heads_is_one_site():
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        pairs = [(b, h) for b in range(B) for h in range(4)]
        out = [(q[b, h] @ k[b, h // 2].mT + bias[0, h]).softmax(-1) @ v[b, h // 2] for b, h in pairs]
        return torch.stack(out).view(B, 4, SQ, DV)

    args = (draw(B, 4, SQ, D), draw(B, 2, SK, D), draw(B, 2, SK, DV), draw(1, 4, SQ, SK))
    (spec,) = rewritten(f, args, 1)
    assert f"q=bhqd[{B},4,{SQ},{D}]" in spec
    assert "group=2" in spec
    assert f"c0=bhqk[1,4,{SQ},{SK}]" in spec


def test_calls_of_a_fused_kernel_are_one_call():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = torch.nn.functional.scaled_dot_product_attention
        return torch.stack([call(q[:, i], k[:, i], v[:, i]) for i in range(H)], 1)

    args = four_axes()
    rewritten(f, args, 1)
    assert traced(f, args).detect()[0][0].improves


def test_a_bias_of_every_head_is_the_bias_of_all_heads():
    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        heads = [(q[:, i] @ k[:, i].mT * 0.5 + bias[:, i]).softmax(-1) @ v[:, i] for i in range(H)]
        return torch.stack(heads, 1)

    (spec,) = rewritten(f, (*four_axes(), draw(1, H, SQ, SK)), 1)
    assert f"c0=bhqk[1,{H},{SQ},{SK}]" in spec


def test_chunks_of_queries_are_the_whole_query():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(x, k, v) for x in q.split(SQ // 2, 2)], 2)

    (spec,) = rewritten(f, four_axes(), 1)
    assert f"q=bhqd[{B},{H},{SQ},{D}]" in spec
    assert "group=1" in spec


def causal_chunks(q: Tensor, k: Tensor, v: Tensor, shift: int) -> Tensor:
    """Chunks under rows of one causal mask; with ``shift`` the second chunk's rows are off by that many."""
    keep, c = torch.ones(2 * SQ, SK, dtype=torch.bool).tril(), SQ // 2
    chunks = [
        (q[:, :, i * c : (i + 1) * c] @ k.mT).masked_fill(
            ~keep[i * (c + shift) : i * (c + shift) + c], -torch.inf
        )
        for i in range(2)
    ]
    return torch.cat([s.softmax(-1) @ v for s in chunks], 2)


def test_a_mask_that_goes_on_from_chunk_to_chunk_is_the_mask_of_all():
    (spec,) = rewritten(lambda q, k, v: causal_chunks(q, k, v, 0), four_axes(), 1)
    assert "mask=causal " in spec


def test_a_mask_that_starts_elsewhere_in_a_chunk_is_never_the_causal_one():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_chunks(q, k, v, 1)

    args = four_axes()
    expected, t = f(*args), traced(f, args)
    found, _ = t.detect()
    assert not any(x.match.spec.q.shape[2] == SQ and "mask=causal " in str(x.match.spec) for x in found)
    t.rewrite(found)
    torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, D + SQ))


def in_another_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in (1, 0, 2)], 1)


def backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in (2, 1, 0)], 1)


def keys_of_another_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, j], v[:, i]) for i, j in enumerate((0, 2, 1))], 1)


def another_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(q[:, i], k[:, i], v[:, i], 0.25 * (1 + i // 2)) for i in range(H)], 1)


def another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = []
    for i in range(H):
        keep = torch.ones(SQ, SK, dtype=torch.bool).tril(i % 2)
        out.append((q[:, i] @ k[:, i].mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v[:, i])
    return torch.stack(out, 1)


def a_head_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [attend(q[:, i], k[:, i], v[:, i]) for i in range(H)]
    return torch.stack([*heads[:2], heads[2] * heads[2]], 1)


def a_head_read_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [attend(q[:, i], k[:, i], v[:, i]) for i in range(H)]
    return torch.stack(heads, 1) + heads[1].unsqueeze(1)


def something_else_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [attend(q[:, i], k[:, i], v[:, i]) for i in range(H)]
    return torch.stack([*heads, q.new_zeros(B, SQ, DV)], 1)


def another_layout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [attend(q[:, i], k[:, i], v[:, i]) for i in range(H)]
    turned = heads[1].mT.reshape(B, SQ, DV)
    return torch.stack([heads[0], turned, heads[2]], 1)


NEAR = [
    in_another_order,
    backwards,
    keys_of_another_head,
    another_scale,
    another_mask,
    a_head_twice,
    a_head_read_elsewhere,
    something_else_between,
    another_layout,
]


@pytest.mark.parametrize("f", NEAR)
def test_turns_that_differ_stay_sites_of_their_own(f):
    rewritten(f, four_axes(), H)


def test_scores_of_one_turn_that_are_read_keep_back_that_turn_only():
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = [q[:, i] @ k[:, i].mT for i in range(H)]
        return torch.stack([scores[i].softmax(-1) @ v[:, i] for i in range(H)], 1), scores[1]

    found, _ = traced(f, four_axes()).detect()
    assert [bool(x.match.escapes) for x in found] == [False, True, False]


def test_a_gap_between_heads_keeps_them_apart():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in (0, 2)], 1)

    rewritten(f, four_axes(), 2)


def test_sizes_may_be_symbolic():
    args = four_axes()
    t = traced(selected, args, symbolic=True)
    found, _ = t.detect()
    assert len(found) == 1
    t.rewrite(found)
    more = draw(B + 1, H, SQ + 3, D), draw(B + 1, H, SK + 2, D), draw(B + 1, H, SK + 2, DV)
    torch.testing.assert_close(t.run(*more), selected(*more), rtol=0, atol=rounding(more, D + SQ))
