"""Attention variants that one pass over the keys can serve, each as the smallest module true to it.

Definitions are those of the papers that each function names.  Modules take a sequence ``x [B, S, WIDTH]`` and
whatever else the function's signature says; weights are drawn once, so that heads differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, S, HEADS, SIZE = 2, 12, 4, 16
WIDTH = HEADS * SIZE


class Variant(nn.Module):
    """Weights by name and shape, drawn at first use, and a forward that is handed them."""

    def __init__(self, forward: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            fan = shape[0] if len(shape) > 1 else 1
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g) / math.sqrt(fan)))
        self.function = forward

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def heads(x: Tensor, n: int = HEADS) -> Tensor:
    """``[B, S, n * D]`` to ``[B, n, S, D]``."""
    b, s, w = x.shape
    return x.view(b, s, n, w // n).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` to ``[B, S, H * D]``."""
    b, h, s, d = x.shape
    return x.transpose(1, 2).reshape(b, s, h * d)


def qkv(m: Variant, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(x @ m.q), heads(x @ m.k), heads(x @ m.v)


def causal(s: Tensor) -> Tensor:
    """Which pairs a causal mask hides."""
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


QKV = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}
X = ("x",)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = SIZE**-0.5) -> Tensor:
    return merged((q @ k.mT * scale).softmax(-1) @ v)


# ---------------------------------------------------------------- heads, operands, streams


def multi_head(m: Variant, x: Tensor) -> Tensor:
    return attend(*qkv(m, x))


def multi_query(m: Variant, x: Tensor) -> Tensor:
    """Multi-query attention (arXiv:1911.02150): one head of keys and values."""
    return attend(heads(x @ m.q), (x @ m.k)[:, None], (x @ m.v)[:, None])


def grouped_query(m: Variant, x: Tensor) -> Tensor:
    """Grouped-query attention (arXiv:2305.13245)."""
    k, v = (heads(x @ w, 2).repeat_interleave(2, 1) for w in (m.k, m.v))
    return attend(heads(x @ m.q), k, v)


def cross(m: Variant, x: Tensor, memory: Tensor) -> Tensor:
    return attend(heads(x @ m.q), heads(memory @ m.k), heads(memory @ m.v))


def latent_expanded(m: Variant, x: Tensor) -> Tensor:
    """Multi-head latent attention (arXiv:2405.04434), as prefill runs it: keys and values are expanded."""
    c, shared = (x @ m.down).split([32, 8], -1)
    k, v = heads(F.rms_norm(c, (32,)) @ m.up).split([SIZE, SIZE], -1)
    k = torch.cat([k, shared[:, None].expand(-1, HEADS, -1, -1)], -1)
    return attend(heads(x @ m.q), k, v, (SIZE + 8) ** -0.5)


def latent_absorbed(m: Variant, x: Tensor) -> Tensor:
    """The same, as decoding runs it: queries meet the latent, which is key and value of all heads."""
    c, shared = (x @ m.down).split([32, 8], -1)
    c = F.rms_norm(c, (32,))
    up = m.up.view(32, HEADS, 2 * SIZE)
    plain, turned = heads(x @ m.q).split([SIZE, 8], -1)
    q = torch.cat([torch.einsum("bhsd,rhd->bhsr", plain, up[..., :SIZE]), turned], -1)
    w = (q @ torch.cat([c, shared], -1)[:, None].mT * (SIZE + 8) ** -0.5).softmax(-1)
    return merged(torch.einsum("bhsr,rhd->bhsd", w @ c[:, None], up[..., SIZE:]))


