"""Integer linear layers for CPU: int8 weights per channel, int8 activations per row, exact sums.

    s_x[m] = max_k |x[m, k]| / 127,    codes = round_half_even(x / s_x)      # per row (token), at run time
    s_w[n] = max_k |W[n, k]| / 127,    weight = round_half_even(W / s_w)     # per output channel, stored
    y[m, n] = float(sum_k codes[m, k] * weight[n, k]) * s_x[m] * s_w[n] + bias[n]

Both quantizers are symmetric and clip nothing, so an element is off by at most half a scale, and the product
by at most ``s_x/2 * ||W_n||_1 + s_w/2 * ||x_m||_1 + K * s_x * s_w / 4``.  The sum is exact in int32 up to
``K = MAX_K``.

The integer product is ``torch._int_mm``: with VNNI, a quarter of the time of a float32 ``linear``.  The
rest costs a quarter of that: the row maximum is two reductions that read only, ``amax`` and ``amin``
(``abs().amax()`` writes a copy, and ``vector_norm`` and ``aminmax`` are ten times slower); no clamp is
needed, as 127 is attained and never passed; the int32 result is converted in place and scaled in place, so
the output's memory is the only large one.

Source: forms/quantized, sections 0 and 1b of the project's design notes (QServe, arXiv:2405.04532, section 4:
per token symmetric int8 activations); W8A8 as in LLM.int8(), arXiv:2208.07339, section 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from attnc.codegen.operators import (
    Below,
    Node,
    is_recorded,
    operator,
    record,
    tangent_of,
    with_tangent,
    without_tangent,
)
from attnc.errors import RewriteError, UnsupportedError

MAX_K = (2**31 - 1) // (127 * 127)  # 133144: the longest sum of products of codes that int32 holds
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The scale of an all-zero row: the least normal number, whose reciprocal is finite
_TINY = torch.finfo(torch.float32).tiny
_EXACT_K = 1024  # 1024 * 127 * 127 < 2**24: float32 adds that many products of codes without rounding


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` ``[M, K]`` to int8 codes ``[M, K]`` and a float32 scale ``[M, 1]``.

    ``x ~ codes * scale`` within ``scale / 2``.  A row of zeros has the least normal float32 as its scale.  A
    row that holds a NaN or an infinity has a scale that is not finite and codes without meaning; the caller's
    product is then NaN all along the row.
    """
    if x.shape[1] == 0:
        return torch.empty_like(x, dtype=torch.int8), torch.full((x.shape[0], 1), _TINY, device=x.device)
    most = torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_())
    scale = most.to(torch.float32).mul_(1 / 127).clamp_min_(_TINY)
    return (x * scale.reciprocal()).round_().to(torch.int8), scale


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` ``[N, K]`` per output channel: int8 codes ``[N, K]`` and a float32 scale ``[N]``.

    Raises:
        RewriteError: a weight that is not finite, not float32, bfloat16 or float16, or has no data.
    """
    if weight.dtype not in FLOATS or weight.is_meta:
        found = "a meta tensor" if weight.is_meta else f"{weight.dtype}"
        raise RewriteError(
            f"W8A8: expected a weight of dtype float32, bfloat16 or float16 with data, found {found}"
        )
    if weight.shape[1] > MAX_K:
        raise RewriteError(
            f"W8A8: expected at most {MAX_K} input features (int32 sums), found {weight.shape[1]}"
        )
    codes, scale = quantize_rows(weight.detach())
    if not torch.isfinite(scale).all():
        raise RewriteError("W8A8: expected finite weights, found a NaN or an infinity")
    return codes, scale[:, 0]


@functools.cache
def int_mm_is_exact() -> bool:
    """Ask once whether ``torch._int_mm`` adds without saturating on this machine.

    Instruction sets before VNNI add pairs of products in 16 bits, and overflow on the largest codes.
    """
    a = torch.full((16, 64), 127, dtype=torch.int8)
    pairs = [torch._int_mm(a, b.t()) for b in (a, -a)]
    return all(bool((p == sign * 64 * 127 * 127).all()) for p, sign in zip(pairs, (1, -1), strict=True))


def int_matmul(codes: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``codes @ weight.T`` into ``out``: int8 ``[M, K]``, int8 ``[N, K]``, int32 ``[M, N]``; exact."""
    if codes.shape[1] == 0:
        out.zero_()
    elif not int_mm_is_exact():
        out.zero_()
        for a, w in zip(torch.split(codes, _EXACT_K, 1), torch.split(weight, _EXACT_K, 1), strict=True):
            out.add_((a.to(torch.float32) @ w.to(torch.float32).t()).to(torch.int32))
    else:
        # The transpose of a [N, 1] weight has strides (1, 1), which _int_mm misreads (torch 2.13)
        torch._int_mm(codes, weight.t() if weight.shape[1] > 1 else weight.view(1, -1), out=out)


def _check(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    found = f"x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}"
    found += f", scale {tuple(scale.shape)}"
    if x.dtype not in FLOATS or weight.dtype != torch.int8:
        raise UnsupportedError(
            f"attnc::linear_w8a8: expected x float32, bfloat16 or float16 and weight int8, found {found}"
        )
    fits = (
        weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1]
        and scale.shape == weight.shape[:1]
    )
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        found += "" if bias is None else f", bias {tuple(bias.shape)}"
        raise UnsupportedError(
            "attnc::linear_w8a8: expected x [..., K], weight [N, K], scale [N], bias [N] or None, "
            f"found {found}"
        )


@operator(
    "linear_w8a8", "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor", device="cpu"
)
def linear_w8a8(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return ``x @ (weight * weight_scale).T + bias`` ``[..., N]``, with ``x`` rounded to int8 per row.

    ``x`` is ``[..., K]`` float32, bfloat16 or float16, and so is the result; ``weight`` int8 ``[N, K]``;
    ``weight_scale`` float32 ``[N]``; ``bias`` ``[N]`` or None.  Derivatives treat rounding as the identity:
    ``dx = dy @ (weight * weight_scale)``.

    Raises:
        UnsupportedError: other dtypes or shapes; a gradient for ``weight_scale``.
    """
    _check(x, weight, weight_scale, bias)
    n, k = weight.shape
    rows = x.reshape(x.shape[:-1].numel(), k)
    codes, scale = quantize_rows(rows)
    y = torch.empty(rows.shape[0], n, dtype=torch.float32)
    sums = y.view(torch.int32)
    if y.numel():
        int_matmul(codes, weight.contiguous(), sums)
    y.copy_(sums).mul_(scale)  # same memory, same element size: converts in place
    if bias is None:
        y.mul_(weight_scale)
    else:
        torch.addcmul(bias.to(torch.float32), y, weight_scale.to(torch.float32), out=y)
    return y.view(*x.shape[:-1], n).to(x.dtype)


@linear_w8a8.register_fake
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    _check(x, weight, weight_scale, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Linear(Node):
    """``linear_w8a8`` in a graph."""

    @staticmethod
    def forward(below: Below, *args: Any) -> torch.Tensor:
        found: torch.Tensor = below(*args)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, x, weight, scale, bias = inputs
        ctx.save_for_backward(weight, scale)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, needs_x, _, needs_scale, needs_bias = ctx.needs_input_grad
        if needs_scale:
            _refuse_scale()
        weight, scale = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        dx = db = None
        if needs_x:
            dx = ((dy.to(torch.float32) * scale) @ weight.to(torch.float32)).to(x_dtype)
        if needs_bias:
            sums = dy.to(torch.float32).flatten(0, -2).sum(0) if dy.dim() > 1 else dy
            db = sums.to(bias_dtype)
        return None, dx, None, None, db


def _refuse_scale() -> NoReturn:
    raise UnsupportedError(
        "attnc::linear_w8a8: expected a weight_scale that is not differentiated; scales have no gradient"
    )


@linear_w8a8.register_autograd
def _autograd(
    below: Below, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    tx, tb = tangent_of(x), tangent_of(bias)
    if tangent_of(scale) is not None:
        _refuse_scale()
    if tx is not None or tb is not None:
        bare = bias if bias is None or tb is None else without_tangent(bias)
        y = linear_w8a8(without_tangent(x), weight, scale, bare)
        ty = torch.zeros_like(y) if tb is None else tb.expand_as(y)
        if tx is not None:
            ty = ty + (tx.to(torch.float32) @ weight.to(torch.float32).t() * scale).to(y.dtype)
        return with_tangent(y, ty.to(y.dtype))
    recorded = is_recorded(x, scale, bias)
    found: torch.Tensor
    found = record(_Linear, below, x, weight, scale, bias) if recorded else below(x, weight, scale, bias)
    return found


linear_w8a8.register_vmap_loop()


class W8A8Linear(nn.Module):
    """A linear layer ``[..., K] -> [..., N]`` that holds int8 weights and computes with int8 activations.

    ``weight`` is an int8 parameter ``[N, K]`` (no gradient), ``weight_scale`` a float32 buffer ``[N]`` that
    stays float32 under ``.to(dtype)``, ``bias`` a float parameter ``[N]`` or None.  The keys of
    ``state_dict`` are those names.  A new layer holds zeros: use ``from_linear``, or load a state dict.
    """

    weight: nn.Parameter
    weight_scale: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros; ``dtype`` is the bias's.

        Raises:
            RewriteError: more input features than an int32 sum holds.
        """
        super().__init__()
        if in_features > MAX_K:
            raise RewriteError(
                f"W8A8: expected at most {MAX_K} input features (int32 sums), found {in_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.zeros(out_features, device=device, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> W8A8Linear:
        """Quantize ``linear``, which is not changed; its bias is shared, and train mode is kept.

        Raises:
            RewriteError: a weight that is not finite, not float32, bfloat16 or float16, or has no data.
        """
        codes, scale = quantize_weight(linear.weight)
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight, new.weight_scale = nn.Parameter(codes, requires_grad=False), scale
        new.bias = linear.bias
        return new.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., N]`` in ``x``'s dtype."""
        out: torch.Tensor = torch.ops.attnc.linear_w8a8(x, self.weight, self.weight_scale, self.bias)
        return out

    def extra_repr(self) -> str:
        """Return the sizes, as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> W8A8Linear:
        """Move everything, and cast the bias only: rounded scales would be wrong scales."""
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
