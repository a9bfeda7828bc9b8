"""The calls that gpu.py measures: their tensors, what they cost, and what they should give.

A case is one call: a way (forward, backward, decode, blocks), a mask or bias, a head size and lengths.  Batch
and heads are such that a training case has 16,384 tokens of 2,048 features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

TOKENS, FEATURES = 16384, 2048
WINDOW, CAP, BLOCK = 1024, 30.0, 128
MASKS = ("full", "causal", "window", "document", "alibi", "softcap", "bias")
CHUNK = 1024
"""Queries of the reference at a time."""
_CAUSAL = ("causal", "window", "document", "alibi", "softcap")


@dataclass(frozen=True)
class Case:
    """One call; sizes in tokens, heads and features.  ``density`` is that of listed blocks of ``block``."""

    way: str
    mask: str
    d: int
    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    window: int = WINDOW
    block: int = BLOCK
    density: float = 1.0

    @property
    def name(self) -> str:
        """The name that ``--only`` is matched with."""
        if self.way == "decode":
            return f"decode/batch{self.batch}/keys{self.sk}"
        if self.way == "blocks":
            return f"blocks/density{self.density:g}/n{self.sk}"
        return f"{self.way}/{self.mask}/d{self.d}/n{self.sk}"

    @property
    def scale(self) -> float:
        """What the contraction is multiplied by."""
        return self.d**-0.5

    @cached_property
    def ends(self) -> list[int]:
        """Where documents end, in tokens: eight, of lengths 1 : 2 : .. : 8."""
        return [self.sk * n * (n + 1) // 72 for n in range(1, 9)]

    @property
    def pairs(self) -> float:
        """Pairs of query and key that count, per batch entry and head."""
        n = self.sk
        if self.mask == "window":
            w = min(self.window, n)
            return w * (w + 1) / 2 + (n - w) * w
        if self.mask == "document":
            lengths = (end - start for start, end in zip([0, *self.ends], self.ends, strict=False))
            return sum(length * (length + 1) / 2 for length in lengths)
        if self.mask in _CAUSAL:
            return n * (n + 1) / 2
        return self.sq * n * (self.listed / (n // self.block) if self.way == "blocks" else 1.0)

    @property
    def listed(self) -> int:
        """Key blocks per row of query blocks."""
        return max(1, round(self.density * (self.sk // self.block)))

    @property
    def flops(self) -> float:
        """Floating-point operations of the contractions: two forward, five backward."""
        return 4 * self.batch * self.heads * self.pairs * self.d * (2.5 if self.way == "backward" else 1.0)

    def bytes(self, item: int) -> float:
        """Bytes that have to be moved once: operands and results, ``item`` bytes per number."""
        rows, keys = self.batch * self.heads * self.sq * self.d, self.batch * self.kv_heads * self.sk * self.d
        numbers = 2 * rows + 2 * keys
        numbers += 2 * rows + 2 * keys if self.way == "backward" else 0
        numbers += self.heads * self.sq * self.sk if self.mask == "bias" else 0
        return numbers * item

    def spec(self, dtype: torch.dtype) -> str:
        """Return the text of what is computed."""
        kind = str(dtype).removeprefix("torch.")
        group = self.heads // self.kv_heads
        operands = " ".join(
            f"{name}={axes}[b,{h},{n},{self.d}]:{kind}"
            for name, axes, h, n in (
                ("q", "bhqd", "h", "s"),
                ("k", "bhkd", "g", "t"),
                ("v", "bhke", "g", "t"),
            )
        )
        steps, mask, more = {
            "alibi": (" pointwise((s+(slope*(k-q))))", "causal", " with slope=bhqk[1,h,1,1]:float32"),
            "softcap": (f" softcap({CAP})", "causal", ""),
            "bias": (" bias(rel)", "none", f" with rel=bhqk[1,h,s,t]:{kind}"),
            "window": ("", f"window(left={self.window - 1},right=0)", ""),
            "document": (
                "",
                "(causal & document(own,ids))",
                " with own=bq[b,s]:int64 with ids=bk[b,t]:int64",
            ),
            "causal": ("", "causal", ""),
            "full": ("", "none", ""),
        }[self.mask]
        fill = "" if mask == "none" else " fill(replace,-inf)"
        return f"attn {operands} group={group} scale({self.scale!r}){steps} mask={mask}{fill} softmax{more}"


@dataclass
class Tensors:
    """The tensors of one call.

    q ``[B, H, Sq, D]``, k and v ``[B, Hkv, Sk, D]``, dout as q; ids ``[B, Sk]``, slope ``[1, H, 1, 1]``, rel
    ``[1, H, Sq, Sk]``; blocks, bool, ``[1, H, Sq / block, Sk / block]``.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def captured(self) -> list[Tensor]:
        """What the spec reads beside q, k and v, in its order."""
        names = {"alibi": ["slope"], "bias": ["rel"], "document": ["ids", "ids"]}.get(self.case.mask, [])
        return [self.extra[n] for n in names]

    @property
    def size(self) -> int:
        """Bytes of q, k and v."""
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v))

    @cached_property
    def keep(self) -> Tensor | None:
        """The mask as bools that broadcast to ``[B, H, Sq, Sk]``, None where SDPA says it by a flag."""
        if self.case.way == "blocks":
            size = self.case.block
            return self.extra["blocks"].repeat_interleave(size, 2).repeat_interleave(size, 3)
        if self.case.mask not in ("window", "document"):
            return None
        at = torch.arange(self.case.sk, device=self.q.device)
        return visible(self.case, self.extra, at[: self.case.sq, None], at[None, :])[None, None]

    @cached_property
    def added(self) -> Tensor | None:
        """What is added to the scores, in q's dtype: the bias, or ALiBi with its causal mask."""
        if self.case.mask == "bias":
            return self.extra["rel"]
        if self.case.mask != "alibi":
            return None
        at = torch.arange(self.case.sk, device=self.q.device)
        far = (at[None, :] - at[:, None]).float()
        heads = [(slope * far).to(self.q.dtype) for slope in self.extra["slope"].flatten()]
        return torch.stack(heads)[None].masked_fill_(far > 0, -math.inf)