def convolutional(m: Variant, x: Tensor) -> Tensor:
    """Compressed convolutional attention: two causal convolutions, mean coupling, delayed values, QK-norm."""
    q, k = x @ m.q, x @ m.k
    both = F.pad(torch.cat([q, k], -1).mT, (2, 0))
    both = F.conv1d(F.conv1d(both, m.depth, groups=2 * WIDTH), m.mix, groups=2 * HEADS).mT
    mean = (q + k) / 2
    q, k = (heads(y + mean) for y in both.split(WIDTH, -1))
    late = F.pad(x, (0, 0, 1, 0))[:, :-1]
    v = heads(torch.cat([x @ m.v, late @ m.v_late], -1))
    q, k = (SIZE**0.5 * F.normalize(y, dim=-1) for y in (q, k))
    s = q @ (k * m.temperature.view(1, HEADS, 1, 1)).mT * SIZE**-0.5
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def qk_norm_and_rotary(m: Variant, x: Tensor) -> Tensor:
    """Query-key normalization (arXiv:2010.04245) and rotary positions (arXiv:2104.09864)."""
    q, k, v = qkv(m, x)
    angle = torch.arange(x.shape[1])[:, None] * 100.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2))
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def turn(y: Tensor) -> Tensor:
        y = F.rms_norm(y, (SIZE,))
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    return attend(turn(q), turn(k), v)


def packed_documents(m: Variant, x: Tensor, document: Tensor) -> Tensor:
    """Sequences without padding, one behind the other: a pair counts within one document."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    same = document[:, None, :, None] == document[:, None, None, :]
    return merged(s.masked_fill(~same, -math.inf).softmax(-1) @ v)


def modality_mutual(m: Variant, x: Tensor) -> Tensor:
    """Causal, and queries of an image also see the text that follows it (modality-mutual attention)."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    i, j = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]
    seen = (j <= i) | ((i >= 2) & (i < 6) & (j >= 6) & (j < 9))
    return merged(s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1) @ v)


def pair_wise(m: Variant, x: Tensor, other: Tensor) -> Tensor:
    """Pair-wise cross attention (DCAL, arXiv:2205.02151): keys and values of two images, queries of one."""
    q, k, v = qkv(m, x)
    _, k2, v2 = qkv(m, other)
    return attend(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2))


def one_query(m: Variant, x: Tensor) -> Tensor:
    """CrossViT (arXiv:2103.14899): the class token of one branch attends to the patches of the other."""
    return attend(heads(x[:, :1] @ m.q), heads(x @ m.k), heads(x @ m.v))


def bottleneck(m: Variant, x: Tensor, tokens: Tensor) -> Tensor:
    """Attention bottlenecks (arXiv:2107.00135), one modality: its tokens and the shared few."""
    return multi_head(m, torch.cat([x, tokens], 1))


# ---------------------------------------------------------------- the denominator


def sink_logits(m: Variant, x: Tensor) -> Tensor:
    """One learned logit per head in the denominator only (gpt-oss)."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    column = m.sinks.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
    return merged(torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v)


def off_by_one(m: Variant, x: Tensor) -> Tensor:
    """Softmax-plus-one, with the maximum taken off as its reference code has it."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return merged((e / (e.sum(-1, keepdim=True) + (-top).exp())) @ v)


