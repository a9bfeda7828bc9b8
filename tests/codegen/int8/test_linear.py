"""The integer linear op: exact sums, derived bounds, edges, and what PyTorch asks of an op."""

import pytest
import torch
from torch import nn

from attnc.codegen.int8 import W8A8Linear, linear_w8a8
from attnc.codegen.int8 import linear as module
from attnc.errors import RewriteError, UnsupportedError

SIZES = [(1, 1, 1), (1, 64, 3), (3, 1, 5), (5, 7, 1), (17, 33, 65), (32, 384, 96), (64, 1537, 31)]
U = 2.0**-24  # unit roundoff of float32


def make(
    m: int, k: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, W8A8Linear, nn.Linear]:
    g = torch.Generator().manual_seed(m * 10007 + k * 101 + n)
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.normal_(generator=g)
        linear.bias.normal_(generator=g)
    x = torch.randn(m, k, generator=g) * torch.logspace(-3, 3, m)[:, None]  # rows of very different sizes
    return x.to(dtype), W8A8Linear.from_linear(linear), linear


def integers(x: torch.Tensor, layer: W8A8Linear) -> torch.Tensor:
    """The plain-integer reference: int64 sums, scaled in float32 in the op's order."""
    scale = (x.abs().amax(1, keepdim=True).float() * (1 / 127)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (x * scale.reciprocal()).round().to(torch.int64)
    assert codes.abs().max() <= 127
    y = (codes @ layer.weight.to(torch.int64).t()).to(torch.float32) * scale
    return y, codes, scale


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_sums_equal_int64_sums_exactly(m: int, k: int, n: int) -> None:
    x, layer, _ = make(m, k, n)
    y, codes, scale = integers(x, layer)
    assert torch.equal(module.quantize_rows(x)[0].to(torch.int64), codes)
    assert torch.equal(module.quantize_rows(x)[1], scale)
    assert torch.equal(linear_w8a8(x, layer.weight, layer.weight_scale, None), y * layer.weight_scale)
    with_bias = linear_w8a8(x, layer.weight, layer.weight_scale, layer.bias)
    biased = y.double() * layer.weight_scale.double() + layer.bias.double()
    # addcmul may or may not fuse: two roundings, relative to the larger of the two terms
    assert ((with_bias - biased).abs() <= 2 * U * (y * layer.weight_scale).abs() + 2 * U * biased.abs()).all()


@pytest.mark.parametrize("fill", [127, -127])
def test_largest_sums_do_not_saturate_or_overflow(fill: int) -> None:
    k = module.MAX_K
    codes = torch.full((2, k), 127, dtype=torch.int8)
    weight = torch.full((3, k), fill, dtype=torch.int8)
    out = torch.empty(2, 3, dtype=torch.int32)
    module.int_matmul(codes, weight, out)
    assert out.unique().tolist() == [k * 127 * fill]


def test_path_without_exact_int_mm_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "int_mm_is_exact", lambda: False)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (5, 2500), generator=g).to(torch.int8)
    weight = torch.full((4, 2500), 127, dtype=torch.int8)
    out = torch.empty(5, 4, dtype=torch.int32)
    module.int_matmul(codes, weight, out)
    assert torch.equal(out.to(torch.int64), codes.long() @ weight.long().t())