def draw(case: Case, device: torch.device, dtype: torch.dtype, seed: int, shared: Tensors | None) -> Tensors:
    """Return random tensors for a case; large ones that only the first call reads are shared."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    rows = (case.batch, case.heads, case.sq, case.d)
    keys = (case.batch, case.kv_heads, case.sk, case.d)
    made = Tensors(case, normal(*rows), normal(*keys), normal(*keys), normal(*rows))
    if shared is not None:
        made.extra = shared.extra
        made.__dict__.update({n: shared.__dict__[n] for n in ("keep", "added") if n in shared.__dict__})
        return made
    if case.mask == "document":
        ends = torch.tensor(case.ends, device=device)
        ids = torch.searchsorted(ends, torch.arange(case.sk, device=device), right=True)
        made.extra["ids"] = ids.expand(case.batch, -1).contiguous()
    if case.mask == "alibi":
        slopes = 2.0 ** (-8.0 * torch.arange(1, case.heads + 1, device=device) / case.heads)
        made.extra["slope"] = slopes.view(1, -1, 1, 1)
    if case.mask == "bias":
        made.extra["rel"] = normal(1, case.heads, case.sq, case.sk)
    if case.way == "blocks":
        shape = (1, case.heads, case.sq // case.block, case.sk // case.block)
        chance = torch.rand(shape, generator=g, device=device)
        chance.diagonal(dim1=2, dim2=3).fill_(2.0)
        chosen = chance.topk(case.listed, dim=3).indices
        made.extra["blocks"] = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(3, chosen, True)
    return made


def visible(case: Case, extra: dict[str, Tensor], qi: Tensor, ki: Tensor) -> Tensor:
    """Return which keys a query sees in the first batch entry and head; qi is a column, ki a row."""
    if case.way == "blocks":
        return extra["blocks"][0, 0][qi // case.block, ki // case.block]
    seen = ki <= qi if case.mask in _CAUSAL else (qi >= 0) & (ki >= 0)
    if case.mask == "window":
        seen = seen & (ki > qi - case.window)
    if case.mask == "document":
        seen = seen & (extra["ids"][0][qi] == extra["ids"][0][ki])
    return seen


def reference(t: Tensors, work: torch.dtype, *, rounded: bool) -> tuple[Tensor, ...]:
    """Return the output of the first batch entry and head, ``[Sq, D]``; backward its gradients of q, k, v.

    ``work`` float64 is exact; in float32 weights are rounded to q's dtype, as any kernel rounds them.
    ``rounded`` says that ALiBi came as a tensor of q's dtype.
    """
    case, grad = t.case, t.case.way == "backward"
    q, k, v = (x[0, 0].detach().to(work).requires_grad_(grad) for x in (t.q, t.k, t.v))
    parts = []
    for start in range(0, case.sq, CHUNK):
        rows = slice(start, min(start + CHUNK, case.sq))
        with torch.set_grad_enabled(grad):
            out = _rows(t, q, k, v, rows, rounded)
        if grad:
            out.backward(t.dout[0, 0, rows].to(work))
        parts.append(out.detach())
    if grad:
        return tuple(x.grad for x in (q, k, v) if x.grad is not None)
    return (torch.cat(parts),)


def _rows(t: Tensors, q: Tensor, k: Tensor, v: Tensor, rows: slice, rounded: bool) -> Tensor:
    case, work = t.case, q.dtype
    qi = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    ki = torch.arange(case.sk, device=q.device)[None, :]
    s = q[rows] @ k.T * case.scale
    if case.mask == "softcap":
        s = CAP * torch.tanh(s / CAP)
    if case.mask == "bias":
        s = s + t.extra["rel"][0, 0, rows].to(work)
    if case.mask == "alibi":
        far = (t.extra["slope"][0, 0] * (ki - qi).float()).to(t.q.dtype if rounded else work)
        s = s + far.to(work)
    s = s.masked_fill(~visible(case, t.extra, qi, ki), -math.inf)
    weights = torch.softmax(s, -1)
    if work != torch.float64:
        weights = weights.to(t.q.dtype).to(work)
    return weights @ v


def limits(t: Tensors, *, rounded: bool) -> list[tuple[Tensor, float]]:
    """Return the exact results, and how far an implementation may be off each.

    Four times what plain torch in fp32 with rounded weights is off, and four rounding units of the largest
    value: an implementation rounds its weights, their gradients, and the output before it is used again.
    """
    exact = reference(t, torch.float64, rounded=rounded)
    plain = reference(t, torch.float32, rounded=rounded)
    eps = torch.finfo(t.q.dtype).eps
    found = []
    for want, other in zip(exact, plain, strict=True):
        own = (other.double() - want).abs().max()
        found.append((want, float(4 * (own + eps * want.abs().max()))))
    return found


def all_cases() -> Iterator[Case]:
    """Yield every case, those that say most first."""
    sizes = ((4096, 128), (16384, 128), (4096, 64), (1024, 128), (16384, 64), (1024, 64))
    training = [
        Case("forward", mask, d, TOKENS // n, FEATURES // d, FEATURES // d, n, n)
        for n, d in sizes
        for mask in MASKS
    ]
    yield from (c for c in training if (c.sk, c.d) == sizes[0])
    for batch in (1, 64):
        for keys in (4096, 32768):
            yield Case("decode", "full", 128, batch, 32, 8, 1, keys)
    for density in (0.5, 0.25, 0.1):
        yield Case("blocks", "full", 128, 1, 16, 16, 8192, 8192, density=density)
    yield from (replace(c, way="backward") for c in training if (c.sk, c.d) == sizes[0])
    for n, d in sizes[1:]:
        yield from (c for c in training if (c.sk, c.d) == (n, d))
        yield from (replace(c, way="backward") for c in training if (c.sk, c.d) == (n, d))


def smoke_cases() -> Iterator[Case]:
    """Yield tiny cases of every kind, which a CPU runs in seconds."""
    for mask in MASKS:
        yield Case("forward", mask, 16, 1, 2, 2, 48, 48, window=16)
    for mask in ("causal", "alibi"):
        yield Case("backward", mask, 16, 1, 2, 2, 48, 48)
    yield Case("decode", "full", 16, 2, 4, 2, 1, 96)
    yield Case("blocks", "full", 16, 1, 2, 2, 64, 64, block=16, density=0.5)
