"""Masks as models build them: many ways to write each predicate, and look-alikes that are something else.

A construction takes ``Sizes`` and, where it reads data, tensors; it returns the pairs kept, bool or 0/1, of
a shape that broadcasts to ``[B, H, Sq, Sk]``.  ``CONSTRUCTIONS`` has the closed form that detection reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Batch entries, queries and keys: numbers, or symbols while tracing."""

    b: int
    sq: int
    sk: int


@dataclass(frozen=True)
class Construction:
    """One way to build a mask: its closed form, the data it reads, the one length (None: any) it is for."""

    build: Callable[..., Tensor]
    form: str
    data: tuple[str, ...] = ()
    length: int | None = None


CONSTRUCTIONS: dict[str, Construction] = {}


def keeps(form: str, *data: str, length: int | None = None):
    """Register a construction under its name."""

    def register(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CONSTRUCTIONS[f.__name__] = Construction(f, form, data, length)
        return f

    return register


def columns(n: Sizes) -> tuple[Tensor, Tensor]:
    return torch.arange(n.sq)[:, None], torch.arange(n.sk)[None, :]


# ---------------------------------------------------------------- causal


@keeps("causal")
def causal_by_tril(n: Sizes) -> Tensor:
    return torch.ones(n.sq, n.sk, dtype=torch.bool).tril()


@keeps("causal")
def causal_by_triu_of_ones(n: Sizes) -> Tensor:
    return torch.triu(torch.ones(n.sq, n.sk), diagonal=1) == 0


@keeps("causal")
def causal_by_outer_comparison(n: Sizes) -> Tensor:
    i, j = columns(n)
    return i >= j


@keeps("causal")
def causal_as_floats(n: Sizes) -> Tensor:
    i, j = (x.float() for x in columns(n))
    return (i - j) > -0.5


@keeps("causal")
def causal_by_sign(n: Sizes) -> Tensor:
    i, j = columns(n)
    return torch.sign(j - i) <= 0


@keeps("causal")
def causal_by_clamp(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (j - i).clamp(min=0) == 0


@keeps("causal")
def causal_by_maximum(n: Sizes) -> Tensor:
    i, j = columns(n)
    return torch.maximum(i, j) == i


@keeps("causal")
def causal_by_cumsum_of_ones(n: Sizes) -> Tensor:
    i = torch.ones(n.sq, dtype=torch.long).cumsum(0)
    j = torch.ones(n.sk, dtype=torch.long).cumsum(0)
    return j[None, :] <= i[:, None]


@keeps("causal")
def causal_by_flip(n: Sizes) -> Tensor:
    i = torch.arange(n.sq).flip(0)
    j = torch.arange(n.sk).flip(0)
    return (n.sk - 1 - j)[None, :] <= (n.sq - 1 - i)[:, None]


@keeps("causal")
def causal_by_meshgrid(n: Sizes) -> Tensor:
    i, j = torch.meshgrid(torch.arange(n.sq), torch.arange(n.sk), indexing="ij")
    return j <= i


@keeps("causal")
def causal_by_vmap(n: Sizes) -> Tensor:
    def one(i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    rows = torch.vmap(torch.vmap(one, (None, 0)), (0, None))
    return rows(torch.arange(n.sq), torch.arange(n.sk))


@keeps("causal")
def causal_by_full_and_triu(n: Sizes) -> Tensor:
    return torch.full((n.sq, n.sk), float("-inf")).triu(1) == 0


@keeps("causal")
def causal_by_addition(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i >= j).to(torch.int64) * 2 > 1


@keeps("causal")
def causal_by_gather(n: Sizes) -> Tensor:
    position = torch.arange(n.sk)
    return position[torch.arange(n.sk)][None, :] <= torch.arange(n.sq)[:, None]


@keeps("causal")
def causal_by_stack(n: Sizes) -> Tensor:
    both = torch.stack([torch.arange(n.sk), torch.arange(n.sk) + 0])
    return both[0][None, :] <= torch.arange(n.sq)[:, None]


@keeps("causal")
def causal_and_all_ones(n: Sizes) -> Tensor:
    i, j = columns(n)
    ones = torch.ones(n.b, n.sk, dtype=torch.long)
    return (j <= i) & (ones[:, None, None, :] != 0)


@keeps("causal")
def packed_sequences_of_arange(n: Sizes) -> Tensor:
    """What transformers 5 does with position ids that are one sequence."""
    position = torch.arange(n.sk)[None].expand(n.b, n.sk)
    first = position[:, :1] - 1
    steps = torch.diff(position, prepend=first, dim=-1)
    sequence = (steps != 1).cumsum(-1)
    i, j = columns(n)
    own = sequence[:, :1].expand(n.b, n.sq) * 0 + sequence[:, 0:1]
    same = own[:, :, None] == sequence[:, None, :]
    return ((j <= i) & same)[:, None]


@keeps("none")
def nothing_hidden(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i >= 0) & (j >= 0)


@keeps("window(right=-1)")
def strictly_causal(n: Sizes) -> Tensor:
    i, j = columns(n)
    return j < i


@keeps("window(right=1)")
def causal_by_one_too_many(n: Sizes) -> Tensor:
    return torch.ones(n.sq, n.sk).tril(1) != 0


@keeps("causal(end)")
def causal_from_the_end(n: Sizes) -> Tensor:
    i, j = columns(n)
    return j <= i + (n.sk - n.sq)


@keeps("causal(end)")
def causal_by_tril_with_offset(n: Sizes) -> Tensor:
    return torch.ones(n.sq, n.sk, dtype=torch.bool).tril(n.sk - n.sq)


# ---------------------------------------------------------------- windows


@keeps("window(left=3,right=0)")
def window_of_four_keys(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (j > i - 4) & (j <= i)


@keeps("window(left=4,right=0)")
def window_four_back(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i - j <= 4) & (j <= i)


@keeps("window(left=3,right=0)")
def window_by_two_triangles(n: Sizes) -> Tensor:
    ones = torch.ones(n.sq, n.sk)
    return (torch.tril(ones) - torch.tril(ones, -4)) > 0


@keeps("window(left=3,right=0)")
def window_by_triu_of_tril(n: Sizes) -> Tensor:
    return torch.ones(n.sq, n.sk).tril().triu(-3).bool()


@keeps("window(left=2,right=2)")
def symmetric_window(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i - j).abs() <= 2


@keeps("window(left=2,right=2)")
def symmetric_window_by_minimum(n: Sizes) -> Tensor:
    i, j = columns(n)
    return torch.minimum(i - j, j - i) >= -2


@keeps("window(left=2,right=2)")
def symmetric_window_by_clamp(n: Sizes) -> Tensor:
    i, j = columns(n)
    d = i - j
    return d.clamp(-2, 2) == d


@keeps("causal & (window(left=5) | range(k,0,2))")
def window_with_sinks(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (j <= i) & ((i - j < 6) | (j < 2))


# ---------------------------------------------------------------- chunks, prefixes, strides


@keeps("causal & chunk(4)")
def chunked(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i // 4 == j // 4) & (j <= i)


@keeps("chunk(4)")
def chunks_by_division(n: Sizes) -> Tensor:
    i, j = columns(n)
    return torch.div(i, 4, rounding_mode="floor") == torch.div(j, 4, rounding_mode="trunc")


@keeps("chunk(4)")
def chunks_by_repeat_interleave(n: Sizes) -> Tensor:
    ids = torch.arange(16).repeat_interleave(4)
    return ids[: n.sq, None] == ids[None, : n.sk]


@keeps("chunk(4)")
def chunks_by_rounding_down(n: Sizes) -> Tensor:
    i, j = columns(n)
    return i - i % 4 == j - j % 4


@keeps("blocks(4)")
def block_causal(n: Sizes) -> Tensor:
    i, j = columns(n)
    return j // 4 <= i // 4


@keeps("blocks(4)")
def block_causal_by_ends(n: Sizes) -> Tensor:
    i, j = columns(n)
    return j < (i // 4 + 1) * 4


@keeps("causal | range(k,0,3)")
def prefix_language_model(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (j < 3) | (j <= i)


@keeps("causal | range(k,0,3)")
def prefix_by_overwriting(n: Sizes) -> Tensor:
    mask = torch.ones(n.sq, n.sk, dtype=torch.bool).tril()
    mask[:, :3] = True
    return mask


@keeps("causal | prefix", "lengths")
def prefix_per_entry(n: Sizes, lengths: Tensor) -> Tensor:
    i, j = columns(n)
    return (j < lengths[:, None, None, None]) | (j <= i)


@keeps("stride(3)")
def dilated(n: Sizes) -> Tensor:
    i, j = columns(n)
    return (i - j) % 3 == 0


@keeps("stride(3)")
def dilated_by_remainders(n: Sizes) -> Tensor:
    i, j = columns(n)
    return torch.remainder(j - i, 3) == 0


@keeps("causal & (window(left=3) | stride(4))")
def strided_and_local(n: Sizes) -> Tensor:
    i, j = columns(n)
    d = i - j
    return (d >= 0) & ((d < 4) | (d % 4 == 0))


@keeps("window(left=3,right=3) | range(k,0,2) | range(q,0,2)")
def global_and_local(n: Sizes) -> Tensor:
    i, j = columns(n)
    return ((i - j).abs() <= 3) | (i < 2) | (j < 2)


# ---------------------------------------------------------------- neighborhoods and regions


@keeps("(window(left=2) | ~(range(k,0,11))) & (window(right=2) | range(k,0,5))", length=16)
def neighborhood(n: Sizes) -> Tensor:
    """Five nearest keys: the window moves inward at the borders, as NATTEN's does."""
    i, j = columns(n)
    start = (i - 2).clamp(0, n.sk - 5)
    return (j >= start) & (j < start + 5)


@keeps(
    "({1<=k%4} | {q%4<=k%4+1}) & ({1<=k//4} | {q//4<=k//4+1})"
    " & ({k%4<=2} | {k%4<=q%4+1}) & ({k//4<=2} | {k//4<=q//4+1})",
    length=16,
)
def neighborhood_of_a_grid(n: Sizes) -> Tensor:
    """Three by three neighbors in a grid of four by four tokens."""
    i, j = columns(n)
    keep = torch.ones(n.sq, n.sk, dtype=torch.bool)
    for a, b in ((i // 4, j // 4), (i % 4, j % 4)):
        start = (a - 1).clamp(0, 1)
        keep = keep & (b >= start) & (b < start + 3)
    return keep


@keeps(
    "{where(12<=q,2,where((q<=11)&(8<=q),1,0))==where(12<=k,2,where((8<=k)&(k<=11),1,0))}",
    length=16,
)
def regions_by_labels(n: Sizes) -> Tensor:
    """What Swin does along one axis."""
    label = torch.zeros(n.sk)
    for at, part in enumerate((slice(0, 8), slice(8, 12), slice(12, None))):
        label[part] = at
    return (label[:, None] - label[None]) == 0


@keeps("window(left=0,right=0)", length=16)
def own_key_by_computing(n: Sizes) -> Tensor:
    """No rule follows the difference of bools; it reads no input, so its values are known."""
    i, j = torch.arange(n.sq)[:, None], torch.arange(n.sk + 1)[None, :]
    return torch.diff(j <= i, dim=-1)


# ---------------------------------------------------------------- data


@keeps("document", "ids")
def documents(n: Sizes, ids: Tensor) -> Tensor:
    return (ids[:, : n.sq, None] == ids[:, None, :])[:, None]


@keeps("causal & document", "ids")
def documents_and_causal(n: Sizes, ids: Tensor) -> Tensor:
    i, j = columns(n)
    return (ids[:, None, : n.sq, None] == ids[:, None, None, :]) & (i >= j)


@keeps("document & padding(key)", "ids")
def documents_without_padding(n: Sizes, ids: Tensor) -> Tensor:
    return ((ids[:, : n.sq, None] == ids[:, None, :]) & (ids != 0)[:, None, :])[:, None]


@keeps("padding(key)", "ids")
def padded_keys(n: Sizes, ids: Tensor) -> Tensor:
    return (ids != 0)[:, None, None, :]


@keeps("causal & padding(key)", "ids")
def causal_and_padded(n: Sizes, ids: Tensor) -> Tensor:
    i, j = columns(n)
    return (j <= i) & (ids > 0)[:, None, None, :]


@keeps("chunk(4) & padding(key)", "ids")
def chunks_and_padded(n: Sizes, ids: Tensor) -> Tensor:
    i, j = columns(n)
    return (j // 4 == i // 4) & (ids > 0)[:, None, None, :]


@keeps("padding(key) & padding(query)", "ids")
def segments(n: Sizes, ids: Tensor) -> Tensor:
    on = (ids > 0).float()
    return (on[:, None, : n.sq, None] * on[:, None, None, :]) > 0


@keeps("padding(key)", "lengths")
def keys_up_to_a_length(n: Sizes, lengths: Tensor) -> Tensor:
    return (torch.arange(n.sk)[None] < lengths[:, None])[:, None, None]


@keeps("dense", "pairs")
def whatever_the_user_says(n: Sizes, pairs: Tensor) -> Tensor:
    return pairs
