"""Rotary embeddings and norms as people write them, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 16
HALF = D // 2


def angles(n: int, pairs: int = HALF) -> Tensor:
    """Return position times frequency, [n, pairs]."""
    frequency = 10000.0 ** (-torch.arange(0, pairs, dtype=torch.float32) / pairs)
    return torch.outer(torch.arange(n, dtype=torch.float32), frequency)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def half_by_rotate_half(x: Tensor) -> Tensor:
    t = angles(x.shape[-2])
    t = torch.cat((t, t), dim=-1)
    return x * t.cos() + rotate_half(x) * t.sin()


def half_by_two_products(x: Tensor) -> Tensor:
    c, s = angles(x.shape[-2]).cos(), angles(x.shape[-2]).sin()
    a, b = x[..., :HALF], x[..., HALF:]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def half_in_float32(x: Tensor) -> Tensor:
    return half_by_rotate_half(x.float()).to(x.dtype)


def half_scaled(x: Tensor) -> Tensor:
    """Scale cosines and sines alike, as YaRN does."""
    t = angles(x.shape[-2]).repeat(1, 2)
    return x * (t.cos() * 1.2) + rotate_half(x) * (t.sin() * 1.2)


def interleaved_by_slices(x: Tensor) -> Tensor:
    t = angles(x.shape[-2])
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * t.cos() - odd * t.sin(), even * t.sin() + odd * t.cos()), dim=-1).flatten(-2)


def interleaved_by_stacked_halves(x: Tensor) -> Tensor:
    t = angles(x.shape[-2]).repeat_interleave(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * t.cos() + turned * t.sin()


def interleaved_by_view(x: Tensor) -> Tensor:
    t = angles(x.shape[-2])
    a, b = x.reshape(*x.shape[:-1], HALF, 2).unbind(-1)
    return torch.stack((a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()), dim=-1).reshape(x.shape)


def interleaved_in_place(x: Tensor) -> Tensor:
    t = angles(x.shape[-2])
    out = torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * t.cos() - x[..., 1::2] * t.sin()
    out[..., 1::2] = x[..., 1::2] * t.cos() + x[..., ::2] * t.sin()
    return out


def complex_polar(x: Tensor) -> Tensor:
    t = angles(x.shape[-2])
    turn = torch.polar(torch.ones_like(t), t)
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], HALF, 2))
    return torch.view_as_real(z * turn).flatten(-2).type_as(x)


def complex_parts(x: Tensor) -> Tensor:
    """Pair the halves, multiply complex numbers, take their parts."""
    t = angles(x.shape[-2])
    z = torch.complex(x[..., :HALF], x[..., HALF:]) * torch.complex(t.cos(), t.sin())
    return torch.cat((z.real, z.imag), dim=-1)


def partial(x: Tensor) -> Tensor:
    t = angles(x.shape[-2], HALF // 2)
    t = torch.cat((t, t), dim=-1)
    turning, rest = x[..., :HALF], x[..., HALF:]
    return torch.cat((turning * t.cos() + rotate_half(turning) * t.sin(), rest), dim=-1)


def partial_at_the_end(x: Tensor) -> Tensor:
    t = angles(x.shape[-2], HALF // 2)
    a, b = x[..., HALF:].chunk(2, dim=-1)
    turned = torch.cat((a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()), dim=-1)
    return torch.cat((x[..., :HALF], turned), dim=-1)


def two_axes_in_blocks(x: Tensor) -> Tensor:
    """Rotate one half of the features by the row, the other by the column, of a grid 4 wide."""
    n = torch.arange(x.shape[-2])
    frequency = 100.0 ** (-torch.arange(0, HALF // 2, dtype=torch.float32) / 4)
    out = []
    for place, part in zip((n // 4, n % 4), x.chunk(2, dim=-1), strict=True):
        t = place[:, None] * frequency
        a, b = part.chunk(2, dim=-1)
        out.append(torch.cat((a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()), dim=-1))
    return torch.cat(out, dim=-1)


def two_axes_in_one(x: Tensor) -> Tensor:
    """Rotate half-split features by angles of two position axes side by side."""
    n = torch.arange(x.shape[-2])
    frequency = 100.0 ** (-torch.arange(0, HALF // 2, dtype=torch.float32) / 4)
    t = torch.cat(((n // 4)[:, None] * frequency, (n % 4)[:, None] * frequency), dim=-1).repeat(1, 2)
    return x * t.cos() + rotate_half(x) * t.sin()


def sections(x: Tensor, places: Tensor) -> Tensor:
    """M-RoPE (arXiv:2409.12191): pairs 0-1, 2-4 and 5-7 turn by three position axes; places is [3, n]."""
    frequency = 10000.0 ** (-torch.arange(0, HALF, dtype=torch.float32) / HALF)
    t = places[:, :, None].float() * frequency
    t = torch.cat((t, t), dim=-1)
    cos, sin = t.cos(), t.sin()
    split = [2, 3, 3, 2, 3, 3]
    cos = torch.cat([m[i % 3] for i, m in enumerate(cos.split(split, dim=-1))], dim=-1)
    sin = torch.cat([m[i % 3] for i, m in enumerate(sin.split(split, dim=-1))], dim=-1)
    return x * cos + rotate_half(x) * sin


ROTATIONS: dict[Callable[[Tensor], Tensor], str] = {
    half_by_rotate_half: "rope(half)",
    half_by_two_products: "rope(half)",
    half_in_float32: "rope(half)",
    half_scaled: "rope(half)",
    interleaved_by_slices: "rope(interleaved)",
    interleaved_by_stacked_halves: "rope(interleaved)",
    interleaved_by_view: "rope(interleaved)",
    complex_polar: "rope(interleaved)",
    complex_parts: "rope(half)",
    partial: "rope(half, 8 of 16)",
    partial_at_the_end: "rope(half, 8 of 16)",
    two_axes_in_blocks: "rope-2d(half in 2 blocks, sections 4+4)",
    two_axes_in_one: "rope-2d(half, sections 4+4)",
}


# ---------------------------------------------------------------- norms


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rms_upcast(x: Tensor) -> Tensor:
    y = x.to(torch.float32)
    return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_by_norm(x: Tensor) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + 1e-6)


def rms_module(x: Tensor) -> Tensor:
    return F.rms_norm(x, (D,))


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def unit_by_sum(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def layer(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def layer_by_hand(x: Tensor) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_centered_twice(x: Tensor) -> Tensor:
    m = x.mean(-1, keepdim=True)
    return (x - m) * torch.rsqrt((x - m).pow(2).mean(-1, keepdim=True) + 1e-6)


def layer_by_variance(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)


NORMS: dict[Callable[[Tensor], Tensor], str] = {
    rms: "rms-norm",
    rms_upcast: "rms-norm",
    rms_by_norm: "rms-norm",
    rms_module: "rms-norm",
    unit: "l2-norm",
    unit_by_sum: "l2-norm",
    layer: "layer-norm",
    layer_by_hand: "layer-norm",
    layer_centered_twice: "layer-norm",
    layer_by_variance: "layer-norm",
}


# ---------------------------------------------------------------- what only looks like one


def reflected(x: Tensor) -> Tensor:
    """Forget the sign: a reflection."""
    t = angles(x.shape[-2]).repeat(1, 2)
    return x * t.cos() + torch.cat((x[..., HALF:], x[..., :HALF]), dim=-1) * t.sin()


def neighbor(x: Tensor) -> Tensor:
    """Mix each feature with the next one, which is no pairing."""
    t = angles(x.shape[-2]).repeat(1, 2)
    return x * t.cos() + torch.cat((-x[..., 1:], x[..., :1]), dim=-1) * t.sin()


def two_angles(x: Tensor) -> Tensor:
    """Take the sine of twice the angle."""
    t = angles(x.shape[-2]).repeat(1, 2)
    return x * t.cos() + rotate_half(x) * (2 * t).sin()


def angle_per_feature(x: Tensor) -> Tensor:
    """Give the two features of a pair different angles."""
    t = angles(x.shape[-2], D)
    return x * t.cos() + rotate_half(x) * t.sin()


def swapped(x: Tensor) -> Tensor:
    """Exchange cosine and sine on one of the halves."""
    t = angles(x.shape[-2])
    a, b = x[..., :HALF], x[..., HALF:]
    return torch.cat((a * t.cos() - b * t.sin(), b * t.sin() + a * t.cos()), dim=-1)


def modulated(x: Tensor) -> Tensor:
    """Multiply by a cosine, and turn nothing."""
    return x * angles(x.shape[-2], D).cos()


def one_half_only(x: Tensor) -> Tensor:
    """Write the rotated first half and leave the second as it was."""
    t = angles(x.shape[-2])
    a, b = x[..., :HALF], x[..., HALF:]
    return torch.cat((a * t.cos() - b * t.sin(), b), dim=-1)


def scaled_unevenly(x: Tensor) -> Tensor:
    t = angles(x.shape[-2]).repeat(1, 2)
    return x * t.cos() + rotate_half(x) * t.sin() * 1.5


def over_positions(x: Tensor) -> Tensor:
    """Normalize along the sequence."""
    return x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6)


def wrong_power(x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6)


def another_row(x: Tensor) -> Tensor:
    """Divide by the size of another tensor's row."""
    other = x.flip(-2)
    return x * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 1e-6)


def mean_of_fourth_powers(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)


LOOK_ALIKES = (
    reflected, neighbor, two_angles, angle_per_feature, swapped, modulated, one_half_only, scaled_unevenly,
    over_positions, wrong_power, another_row, mean_of_fourth_powers,
)  # fmt: skip


# ---------------------------------------------------------------- around them


class Attend(nn.Module):
    """Project, apply ``f`` to queries and keys, attend; two key heads per four query heads if ``grouped``."""

    def __init__(self, f: Callable[[Tensor], Tensor], grouped: bool = False) -> None:
        super().__init__()
        self.f, self.kv = f, 2 if grouped else 4
        self.q = nn.Linear(32, 4 * D)
        self.k, self.v = nn.Linear(32, self.kv * D), nn.Linear(32, self.kv * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], x.shape[1], -1, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.f(q), self.f(k)
        if self.kv < 4:
            b, h, n, _ = k.shape
            k, v = (t[:, :, None].expand(b, h, 2, n, D).reshape(b, 4, n, D) for t in (k, v))
        return torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1) @ v