def test_machine_is_asked_about_saturation() -> None:
    assert module.int_mm_is_exact() in (True, False)
    assert module.int_mm_is_exact.cache_info().currsize == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elements_are_off_by_at_most_half_a_scale(dtype: torch.dtype) -> None:
    x, layer, linear = make(17, 333, 40, dtype)
    codes, scale = module.quantize_rows(x)
    assert ((x.double() - codes.double() * scale.double()).abs() <= scale.double() / 2 * (1 + 1e-3)).all()
    deq = layer.weight.double() * layer.weight_scale.double()[:, None]
    assert (
        (linear.weight.double() - deq).abs() <= layer.weight_scale.double()[:, None] / 2 * (1 + 1e-3)
    ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_stays_within_the_bound_of_its_scales(dtype: torch.dtype) -> None:
    x, layer, linear = make(16, 257, 48)
    x = (x / x.abs().amax(1, keepdim=True)).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    sx = module.quantize_rows(x)[1].double() * (1 + 1e-3)
    sw = layer.weight_scale.double() * (1 + 1e-3)
    w, xd = linear.weight.double(), x.double()
    k = w.shape[1]
    bound = sx / 2 * w.abs().sum(1) + sw / 2 * xd.abs().sum(1, keepdim=True) + k * sx * sw / 4
    want = xd @ w.t() + linear.bias.double()
    rounding = torch.finfo(dtype).eps * (want.abs() + bound)
    assert ((got.double() - want).abs() <= bound + rounding).all()
    assert (got.double() - want).abs().max() > 0  # it is quantized: exact equality would mean it did not run


def test_zero_and_tiny_rows() -> None:
    _, layer, _ = make(1, 8, 4)
    x = torch.zeros(3, 8)
    x[1] = 1e-42  # subnormal: far below the least scale, so it may round to zero
    x[2, 0] = 1e-30
    y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert torch.isfinite(y).all()
    codes, scale = module.quantize_rows(x)
    assert codes[:, 0].tolist() == [0, 0, 127]
    assert torch.isfinite(scale.reciprocal()).all()
    assert ((x - codes * scale).abs() <= scale / 2 * (1 + 1e-3)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_others_do_not(bad: float) -> None:
    x, layer, _ = make(4, 16, 5)
    clean = layer(x)
    x[2, 3] = bad
    y = layer(x)
    assert y[2].isnan().all()
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,), (2, 3, 6), (1, 1, 1, 6)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    _, layer, _ = make(1, 6, 5)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    if x.numel():
        assert torch.equal(y.reshape(-1, 5), layer(x.reshape(-1, 6)))


def test_no_input_features_leaves_the_bias() -> None:
    empty = torch.zeros(4, 0, dtype=torch.int8)
    y = linear_w8a8(torch.zeros(3, 0), empty, torch.ones(4), torch.arange(4.0))
    assert torch.equal(y, torch.arange(4.0).expand(3, 4))


def test_non_contiguous_input_and_weight() -> None:
    x, layer, _ = make(6, 10, 7)
    loose = torch.empty(7, 20, dtype=torch.int8)[:, ::2].copy_(layer.weight)
    tall = x.t().contiguous().t()
    assert torch.equal(linear_w8a8(tall, loose, layer.weight_scale, layer.bias), layer(x))


def test_gradient_is_that_of_the_dequantized_layer() -> None:
    x, layer, _ = make(6, 33, 9)
    x = x.view(2, 3, 33).requires_grad_()
    dy = torch.randn(2, 3, 9)
    layer(x).backward(dy)
    w = (layer.weight.float() * layer.weight_scale[:, None]).double()
    want = dy.double() @ w
    # a dot product of 9 terms in float32, each term rounded twice before it
    assert ((x.grad - want).abs() <= 12 * U * (dy.double().abs() @ w.abs())).all()
    assert torch.allclose(layer.bias.grad, dy.sum((0, 1)), rtol=0, atol=6 * U * dy.abs().sum().item())
    assert layer.weight.grad is None


def test_gradient_for_a_vector_and_for_bfloat16() -> None:
    _, layer, _ = make(1, 8, 4)
    x = torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.bias.grad.dtype == torch.float32


def test_gradient_for_the_scale_is_refused() -> None:
    x, layer, _ = make(2, 8, 4)
    scale = layer.weight_scale.clone().requires_grad_()
    y = linear_w8a8(x, layer.weight, scale, None)
    with pytest.raises(UnsupportedError, match="scales have no gradient"):
        y.sum().backward()


def test_tangent_is_that_of_the_dequantized_layer() -> None:
    x, layer, _ = make(6, 33, 9)
    point, direction = (x.view(2, 3, 33), layer.bias.detach()), (torch.randn(2, 3, 33), torch.randn(9))
    w = (layer.weight.float() * layer.weight_scale[:, None]).double()

    def ours(x, bias):
        return linear_w8a8(x, layer.weight, layer.weight_scale, bias)

    y, ty = torch.func.jvp(ours, point, direction)
    assert torch.equal(y, ours(*point))
    want = direction[0].double() @ w.t() + direction[1]
    # a dot product of 33 terms in float32, each term rounded twice before it, and a sum
    size = direction[0].double().abs() @ w.abs().t() + direction[1].abs()
    assert ((ty - want).abs() <= 37 * U * size).all()
    _, of_bias = torch.func.jvp(lambda b: ours(point[0], b), point[1:], direction[1:])
    assert torch.equal(of_bias, direction[1].expand(2, 3, 9))
    assert torch.func.jacfwd(lambda b: ours(point[0], b))(point[1]).shape == (2, 3, 9, 9)
    gradient = torch.func.grad(
        lambda x: torch.func.jvp(lambda x: ours(x, None).square(), (x,), (x,))[1].sum()
    )
    assert gradient(point[0]).abs().sum() > 0


def test_tangent_of_the_scale_is_refused() -> None:
    x, layer, _ = make(2, 8, 4)
    with pytest.raises(UnsupportedError, match="scales have no gradient"):
        torch.func.jvp(
            lambda s: linear_w8a8(x, layer.weight, s, None), (layer.weight_scale,), (torch.ones(4),)
        )


@pytest.mark.parametrize(
    ("x", "weight", "scale", "bias"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), None),
        (torch.zeros(2, 4), torch.zeros(3, 4), torch.ones(3), None),
        (torch.zeros(2, 5), torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), None),
        (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int8), torch.ones(4), None),
        (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), torch.ones(1)),
    ],
)
def test_wrong_operands_are_named(x, weight, scale, bias) -> None:
    with pytest.raises(UnsupportedError, match="expected x"):
        linear_w8a8(x, weight, scale, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_op_passes_opcheck(bias: bool, grad: bool) -> None:
    x, layer, _ = make(5, 12, 7)
    args = (x.requires_grad_(grad), layer.weight, layer.weight_scale, layer.bias if bias else None)
    torch.library.opcheck(torch.ops.attnc.linear_w8a8.default, args)


def test_export_keeps_one_op_and_its_values_at_another_length() -> None:
    _, layer, _ = make(1, 12, 7)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        layer, (torch.randn(2, 5, 12),), dynamic_shapes=({1: rows},), strict=False
    ).run_decompositions({})
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.attnc.linear_w8a8.default]
    x = torch.randn(2, 9, 12)
    assert torch.equal(program.module()(x), layer(x))


def test_compile_forward_and_backward() -> None:
    x, layer, _ = make(5, 12, 7)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), fast(b)
    assert torch.equal(ya, yb)
    ya.sum().backward()
    yb.sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    linear = nn.Linear(4, 3)
    linear.weight.data[1, 2] = value
    with pytest.raises(RewriteError, match="finite"):
        W8A8Linear.from_linear(linear)


def test_weights_of_other_dtypes_and_meta_are_refused() -> None:
    with pytest.raises(RewriteError, match="float64"):
        W8A8Linear.from_linear(nn.Linear(4, 3, dtype=torch.float64))
    with pytest.raises(RewriteError, match="meta"):
        W8A8Linear.from_linear(nn.Linear(4, 3, device="meta"))
    with pytest.raises(RewriteError, match="input features"):
        W8A8Linear(module.MAX_K + 1, 1)