def cog(m: Variant, x: Tensor) -> Tensor:
    """Cog attention (arXiv:2411.07176): signed weights, hidden after the magnitudes."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    w = s.abs().masked_fill(causal(s), -math.inf).softmax(-1)
    return merged((s.sign() * w) @ v)


def sigmoid(m: Variant, x: Tensor) -> Tensor:
    """Sigmoid self-attention (arXiv:2409.04431), section 3: the bias is -log n."""
    q, k, v = qkv(m, x)
    return merged(torch.sigmoid(q @ k.mT * SIZE**-0.5 - math.log(S)) @ v)


def taylor(m: Variant, x: Tensor) -> Tensor:
    """Weights 1 + s + s^2 / 2 divided by their sum, causal."""
    q, k, v = qkv(m, x)
    s = q @ k.mT * SIZE**-0.5
    w = (1 + s + s**2 / 2).masked_fill(causal(s), 0.0)
    return merged((w / w.sum(-1, keepdim=True)) @ v)


def affine_scaled(m: Variant, x: Tensor) -> Tensor:
    """Affine-scaled attention: ``(alpha softmax(s) + beta) v``, alpha and beta per query and head."""
    q, k, v = qkv(m, x)
    alpha = (0.1 * heads(x @ m.alpha) + 0.5).clamp(0, 1)
    beta = (0.6 - alpha) / x.shape[1]
    w = (q @ k.mT * SIZE**-0.5).softmax(-1)
    return merged((alpha * w + beta) @ v)


def differential(m: Variant, x: Tensor) -> Tensor:
    """Differential attention (arXiv:2410.05258), section 2.1: the difference of two softmaxes, normalized."""
    q, k = (heads(y, 2 * HEADS).unflatten(1, (HEADS, 2)) for y in (x @ m.q, x @ m.k))
    v = heads(x @ m.v)
    w = (q @ k.mT * (SIZE // 2) ** -0.5).softmax(-1)
    weight = (m.a * m.b).sum().exp() - (m.c * m.d).sum().exp() + 0.2
    out = (w[:, :, 0] - weight * w[:, :, 1]) @ v
    return merged(F.rms_norm(out, (SIZE,)) * 0.8)


# ---------------------------------------------------------------- the scores


def softcap(m: Variant, x: Tensor) -> Tensor:
    """Gemma 2 (arXiv:2408.00118): the cap comes before the mask."""
    q, k, v = qkv(m, x)
    s = 50 * torch.tanh(q @ k.mT * SIZE**-0.5 / 50)
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def scalable(m: Variant, x: Tensor) -> Tensor:
    """Scalable softmax (arXiv:2501.19399): scores times a learned number and the logarithm of the length."""
    q, k, v = qkv(m, x)
    n = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    s = q @ k.mT * SIZE**-0.5 * (m.temperature.view(1, HEADS, 1, 1) * n.log())
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def alibi(m: Variant, x: Tensor) -> Tensor:
    """ALiBi (arXiv:2108.12409)."""
    q, k, v = qkv(m, x)
    i = torch.arange(x.shape[1])
    slope = 2.0 ** -(8 / HEADS * torch.arange(1, HEADS + 1))
    s = q @ k.mT * SIZE**-0.5 - slope[:, None, None] * (i[:, None] - i[None]).abs()
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def relative_table(m: Variant, x: Tensor) -> Tensor:
    """T5 (arXiv:1910.10683) without its logarithm: a bias per head and distance, no scale."""
    q, k, v = qkv(m, x)
    i = torch.arange(x.shape[1])
    bias = m.table[(i[None] - i[:, None]).clamp(-4, 4) + 4].permute(2, 0, 1)
    return merged((q @ k.mT + bias).softmax(-1) @ v)


def window_table(m: Variant, x: Tensor) -> Tensor:
    """Swin (arXiv:2103.14030): a bias per head read through an index of two-dimensional distances."""
    q, k, v = qkv(m, x)
    y, z = torch.arange(S) // 4, torch.arange(S) % 4
    index = (y[:, None] - y[None] + 2) * 7 + (z[:, None] - z[None] + 3)
    bias = m.table[index.view(-1)].view(S, S, HEADS).permute(2, 0, 1)
    return merged((q @ k.mT * SIZE**-0.5 + bias).softmax(-1) @ v)


def shifted(scores: Tensor) -> Tensor:
    """The shift of Transformer-XL: distances ``[.., S, R]`` to pairs."""
    b, h, s, r = scores.shape
    padded = F.pad(scores, (1, 0)).view(b, h, r + 1, s)
    return padded[:, :, 1:].view(b, h, s, r)[..., :s]


def transformer_xl(m: Variant, x: Tensor) -> Tensor:
    """Transformer-XL (arXiv:1901.02860), section 3.3: two biased queries, keys and distances."""
    q, k, v = qkv(m, x)
    distances = torch.arange(x.shape[1] - 1, -x.shape[1], -1.0)[:, None]
    r = heads((torch.sin(distances * torch.arange(1, WIDTH + 1) / WIDTH) @ m.r)[None])
    content = (q + m.u.view(1, HEADS, 1, SIZE)) @ k.mT
    position = shifted((q + m.w.view(1, HEADS, 1, SIZE)) @ r.mT)
    s = (content + position) * SIZE**-0.5
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def disentangled(m: Variant, x: Tensor) -> Tensor:
    """DeBERTa (arXiv:2006.03654), section 3.1: contents, content to position, position to content."""
    q, k, v = qkv(m, x)
    i = torch.arange(x.shape[1])
    distance = (i[:, None] - i[None] + 6).clamp(0, 11).expand(x.shape[0], HEADS, -1, -1)
    table_k, table_q = (heads((m.table @ w)[None]) for w in (m.k, m.q))
    to_position = (q @ table_k.mT).gather(-1, distance)
    to_content = (k @ table_q.mT).gather(-1, distance.mT.flip(-1).flip(-1)).mT
    s = (q @ k.mT + to_position + to_content) / math.sqrt(3 * SIZE)
    return merged(s.softmax(-1) @ v)


def phase(m: Variant, x: Tensor) -> Tensor:
    """Token-aware phase attention: an amplitude times the cosine of a phase that grows with the distance."""
    q, k, v = qkv(m, x)
    half = SIZE // 2
    i = torch.arange(x.shape[1], dtype=x.dtype)
    far = (i[:, None] - i[None]).abs() ** 0.1
    amplitude = q[..., :half] @ k[..., :half].mT / math.sqrt(half)
    angle = q[..., half:] @ k[..., half:].mT / math.sqrt(half)
    s = amplitude * torch.cos(2 * math.pi * far * angle)
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


# ---------------------------------------------------------------- values, static maps


def relational(m: Variant, x: Tensor) -> Tensor:
    """Dual attention (arXiv:2405.16727), relational heads: values of pairs, no activation."""
    q, k, v = qkv(m, x)
    r = torch.einsum("bird,bjrd->bijr", (x @ m.rq).unflatten(-1, (4, 8)), (x @ m.rk).unflatten(-1, (4, 8)))
    w = (q @ k.mT * SIZE**-0.5).softmax(-1)
    pairs = torch.einsum("bhij,bijr->bhir", w, r * 8**-0.5)
    return merged(w @ v + torch.einsum("bhir,hrd->bhid", pairs, m.wr))


def relational_activated(m: Variant, x: Tensor) -> Tensor:
    """The same with an activation of the relations."""
    q, k, v = qkv(m, x)
    r = torch.einsum("bird,bjrd->bijr", (x @ m.rq).unflatten(-1, (4, 8)), (x @ m.rk).unflatten(-1, (4, 8)))
    w = (q @ k.mT * SIZE**-0.5).softmax(-1)
    pairs = torch.einsum("bhij,bijr->bhir", w, torch.relu(r * 8**-0.5))
    return merged(w @ v + torch.einsum("bhir,hrd->bhid", pairs, m.wr))


def positional(m: Variant, x: Tensor) -> Tensor:
    """Queries and keys of positions only, without a batch axis."""
    places = m.places[: x.shape[1]]
    q, k = (heads((places @ w)[None])[0] for w in (m.q, m.k))
    w = (q @ k.mT * SIZE**-0.5).softmax(-1)
    return merged(w @ heads(x @ m.v))


def static_embeddings(m: Variant, x: Tensor, embedded: Tensor) -> Tensor:
    """Queries and keys of the input embeddings, values of the layer."""
    return attend(heads(embedded @ m.q), heads(embedded @ m.k), heads(x @ m.v))


def key_only(m: Variant, x: Tensor) -> Tensor:
    """Scores that depend on the key alone."""
    q, k, v = qkv(m, x)
    s = ((F.silu(q) * k).sum(-1) * SIZE**-0.5)[:, :, None].expand(-1, -1, x.shape[1], -1)
    return merged(s.masked_fill(causal(s), -math.inf).softmax(-1) @ v)


def optimized(m: Variant, x: Tensor) -> Tensor:
    """Optimized attention (arXiv:2403.01643): the values are the input itself."""
    return attend(heads(x @ m.q), heads(x @ m.k), heads(x))


def efficient(m: Variant, x: Tensor) -> Tensor:
    """Efficient attention (arXiv:2403.01643): keys and values are the input itself."""
    return attend(heads(x @ m.q), heads(x), heads(x))


def super_attention(m: Variant, x: Tensor) -> Tensor:
    """Super attention (arXiv:2403.01643): the values are mixed along the tokens by a learned matrix."""
    return attend(heads(x @ m.q), heads(x), heads(m.mix @ x))


def tangent(m: Variant, x: Tensor, step: Tensor) -> Tensor:
    """The derivative of attention along ``step``, spelled out."""
    q, k, v = qkv(m, x)
    tq, tk, tv = qkv(m, step)
    w = (q @ k.mT * SIZE**-0.5).softmax(-1)
    ts = (tq @ k.mT + q @ tk.mT) * SIZE**-0.5
    tw = w * (ts - (w * ts).sum(-1, keepdim=True))
    return merged(tw @ v + w @ tv)


VARIANTS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "multi_head": (multi_head, QKV, X),
    "multi_query": (multi_query, {**QKV, "k": (WIDTH, SIZE), "v": (WIDTH, SIZE)}, X),
    "grouped_query": (grouped_query, {**QKV, "k": (WIDTH, 32), "v": (WIDTH, 32)}, X),
    "cross": (cross, QKV, ("x", "memory")),
    "latent_expanded": (
        latent_expanded,
        {"down": (WIDTH, 40), "up": (32, 2 * WIDTH), "q": (WIDTH, HEADS * (SIZE + 8))},
        X,
    ),
    "latent_absorbed": (
        latent_absorbed,
        {"down": (WIDTH, 40), "up": (32, 2 * WIDTH), "q": (WIDTH, HEADS * (SIZE + 8))},
        X,
    ),
    "convolutional": (
        convolutional,
        {
            **{"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH // 2)},
            **{"v_late": (WIDTH, WIDTH // 2), "depth": (2 * WIDTH, 1, 2), "mix": (2 * WIDTH, SIZE, 2)},
            "temperature": (HEADS,),
        },
        X,
    ),
    "qk_norm_and_rotary": (qk_norm_and_rotary, QKV, X),
    "packed_documents": (packed_documents, QKV, ("x", "document")),
    "modality_mutual": (modality_mutual, QKV, X),
    "pair_wise": (pair_wise, QKV, ("x", "x")),
    "one_query": (one_query, QKV, X),
    "bottleneck": (bottleneck, QKV, ("x", "few")),
    "sink_logits": (sink_logits, {**QKV, "sinks": (HEADS,)}, X),
    "off_by_one": (off_by_one, QKV, X),
    "cog": (cog, QKV, X),
    "sigmoid": (sigmoid, QKV, X),
    "taylor": (taylor, QKV, X),
    "affine_scaled": (affine_scaled, {**QKV, "alpha": (WIDTH, HEADS)}, X),
    "differential": (differential, {**QKV, **dict.fromkeys("abcd", (8,))}, X),
    "softcap": (softcap, QKV, X),
    "scalable": (scalable, {**QKV, "temperature": (HEADS,)}, X),
    "alibi": (alibi, QKV, X),
    "relative_table": (relative_table, {**QKV, "table": (9, HEADS)}, X),
    "window_table": (window_table, {**QKV, "table": (35, HEADS)}, X),
    "transformer_xl": (transformer_xl, {**QKV, "r": (WIDTH, WIDTH), "u": (WIDTH,), "w": (WIDTH,)}, X),
    "disentangled": (disentangled, {**QKV, "table": (12, WIDTH)}, X),
    "phase": (phase, QKV, X),
    "relational": (relational, {**QKV, "rq": (WIDTH, 32), "rk": (WIDTH, 32), "wr": (HEADS, 4, SIZE)}, X),
    "relational_activated": (
        relational_activated,
        {**QKV, "rq": (WIDTH, 32), "rk": (WIDTH, 32), "wr": (HEADS, 4, SIZE)},
        X,
    ),
    "positional": (positional, {**QKV, "places": (64, WIDTH)}, X),
    "static_embeddings": (static_embeddings, QKV, ("x", "x")),
    "key_only": (key_only, QKV, X),
    "optimized": (optimized, QKV, X),
    "efficient": (efficient, QKV, X),
    "super_attention": (super_attention, {**QKV, "mix": (S, S)}, X),
    "tangent": (tangent, QKV, ("x", "x")),
}
"""Each variant's function, the shapes of its weights, and its inputs."""


def build(name: str) -> tuple[Variant, tuple[Tensor, ...]]:
    """Return a variant in eval mode and its example inputs."""
    function, shapes, inputs = VARIANTS[name]
    g = torch.Generator().manual_seed(1)
    lengths = {"x": S, "memory": S + 5, "few": 3}
    args = tuple(
        torch.arange(S).expand(B, S) // 5
        if n == "document"
        else torch.randn(B, lengths[n], WIDTH, generator=g)
        for n in inputs
    )
    return Variant(function, shapes).eval(), args
