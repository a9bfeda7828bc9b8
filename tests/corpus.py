"""Spellings of attention, and what each must be found to be.

Near misses, which must not be found or be right.

A case is a function of tensors.  Its inputs are named in one text and made by ``make_inputs`` from a table of
shapes, so that the same case runs at sizes that all differ (primes) and at sizes that are all alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEG = float("-inf")


@dataclass(frozen=True)
class Sizes:
    """Batch, key/value heads, query heads per key/value head, queries, keys.

    Features of keys and of values.
    """

    b: int = 2
    h: int = 3
    g: int = 5
    s: int = 7
    t: int = 17
    d: int = 11
    e: int = 13


DISTINCT = Sizes()
ALIKE = Sizes(*[4] * 7)
OTHER = Sizes(3, 3, 5, 11, 19, 11, 13)


@dataclass(frozen=True)
class Case:
    """One spelling.  ``mask`` is the closed form as described, ``steps`` the kinds of score steps.

    In order.
    """

    f: Callable[..., Tensor]
    inputs: str
    mask: str = "none"
    steps: str = "scale"
    group: str = "1"
    norm: str = "softmax"
    scale: float | None = None
    alike: bool = True

    @property
    def name(self) -> str:
        return self.f.__name__


CASES: dict[str, Case] = {}
MISSES: dict[str, Case] = {}


def spelling(
    inputs: str = "q k v", **facts: object
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Put a function into the corpus."""

    def add(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES[f.__name__] = Case(f, inputs, **facts)  # type: ignore[arg-type]
        return f

    return add


def near_miss(inputs: str = "qs ks vs") -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Put a function into the collection of what looks like attention and is not what it looks like."""

    def add(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MISSES[f.__name__] = Case(f, inputs)
        return f

    return add


def make_inputs(case: Case, z: Sizes = DISTINCT, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return the inputs of a case, the same at each call."""
    g = torch.Generator().manual_seed(len(case.name))
    return tuple(_make(name, z, dtype, g) for name in case.inputs.split())


def _make(name: str, z: Sizes, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    if name in _MASKS:
        return _MASKS[name](z).to(torch.bool if name.startswith("keep") else torch.int64)
    return torch.randn(_SHAPES[name](z), generator=g, dtype=torch.float64).to(dtype)


_SHAPES: dict[str, Callable[[Sizes], tuple[int, ...]]] = {
    "q": lambda z: (z.b, z.h, z.s, z.d),
    "k": lambda z: (z.b, z.h, z.t, z.d),
    "v": lambda z: (z.b, z.h, z.t, z.e),
    "qs": lambda z: (z.b, z.h, z.s, z.d),
    "ks": lambda z: (z.b, z.h, z.s, z.d),
    "vs": lambda z: (z.b, z.h, z.s, z.e),
    "gq": lambda z: (z.b, z.h * z.g, z.s, z.d),
    "k1": lambda z: (z.b, z.t, z.d),
    "v1": lambda z: (z.b, z.t, z.e),
    "one_q": lambda z: (z.b, z.h, 1, z.d),
    "one_k": lambda z: (z.b, z.h, 1, z.d),
    "one_v": lambda z: (z.b, z.h, 1, z.e),
    "b1q": lambda z: (1, z.h, z.s, z.d),
    "b1k": lambda z: (1, z.h, z.t, z.d),
    "b1v": lambda z: (1, z.h, z.t, z.e),
    "d1q": lambda z: (z.b, z.h, z.s, 1),
    "d1k": lambda z: (z.b, z.h, z.t, 1),
    "qn": lambda z: (z.b, z.s, z.h, z.d),
    "kn": lambda z: (z.b, z.t, z.h, z.d),
    "vn": lambda z: (z.b, z.t, z.h, z.e),
    "qkv": lambda z: (z.b, z.s, 3 * z.h * z.d),
    "image": lambda z: (z.b, 2 * z.s, 3 * z.s, z.h * z.d),
    "past_k": lambda z: (z.b, z.h, z.t, z.d),
    "past_v": lambda z: (z.b, z.h, z.t, z.e),
    "bias": lambda z: (1, z.h, z.s, z.t),
    "bias_q": lambda z: (z.b, 1, z.s, z.t),
    "table": lambda z: (2 * z.t + 1, z.h),
    "per_head": lambda z: (z.h,),
    "w": lambda z: (z.h, z.h),
    "residual": lambda z: (z.b * z.h, z.s, z.e),
    "gate": lambda z: (z.b, z.h, z.s, 1),
    "gate_k": lambda z: (z.b, 1, 1, z.s),
    "v2": lambda z: (z.b, z.h, z.s, z.e),
    "square": lambda z: (z.b, z.h, z.s, z.s),
}


def _padded(b: int, n: int) -> Tensor:
    """Return a validity table: the first row is padded on the left, the last on the right.

    Others not at all.
    """
    keep = torch.ones(b, n, dtype=torch.int64)
    keep[0, : n // 2], keep[-1, n - n // 3 :] = 0, 0
    return keep


def _spots(z: Sizes, *shape: int) -> Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[..., 0] = True
    return keep


_MASKS: dict[str, Callable[[Sizes], Tensor]] = {
    "valid": lambda z: _padded(z.b, z.t),
    "valid_s": lambda z: _padded(z.b, z.s),
    "keep_valid": lambda z: _padded(z.b, z.t),
    "keep_valid_s": lambda z: _padded(z.b, z.s),
    "lengths": lambda z: torch.arange(z.b) % z.t + 1,
    "documents": lambda z: (torch.arange(z.s) // 3).expand(z.b, z.s).contiguous(),
    "keep": lambda z: _spots(z, z.b, 1, z.s, z.t),
    "keep_h": lambda z: _spots(z, z.h, z.s, z.t),
    "keep_all": lambda z: torch.zeros(z.b, z.s, z.t),
}


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def scaled(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def positions(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return query positions ``[S, 1]`` and key positions ``[1, T]`` for scores ``[.., S, T]``."""
    return torch.arange(w.shape[-2])[:, None], torch.arange(w.shape[-1])[None, :]


def added_where(hide: Tensor, value: float, like: Tensor) -> Tensor:
    """Return an additive mask in the scores' type."""
    return torch.where(hide, torch.full((), value, dtype=like.dtype), torch.zeros((), dtype=like.dtype))


# ---------------------------------------------------------------- where the scale is


@spelling()
def scale_after_by_division(q, k, v):
    return (scores(q, k) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@spelling(scale=0.3)
def scale_after_by_product(q, k, v):
    return (0.3 * scores(q, k)).softmax(-1) @ v


@spelling(scale=0.5)
def scale_on_q(q, k, v):
    return scores(q * 0.5, k).softmax(-1) @ v


@spelling(scale=0.25)
def scale_on_both(q, k, v):
    return scores(q * 0.5, k / 2).softmax(-1) @ v


@spelling(scale=0.25)
def scale_on_k_transposed(q, k, v):
    return (q @ (k.transpose(-2, -1) * 0.25)).softmax(-1) @ v


@spelling(scale=0.75)
def scale_in_a_tensor(q, k, v):
    return (scores(q, k) * torch.full((), 0.75, dtype=q.dtype)).softmax(-1) @ v


@spelling(steps="", scale=1.0)
def no_scale(q, k, v):
    return scores(q, k).softmax(-1) @ v


@spelling(scale=-0.5)
def negated_scores(q, k, v):
    return (-(scores(q, k) * 0.5)).softmax(-1) @ v


@spelling(scale=0.4)
def shift_of_all_scores(q, k, v):
    return (scores(q, k) * 0.4 + 2.5).softmax(-1) @ v


@spelling()
def values_times_a_constant(q, k, v):
    return scaled(q, k).softmax(-1) @ (v * 3.0)


# ---------------------------------------------------------------- contractions and layouts


@spelling()
def einsum_bhsd(q, k, v):
    w = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bhjd->bhid", w.softmax(-1), v)


@spelling("qn kn vn")
def einsum_bshd(q, k, v):
    w = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", w.softmax(-1), v)


@spelling("qn kn vn")
def einsum_then_view(q, k, v):
    w = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("bhij,bjhd->bihd", w.softmax(-1), v).contiguous()
    return out.view(out.shape[0], out.shape[1], -1)


@spelling()
def einsum_values_first(q, k, v):
    w = torch.einsum("xyzw,xyuw->xuyz", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("xyuf,xuyz->xyzf", v, w.softmax(1))


@spelling("qn kn vn")
def layout_bshd_by_transposes(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (scaled(q, k).softmax(-1) @ v).transpose(1, 2).contiguous().flatten(2)


@spelling()
def bmm(q, k, v):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
    w = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, -1)


@spelling(scale=0.2)
def baddbmm_without_base(q, k, v):
    b, h, s, _ = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
    base = torch.zeros(b * h, s, k.shape[1], dtype=q.dtype)
    w = torch.baddbmm(base, q, k.transpose(1, 2), beta=0, alpha=0.2)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, -1)


@spelling("q k v bias_q", steps="scale bias", scale=0.2)
def baddbmm_with_bias(q, k, v, bias):
    b, h, s, _ = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
    base = bias.expand(b, h, s, k.shape[1]).reshape(b * h, s, k.shape[1])
    w = torch.baddbmm(base, q, k.transpose(1, 2), alpha=0.2)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, -1)


@spelling("q k v keep", mask="dense")
def scores_of_rank_three_masked_at_rank_four(q, k, v, keep):
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
    w = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(d)).view(b, h, s, -1)
    w = w.masked_fill(~keep, NEG).view(b * h, s, -1)
    return torch.bmm(w.softmax(-1), v).view(b, h, s, -1)


@spelling()
def transposed_scores(q, k, v):
    w = k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return w.softmax(-2).transpose(-2, -1) @ v


@spelling()
def everything_transposed(q, k, v):
    w = (k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-2)
    return (v.transpose(-2, -1) @ w).transpose(-2, -1)


@spelling("qs ks vs", scale=0.3)
def channel_attention(q, k, v):
    w = (q.transpose(-2, -1) @ k * 0.3).softmax(-1)
    return (w @ q.transpose(-2, -1)).transpose(-2, -1)


@spelling("image", scale=0.3)
def window_partition(x):
    b, n, m, c = x.shape
    x = x.view(b, 2, n // 2, 3, m // 3, c).permute(0, 1, 3, 2, 4, 5).reshape(b * 6, (n // 2) * (m // 3), c)
    out = (scores(x, x) * 0.3).softmax(-1) @ x
    out = out.view(b, 2, 3, n // 2, m // 3, c).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(b, n, m, c)


@spelling("qkv")
def packed_chunk(x):
    q, k, v = x.chunk(3, -1)
    return scaled(q, k).softmax(-1) @ v


@spelling("qkv per_head")
def packed_split_heads(x, heads):
    b, s, c = x.shape
    h = heads.shape[0]
    q, k, v = (y.view(b, s, h, c // 3 // h).transpose(1, 2) for y in x.split(c // 3, dim=2))
    return (scaled(q, k).softmax(-1) @ v).transpose(1, 2).reshape(b, s, c // 3)


@spelling("qkv per_head")
def packed_unbind(x, heads):
    b, s, c = x.shape
    h = heads.shape[0]
    q, k, v = x.view(b, s, 3, h, c // 3 // h).permute(2, 0, 3, 1, 4).unbind(0)
    return (scaled(q, k).softmax(-1) @ v).transpose(1, 2).reshape(b, s, c // 3)


@spelling("qkv per_head")
def packed_select(x, heads):
    b, s, c = x.shape
    h = heads.shape[0]
    x = x.view(b, s, h, 3, c // 3 // h)
    q, k, v = (x[:, :, :, i].transpose(1, 2) for i in range(3))
    return (scaled(q, k).softmax(-1) @ v).transpose(1, 2).reshape(b, s, c // 3)


@spelling("q k v past_k past_v")
def cache_by_cat(q, k, v, past_k, past_v):
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return scaled(q, k).softmax(-1) @ v


@spelling("one_q k v")
def decode_one_query(q, k, v):
    return scaled(q, k).softmax(-1) @ v


@spelling("q one_k one_v")
def one_key(q, k, v):
    return scaled(q, k).softmax(-1) @ v


@spelling("b1q b1k b1v")
def batch_of_one(q, k, v):
    return scaled(q, k).softmax(-1) @ v


@spelling("d1q d1k v", steps="", scale=1.0)
def one_feature(q, k, v):
    return scaled(q, k).softmax(-1) @ v


@spelling("q k")
def keys_are_values(q, k):
    return scaled(q, k).softmax(-1) @ k


@spelling()
def dropout_that_is_off(q, k, v):
    return F.dropout(scaled(q, k).softmax(-1), 0.1, training=False) @ v


@spelling("qs ks vs")
def first_queries_only(q, k, v):
    return scaled(q, k).softmax(-1)[:, :, :2] @ v


@spelling("q k v", mask="none")
def values_shared_by_heads(q, k, v):
    return scaled(q, k).softmax(-1) @ v[:, :1]


# ---------------------------------------------------------------- grouped heads


@spelling("gq k v", group="g")
def grouped_by_expand(q, k, v):
    b, h, t, d = k.shape
    g = q.shape[1] // h
    k = k[:, :, None].expand(b, h, g, t, d).reshape(b, h * g, t, d)
    v = v[:, :, None].expand(b, h, g, t, v.shape[-1]).reshape(b, h * g, t, v.shape[-1])
    return scaled(q, k).softmax(-1) @ v


@spelling("gq k v", group="g")
def grouped_by_repeat_interleave(q, k, v):
    g = q.shape[1] // k.shape[1]
    return scaled(q, k.repeat_interleave(g, 1)).softmax(-1) @ v.repeat_interleave(g, dim=1)


@spelling("gq k v", group="g")
def grouped_by_five_axes(q, k, v):
    b, h, _t, d = k.shape
    q5 = q.view(b, h, q.shape[1] // h, q.shape[2], d)
    w = torch.einsum("bhgsd,bhtd->bhgst", q5, k) / math.sqrt(d)
    return torch.einsum("bhgst,bhte->bhgse", w.softmax(-1), v).flatten(1, 2)


@spelling("gq k v", group="g")
def grouped_by_broadcast(q, k, v):
    b, h, _t, d = k.shape
    q5 = q.reshape(b, h, q.shape[1] // h, q.shape[2], d)
    return (scaled(q5, k.unsqueeze(2)).softmax(-1) @ v.unsqueeze(2)).reshape(b, q.shape[1], q.shape[2], -1)


@spelling("gq k v", group="g")
def grouped_by_repeat(q, k, v):
    g = q.shape[1] // k.shape[1]
    return scaled(q, k.repeat(1, g, 1, 1)).softmax(-1) @ v.repeat(1, g, 1, 1)


@spelling("q k1 v1", group="h")
def one_key_head_for_all(q, k, v):
    return scaled(q, k[:, None]).softmax(-1) @ v[:, None]


@spelling("q k1 v1", group="h")
def one_key_head_by_einsum(q, k, v):
    w = torch.einsum("bhsd,btd->bhst", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhst,bte->bhse", w.softmax(-1), v)


# ---------------------------------------------------------------- normalizers


@spelling()
def exponentials_over_their_sum(q, k, v):
    w = scaled(q, k).exp()
    return (w / w.sum(-1, keepdim=True)) @ v


@spelling()
def exponentials_less_the_row_maximum(q, k, v):
    w = scaled(q, k)
    w = (w - w.max(-1, keepdim=True).values).exp()
    return (w / w.sum(dim=-1).unsqueeze(-1)) @ v


@spelling()
def normalized_after_the_values(q, k, v):
    w = scaled(q, k)
    w = (w - w.amax(-1, keepdim=True)).exp()
    return (w @ v) / w.sum(-1, keepdim=True)


@spelling()
def exp_of_log_softmax(q, k, v):
    return F.log_softmax(scaled(q, k), -1).exp() @ v


@spelling()
def softmax_less_the_row_maximum(q, k, v):
    w = scaled(q, k)
    return (w - w.amax(-1, keepdim=True).detach()).softmax(-1) @ v


@spelling(norm="softmax(sink=0.0)")
def softmax_plus_one(q, k, v):
    w = scaled(q, k).exp()
    return (w / (1 + w.sum(-1, keepdim=True))) @ v


@spelling("q k v per_head", norm="softmax(sink=c0)")
def sink_per_head(q, k, v, sink):
    w = scaled(q, k)
    column = sink.view(1, -1, 1, 1).expand(w.shape[0], -1, w.shape[2], 1)
    return torch.cat([w, column], -1).softmax(-1)[..., :-1] @ v


@spelling(norm="softmax(sink=0.0)")
def sink_of_zeros_by_pad(q, k, v):
    w = scaled(q, k)
    zero = torch.zeros(*w.shape[:-1], 1, dtype=w.dtype)
    return torch.cat([w, zero], -1).softmax(-1)[..., : w.shape[-1]] @ v


# ---------------------------------------------------------------- score steps


@spelling(steps="scale softcap")
def softcap(q, k, v):
    return (torch.tanh(scaled(q, k) / 3.0) * 3.0).softmax(-1) @ v


@spelling(steps="scale softcap scale", scale=0.2)
def softcap_between_scales(q, k, v):
    return (5.0 * (2.0 * (scores(q, k) * 0.1).tanh())).softmax(-1) @ v


@spelling("q k v bias", steps="scale bias")
def bias_of_heads(q, k, v, bias):
    return (scaled(q, k) + bias).softmax(-1) @ v


@spelling("q k v bias", steps="scale bias")
def bias_subtracted(q, k, v, bias):
    return (scaled(q, k) - bias).softmax(-1) @ v


@spelling("q k v bias_q", steps="scale bias scale")
def bias_then_scaled(q, k, v, bias):
    return ((scaled(q, k) + bias) * 0.7).softmax(-1) @ v


@spelling(steps="scale bias")
def alibi(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    slopes = 2.0 ** -torch.arange(1, w.shape[1] + 1, dtype=w.dtype)
    return (w + slopes[:, None, None] * (j - i)).softmax(-1) @ v


@spelling("q k v table", steps="scale bias")
def relative_table(q, k, v, table):
    w = scaled(q, k)
    i, j = positions(w)
    bias = table[(j - i + w.shape[-2]).clamp(0, 2 * w.shape[-1])]
    return (w + bias.permute(2, 0, 1)).softmax(-1) @ v


@spelling("q k v per_head", steps="gain", scale=1.0)
def temperature_of_heads(q, k, v, t):
    return (scores(q, k) * t[:, None, None]).softmax(-1) @ v


# ---------------------------------------------------------------- masks from positions


@spelling("qs ks vs", mask="causal")
def causal_by_tril(q, k, v):
    w = scaled(q, k)
    keep = torch.ones(w.shape[-2], w.shape[-1], dtype=torch.bool).tril()
    return w.masked_fill(~keep, NEG).softmax(-1) @ v


@spelling("qs ks vs", mask="causal")
def causal_by_triu_added(q, k, v):
    w = scaled(q, k)
    hide = torch.full((w.shape[-2], w.shape[-1]), NEG, dtype=w.dtype).triu(1)
    return (w + hide).softmax(-1) @ v


@spelling("qs ks vs", mask="causal")
def causal_by_where(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return torch.where(i >= j, w, torch.finfo(w.dtype).min).softmax(-1) @ v


@spelling("qs ks vs", mask="causal", steps="scale")
def causal_before_the_scale(q, k, v):
    w = scores(q, k)
    i, j = positions(w)
    return (w.masked_fill(j > i, NEG) * 0.3).softmax(-1) @ v


@spelling(mask="causal(end)")
def causal_from_the_end(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return w.masked_fill(j > i + (w.shape[-1] - w.shape[-2]), NEG).softmax(-1) @ v


@spelling("qs ks vs", mask="window(left=2,right=0)")
def window_causal(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return w.masked_fill((j > i) | (i - j >= 3), NEG).softmax(-1) @ v


@spelling("qs ks vs", mask="window(left=2,right=2)")
def window_both_sides(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return (w + torch.where((i - j).abs() <= 2, 0.0, -1e9)).softmax(-1) @ v


@spelling("qs ks vs", mask="window(left=2,right=1)")
def window_by_triangles(q, k, v):
    w = scaled(q, k)
    ones = torch.ones(w.shape[-2], w.shape[-1], dtype=torch.bool)
    return w.masked_fill(~(ones.tril(1) & ones.triu(-2)), NEG).softmax(-1) @ v


@spelling("qs ks vs", mask="none")
def all_true_mask(q, k, v):
    w = scaled(q, k)
    keep = torch.ones(w.shape[-2:], dtype=torch.bool)
    hidden = torch.zeros(w.shape[-2:], dtype=w.dtype).masked_fill(~keep, torch.finfo(w.dtype).min)
    return (w + hidden[None, None]).softmax(-1) @ v


@spelling("qs ks vs", mask="chunk(3)")
def chunks_of_positions(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return w.masked_fill(i // 3 != j // 3, NEG).softmax(-1) @ v


# ---------------------------------------------------------------- masks from data


@spelling("q k v keep", mask="dense")
def dense_by_masked_fill(q, k, v, keep):
    return scaled(q, k).masked_fill(~keep, NEG).softmax(-1) @ v


@spelling("q k v keep_h", mask="dense")
def dense_by_where(q, k, v, keep):
    w = scaled(q, k)
    return torch.where(keep, w, torch.full_like(w, -1e9)).softmax(-1) @ v


@spelling("q k v keep", mask="dense")
def dense_by_bool_made_float(q, k, v, keep):
    w = scaled(q, k)
    hidden = torch.zeros(keep.shape, dtype=w.dtype).masked_fill(~keep, NEG)
    return (w + hidden).softmax(-1) @ v


@spelling("q k v bias_q", steps="scale bias")
def additive_mask_given(q, k, v, mask):
    return (scaled(q, k) + mask).softmax(-1) @ v


@spelling("q k v keep_valid", mask="padding(key)")
def padding_by_where(q, k, v, valid):
    w = scaled(q, k)
    return torch.where(valid[:, None, None], w, torch.finfo(w.dtype).min).softmax(-1) @ v


@spelling("q k v valid", mask="padding(key)")
def padding_by_equality(q, k, v, valid):
    return scaled(q, k).masked_fill(valid[:, None, None, :] == 0, -1e9).softmax(-1) @ v


@spelling("q k v valid", mask="padding(key)")
def padding_by_inverted_mask(q, k, v, valid):
    w = scaled(q, k)
    inverted = 1.0 - valid[:, None, None, :].to(w.dtype)
    return (w + inverted.masked_fill(inverted.to(torch.bool), torch.finfo(w.dtype).min)).softmax(-1) @ v


@spelling("q k v valid", steps="scale bias")
def padding_by_one_minus_mask(q, k, v, valid):
    w = scaled(q, k)
    return (w + (1.0 - valid[:, None, None, :].to(w.dtype)) * torch.finfo(w.dtype).min).softmax(-1) @ v


@spelling("q k v lengths", mask="padding(key)")
def padding_by_lengths(q, k, v, lengths):
    w = scaled(q, k)
    keep = torch.arange(w.shape[-1])[None] < lengths[:, None]
    return w.masked_fill(~keep[:, None, None], NEG).softmax(-1) @ v


@spelling("q k v keep_valid", mask="padding(key)")
def padding_subtracted(q, k, v, valid):
    w = scaled(q, k)
    return (w - torch.where(valid, 0.0, 1e9).to(w.dtype)[:, None, None]).softmax(-1) @ v


@spelling("qs ks vs valid_s", mask="causal & padding(key)")
def causal_and_padding(q, k, v, valid):
    w = scaled(q, k)
    i, j = positions(w)
    keep = (j <= i)[None, None] & (valid != 0)[:, None, None, :]
    return torch.where(keep, w, torch.finfo(w.dtype).min).softmax(-1) @ v


@spelling("qs ks vs valid_s", mask="causal & padding(key)")
def causal_then_padding_both_infinite(q, k, v, valid):
    w = scaled(q, k)
    i, j = positions(w)
    w = w.masked_fill(j > i, NEG)
    return w.masked_fill((valid == 0)[:, None, None], NEG).softmax(-1) @ v


@spelling("qs ks vs valid_s", mask="causal", steps="scale bias")
def causal_replaced_then_padding_added(q, k, v, valid):
    w = scaled(q, k)
    i, j = positions(w)
    least = torch.finfo(w.dtype).min
    w = torch.where(j <= i, w, least)
    return (w + added_where(valid == 0, least, w)[:, None, None]).softmax(-1) @ v


@spelling("qs ks vs valid_s", mask="padding(key)", steps="scale bias")
def causal_added_and_padding_added(q, k, v, valid):
    w = scaled(q, k)
    i, j = positions(w)
    least = torch.finfo(w.dtype).min
    w = w + added_where(j > i, least, w)
    return (w + added_where(valid == 0, least, w)[:, None, None]).softmax(-1) @ v


@spelling("qs ks vs documents", mask="document")
def same_document(q, k, v, ids):
    w = scaled(q, k)
    return w.masked_fill(ids[:, None, :, None] != ids[:, None, None, :], NEG).softmax(-1) @ v


@spelling("q k v past_k past_v keep_valid", mask="dense")
def padding_of_new_keys_only(q, k, v, past_k, past_v, valid):
    k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    w = scaled(q, k)
    keep = torch.cat([torch.ones(past_k.shape[0], past_k.shape[2], dtype=torch.bool), valid], 1)
    keep = keep[:, None, None].expand(-1, 1, w.shape[-2], -1)
    return w.masked_fill(~keep, NEG).softmax(-1) @ v


# ---------------------------------------------------------------- fused calls


@spelling("qs ks vs", mask="causal", norm="softmax(safe)")
def fused_call_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling("qs ks vs", mask="causal", norm="softmax(safe)")
def fused_call_with_triangle(q, k, v):
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling("q k v keep_valid", mask="padding(key)", norm="softmax(safe)", scale=0.5)
def fused_call_with_padding(q, k, v, valid):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None], scale=0.5)


@spelling("gq k v", group="g", norm="softmax(safe)")
def fused_call_with_repeated_keys(q, k, v):
    g = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1))


@spelling("gq k v", group="g", norm="softmax(safe)")
def fused_call_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# ---------------------------------------------------------------- near misses: no match, or a right one


@near_miss()
def softmax_over_queries(q, k, v):
    return scaled(q, k).softmax(-2) @ v


@near_miss()
def softmax_over_heads(q, k, v):
    return scaled(q, k).softmax(1) @ v


@near_miss()
def softmax_over_batch(q, k, v):
    return scaled(q, k).softmax(0) @ v


@near_miss("qs ks vs w")
def talking_heads_before(q, k, v, w):
    return torch.einsum("gh,bhij->bgij", w, scaled(q, k)).softmax(-1) @ v


@near_miss("qs ks vs w")
def talking_heads_after(q, k, v, w):
    return torch.einsum("gh,bhij->bgij", w, scaled(q, k).softmax(-1)) @ v


@near_miss()
def sigmoid_weights(q, k, v):
    return torch.sigmoid(scaled(q, k)) @ v


@near_miss()
def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))


@near_miss()
def differential(q, k, v):
    a, b = scaled(q, k).softmax(-1), scaled(k, q).softmax(-1)
    return (a - 0.5 * b) @ v


@near_miss("qs square vs")
def router(q, router, v):
    return (q @ q.transpose(-2, -1)).softmax(-1) * router @ v


@near_miss("qs ks vs gate")
def weights_times_a_gate(q, k, v, gate):
    return (scaled(q, k).softmax(-1) * gate) @ v


@near_miss("qs ks vs gate_k")
def weights_times_a_mask(q, k, v, keep):
    return (scaled(q, k).softmax(-1) * (keep > 0)) @ v


@near_miss("qs ks vs v2")
def two_value_contractions(q, k, v, v2):
    w = scaled(q, k).softmax(-1)
    return w @ v + w @ (v2 * 2)


@near_miss()
def scores_times_scores(q, k, v):
    return (scaled(q, k) * scaled(k, q)).softmax(-1) @ v


@near_miss()
def scores_plus_scores(q, k, v):
    return (scaled(q, k) + scaled(k, q)).softmax(-1) @ v


@near_miss()
def mask_inside_the_softcap(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return (torch.tanh(w.masked_fill(j > i, NEG) / 3.0) * 3.0).softmax(-1) @ v


@near_miss()
def shift_inside_the_softcap(q, k, v):
    return (torch.tanh((scaled(q, k) + 1.5) / 3.0) * 3.0).softmax(-1) @ v


@near_miss("qs ks vs per_head")
def shift_inside_a_gain(q, k, v, t):
    return ((scaled(q, k) + 1.5) * t[:, None, None]).softmax(-1) @ v


@near_miss()
def last_column_dropped(q, k, v):
    return scaled(q, k).softmax(-1)[..., :-1] @ v[..., :-1, :]


@near_miss()
def first_column_dropped(q, k, v):
    return scaled(q, k).softmax(-1)[..., 1:] @ v[..., 1:, :]


@near_miss()
def divided_by_sums_of_other_rows(q, k, v):
    w = scaled(q, k).exp()
    return (w / w.sum(-1).unsqueeze(-2)) @ v


@near_miss()
def result_divided_by_sums_of_columns(q, k, v):
    w = scaled(q, k).exp()
    return (w @ v) / w.sum(-2).unsqueeze(-1)


@near_miss()
def less_the_maximum_of_each_column(q, k, v):
    w = scaled(q, k)
    return (w - w.amax(-2, keepdim=True)).softmax(-1) @ v


@near_miss()
def less_the_maximum_of_other_rows(q, k, v):
    w = scaled(q, k)
    return (w - w.amax(-1, keepdim=True).view(*w.shape[:-2], 1, -1)).softmax(-1) @ v


@near_miss()
def sum_plus_two(q, k, v):
    w = scaled(q, k).exp()
    return (w / (2 + w.sum(-1, keepdim=True))) @ v


@near_miss()
def floor_of_the_division(q, k, v):
    w = scaled(q, k).exp()
    return torch.div(w, w.sum(-1, keepdim=True), rounding_mode="floor") @ v


@near_miss("qs ks vs residual")
def values_added_to_a_residual(q, k, v, residual):
    b, h, s, _d = q.shape
    q, k, v = (x.reshape(b * h, s, x.shape[-1]) for x in (q, k, v))
    return torch.baddbmm(residual, scaled(q, k).softmax(-1), v, beta=1, alpha=0.5)


@near_miss("qs ks")
def weights_times_themselves(q, k):
    w = scaled(q, k).softmax(-1)
    return w @ w


@near_miss()
def weights_rounded_to_integers(q, k, v):
    return (scaled(q, k) * 9).softmax(-1).to(torch.int64).to(v.dtype) @ v


@near_miss("qs ks vs v2")
def softmax_of_products_with_values(q, k, v, v2):
    return ((scaled(q, k) @ v2) @ v2.transpose(-2, -1)).softmax(-1) @ v


@near_miss()
def only_the_largest_scores(q, k, v):
    w = scaled(q, k)
    least = w.topk(2, -1).values[..., -1:]
    return w.masked_fill(w < least, NEG).softmax(-1) @ v


@near_miss()
def fill_that_hides_nothing(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return w.masked_fill(j > i, -2.0).softmax(-1) @ v


@near_miss("qs ks vs bias_q")
def bias_after_a_mild_mask(q, k, v, bias):
    w = scaled(q, k)
    i, j = positions(w)
    return (w.masked_fill(j > i, -2e4) + bias[..., : w.shape[-1]] * 1e4).softmax(-1) @ v


@near_miss()
def mask_in_a_rounded_counter(q, k, v):
    w = scaled(q, k)
    i = (torch.arange(w.shape[-2]) * 300).to(torch.bfloat16)[:, None]
    j = (torch.arange(w.shape[-1]) * 300 + 1).to(torch.bfloat16)[None]
    return w.masked_fill(j > i, NEG).softmax(-1) @ v


@near_miss()
def mask_by_remainder_of_negatives(q, k, v):
    w = scaled(q, k)
    i, j = positions(w)
    return w.masked_fill(torch.fmod(i - j, 3) == 1, NEG).softmax(-1) @ v


@near_miss()
def mask_by_unsigned_difference(q, k, v):
    w = scaled(q, k)
    i, j = (x.to(torch.uint8) for x in positions(w))
    return w.masked_fill(i - j > 3, NEG).softmax(-1) @ v


@near_miss()
def mask_by_a_running_count(q, k, v):
    w = scaled(q, k)
    count = torch.arange(w.shape[-1]).cumsum(0)
    return w.masked_fill(count[3] < torch.arange(w.shape[-1]), NEG).softmax(-1) @ v


@near_miss("qs ks vs valid_s")
def two_masks_of_different_depth(q, k, v, valid):
    w = scaled(q, k)
    i, j = positions(w)
    w = w.masked_fill(j > i, -2e4)
    return w.masked_fill((valid == 0)[:, None, None], -1e4).softmax(-1) @ v


@near_miss("qs ks vs valid_s")
def mask_shifted_before_it_is_replaced(q, k, v, valid):
    w = scaled(q, k) + 9990.0
    return w.masked_fill((valid == 0)[:, None, None], -1e4).softmax(-1) @ v


@near_miss()
def features_repeated(q, k, v):
    q, k = (x[..., :1].expand(*x.shape[:-1], 6) for x in (q, k))
    return scores(q, k).softmax(-1) @ v


@near_miss()
def weights_renormalized(q, k, v):
    w = scaled(q, k).softmax(-1) * scaled(k, q).softmax(-1)
    return (w / w.sum(-1, keepdim=True)) @ v
