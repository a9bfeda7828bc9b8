from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from attnc.codegen.dropout import keep
from attnc.codegen.lower import lower
from attnc.codegen.ops import execute
from attnc.errors import UnsupportedError
from attnc.ir import (
    AttentionSpec,
    Bias,
    Elementwise,
    Fill,
    Gain,
    Normalized,
    Operand,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
)
from attnc.masks import CAUSAL, Band, Dense, Full, Mask, Padding, both

B, H, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 8, 6
MIN = torch.finfo(torch.float32).min
SEED = torch.tensor([2**40 + 11])


SCALED = (Scale(0.35),)
NONE = Full()


def make_spec(
    dtype: torch.dtype = torch.float64, *, scores=SCALED, mask: Mask = NONE, **rest
) -> AttentionSpec:
    group = rest.pop("group", 2)
    q = Operand("q", "bhqd", ("b", HKV * group, "s", D), dtype)
    k, v = (Operand(n, a, ("b", HKV, "t", d), dtype) for n, a, d in (("k", "bhkd", D), ("v", "bhke", DV)))
    return AttentionSpec(q, k, v, group, scores, mask, **rest)


def capture(
    *, bias=False, gain=False, pad=False, dense=False, sink=False, dtype=torch.float64
) -> tuple[Operand, ...]:
    rows = (
        (bias, "bias", "bhqk", (1, H, "s", "t"), dtype),
        (gain, "gain", "bhqk", (1, H, 1, 1), dtype),
        (pad, "pad", "bk", ("b", "t"), torch.bool),
        (dense, "dense", "bhqk", ("b", 1, "s", "t"), torch.bool),
        (sink, "sink", "h", (H,), dtype),
    )
    return tuple(Operand(*row[1:]) for row in rows if row[0])


CASES = {
    "plain": make_spec(),
    "ungrouped": make_spec(group=1),
    "causal": make_spec(mask=CAUSAL),
    "window-end": make_spec(mask=Band(2, 0, "end"), fill=Fill(MIN)),
    "padding": make_spec(
        mask=both(CAUSAL, Padding("pad")), fill=Fill(-1e4, "add"), captured=capture(pad=True)
    ),
    "softcap-bias": make_spec(
        scores=(Scale(0.3), Softcap(2.0), Bias("bias", -1)), captured=capture(bias=True)
    ),
    "gain-dense-safe": make_spec(
        scores=(Gain("gain"),),
        mask=Dense("dense"),
        norm=Softmax(safe=True),
        captured=capture(gain=True, dense=True),
    ),
    "pointwise": make_spec(
        scores=(Scale(0.3), Pointwise("where(dense,(s*sigmoid(bias)),(cos(s)+h))"), Pointwise("abs(s)")),
        captured=capture(bias=True, dense=True),
    ),
    "rounded": make_spec(mask=CAUSAL, norm=RoundedSoftmax()),
    "signed": make_spec(mask=CAUSAL, norm=SignedSoftmax()),
    "elementwise": make_spec(mask=CAUSAL, norm=Elementwise("(square(relu(s))/7.0)")),
    "normalized": make_spec(mask=CAUSAL, norm=Normalized("where((s==-inf),0.0,((1.0+s)+(square(s)/2.0)))")),
    "normalized-bounded": make_spec(mask=CAUSAL, norm=Normalized("relu(s)", added=0.01, least=0.5)),
    "sink": make_spec(mask=CAUSAL, norm=Softmax(sink="sink"), captured=capture(sink=True)),
    "sink-number": make_spec(norm=Softmax(sink=0.0)),
}


def draw(spec: AttentionSpec, *, seed: int = 0, grad: bool = False, b: int = B, sq: int = SQ, sk: int = SK):
    g = torch.Generator().manual_seed(seed)
    h, dtype = HKV * spec.group_size, spec.q.dtype
    shapes = [(b, h, sq, D), (b, HKV, sk, D), (b, HKV, sk, DV)]
    q, k, v = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes
    )
    sizes = {"b": b, "s": sq, "t": sk}
    captured = []
    for o in spec.captured:
        shape = tuple(sizes.get(d, d) for d in o.shape)
        if o.dtype == torch.bool:
            x = torch.rand(shape, generator=g) < 0.7
            x[0] = False  # a whole batch entry, or whole rows, see nothing
        else:
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(o.dtype).requires_grad_(grad)
        captured.append(x)
    return q, k, v, captured


def op(spec: AttentionSpec, q, k, v, captured):
    return torch.ops.attnc.attend(q, k, v, captured, str(spec))


@pytest.mark.parametrize("name", CASES)
def test_attend_is_the_executed_spec(name: str) -> None:
    spec = CASES[name]
    q, k, v, captured = draw(spec)
    for got, want in zip(op(spec, q, k, v, captured), spec(q, k, v, tuple(captured)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_executed_spec(name: str) -> None:
    norm = CASES[name].norm
    unsafe = dataclasses.replace(norm, safe=False) if isinstance(norm, Softmax) else norm
    spec = dataclasses.replace(CASES[name], norm=unsafe)
    runs = []
    for run in (op, lambda s, q, k, v, c: s(q, k, v, tuple(c))):
        q, k, v, captured = draw(spec, grad=True)
        captured = [c | True if c.dtype == torch.bool and "dense" in str(spec.mask) else c for c in captured]
        out, lse = run(spec, q, k, v, captured)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
        ((out * weight).sum() + (lse * weight[..., 0]).sum()).backward()
        runs.append([x.grad for x in (q, k, v, *captured) if x.dtype != torch.bool])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", ["causal", "softcap-bias", "sink", "normalized", "normalized-bounded"])
def test_gradcheck_in_fp64(name: str) -> None:
    spec = CASES[name]
    q, k, v, captured = draw(spec, grad=True, b=1, sq=2, sk=3)
    captured = [c[:, :, :2, :3].detach().requires_grad_() if c.dim() == 4 else c for c in captured]
    assert torch.autograd.gradcheck(lambda *x: op(spec, *x[:3], list(x[3:])), (q, k, v, *captured))


def test_a_safe_row_without_keys_has_zero_output_and_zero_gradients() -> None:
    spec = make_spec(mask=Padding("pad"), norm=Softmax(safe=True), captured=capture(pad=True))
    q, k, v, captured = draw(spec, grad=True)
    out, lse = op(spec, q, k, v, captured)
    out.sum().backward()
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all()


def test_a_row_of_finite_fills_spreads_over_all_keys_forward_and_backward() -> None:
    spec = make_spec(torch.float32, mask=Padding("pad"), fill=Fill(MIN), captured=capture(pad=True))
    q, k, v, captured = draw(spec, grad=True)
    out, _ = op(spec, q, k, v, captured)
    out[0].sum().backward()
    torch.testing.assert_close(out[0], v[0].mean(1, keepdim=True).repeat_interleave(2, 0).expand(H, SQ, DV))
    torch.testing.assert_close(v.grad[0], torch.full_like(v[0], 2 * SQ / SK))


def test_only_the_inputs_that_need_a_gradient_get_one() -> None:
    spec = CASES["softcap-bias"]
    q, k, v, (bias,) = draw(spec)
    bias.requires_grad_()
    out, _ = op(spec, q, k, v, [bias])
    out.sum().backward()
    assert bias.grad is not None
    assert (q.grad, k.grad, v.grad) == (None, None, None)


def test_grouped_keys_and_values_are_not_expanded() -> None:
    spec = make_spec(torch.float32, group=16, mask=CAUSAL)
    q, k, v, _ = draw(spec, sq=1, sk=512)
    with (
        torch.utils._python_dispatch._disable_current_modes(),
        torch.profiler.profile(profile_memory=True) as seen,
    ):
        execute(spec, q, k, v)
    most = max(e.cpu_memory_usage for e in seen.events())
    # the scores [B, 32, 1, 512] and the mask are the largest things made; expanded keys are D times those
    assert most <= 2 * B * 32 * 512 * 8


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    spec = CASES[name]
    for grad in (False, True):
        q, k, v, captured = draw(spec, grad=grad)
        captured = [c | True if c.dtype == torch.bool else c for c in captured]
        torch.library.opcheck(torch.ops.attnc.attend.default, (q, k, v, captured, str(spec)))


def test_opcheck_of_the_backward() -> None:
    spec = CASES["softcap-bias"]
    q, k, v, captured = draw(spec)
    out, lse = op(spec, q, k, v, captured)
    for dout, dlse in ((out, lse), (out, None), (None, lse)):
        for kept in ((out, lse), (None, None)):
            args = (dout, dlse, q, k, v, captured, *kept, str(spec), [True, False, True, True])
            torch.library.opcheck(torch.ops.attnc.attend_backward.default, args)


def test_lse_is_fp32_for_half_inputs_and_out_keeps_the_dtype() -> None:
    for dtype, want in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        spec = make_spec(dtype)
        out, lse = op(spec, *draw(spec))
        assert (out.dtype, lse.dtype) == (dtype, want)


@pytest.mark.parametrize("name", ["padding", "softcap-bias", "sink", "plain"])
def test_vmap_equals_a_loop(name: str) -> None:
    spec = CASES[name]
    drawn = [draw(spec, seed=s) for s in range(3)]
    q, k, v = (torch.stack([d[i] for d in drawn]) for i in range(3))
    captured = [torch.stack([d[3][i] for d in drawn]) for i in range(len(spec.captured))]
    got = torch.vmap(lambda q, k, v, *c: op(spec, q, k, v, list(c)))(q, k, v, *captured)
    want = [torch.stack(x) for x in zip(*(op(spec, *d) for d in drawn), strict=True)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-13)


def test_vmap_over_the_queries_alone() -> None:
    spec = CASES["padding"]
    _, k, v, captured = draw(spec)
    q = torch.stack([draw(spec, seed=s)[0] for s in range(3)], dim=2)
    got, _ = torch.vmap(lambda q: op(spec, q, k, v, captured), in_dims=2, out_dims=1)(q)
    for i in range(3):
        torch.testing.assert_close(
            got[:, i], op(spec, q.select(2, i), k, v, captured)[0], rtol=1e-13, atol=1e-13
        )


def test_exported_program_keeps_the_op_and_its_dynamic_sizes() -> None:
    spec = CASES["causal"]

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return op(spec, q, k, v, [])[0]

    q, k, v, _ = draw(spec)
    dims = {1: None, 3: None, 0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=(dims, dims, dims), strict=False)
    assert [n.target for n in program.graph.nodes].count(torch.ops.attnc.attend.default) == 1
    q, k, v, _ = draw(spec, seed=1, b=3, sq=11, sk=4)
    torch.testing.assert_close(program.module()(q, k, v), op(spec, q, k, v, [])[0], equal_nan=True)


def dropping(name: str) -> AttentionSpec:
    return dataclasses.replace(CASES[name], dropout=0.3)


def dropped(spec: AttentionSpec, q, k, v, captured, seed: torch.Tensor = SEED):
    """Return (out, lse) by plain torch that autograd knows: the weights are what the identity gets."""
    whole = dataclasses.replace(spec, dropout=0.0)
    eye = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], k.shape[2])
    weights, lse = whole(q, k, eye, tuple(captured))
    kept = keep(seed, spec.dropout, weights.shape).to(weights.dtype) / (1 - spec.dropout)
    return weights * kept @ v.repeat_interleave(spec.group_size, 1), lse


def op_with(seed: torch.Tensor):
    return lambda spec, q, k, v, c: torch.ops.attnc.attend(q, k, v, c, str(spec), seed)


@pytest.mark.parametrize("name", CASES)
def test_dropout_drops_weights_and_their_gradients(name: str) -> None:
    spec = dropping(name)
    runs = []
    for run in (op_with(SEED), dropped):
        q, k, v, captured = draw(spec, grad=True)
        captured = [c | True if c.dtype == torch.bool else c for c in captured]
        out, lse = run(spec, q, k, v, captured)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
        ((out * weight).sum() + (lse * weight[..., 0]).sum()).backward()
        runs.append([out, lse, *(x.grad for x in (q, k, v, *captured) if x.dtype != torch.bool)])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert not torch.equal(runs[0][0], CASES[name](q, k, v, tuple(captured))[0])


@pytest.mark.parametrize("name", ["causal", "softcap-bias", "sink", "normalized", "signed"])
def test_dropout_in_every_mode_is_that_of_plain_torch(name: str) -> None:
    spec = dropping(name)
    q, k, v, captured = draw(spec, b=1, sq=2, sk=3)
    captured = [c[:, :, :2, :3] if c.dim() == 4 else c for c in captured]
    x = (q, k, v, *captured)
    t = tuple(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype) for y in x)

    def tangents(run, *x):
        (out, lse), (tout, tlse) = torch.func.jvp(lambda *x: run(spec, *x[:3], list(x[3:])), x, t)
        return torch.cat([y.flatten() for y in (out, lse, tout, tlse)])

    def gradients(run, *x):
        out, lse = run(spec, *x[:3], list(x[3:]))
        loss = (out.square().sum() + lse.square().sum()).sin()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, x, create_graph=True)])

    for f in (tangents, gradients):
        results = []
        for run in (op_with(SEED), dropped):
            leaves = tuple(y.detach().requires_grad_() for y in x)
            found = f(run, *leaves)
            second = torch.autograd.grad(found.square().sum(), leaves)
            results.append([found, *second])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_dropout_is_a_function_of_its_seed() -> None:
    spec = dropping("plain")
    given = draw(spec)
    first, again, other = (op_with(torch.tensor([s]))(spec, *given)[0] for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_opcheck_with_a_seed() -> None:
    spec = dropping("softcap-bias")
    for grad in (False, True):
        q, k, v, captured = draw(spec, grad=grad)
        torch.library.opcheck(torch.ops.attnc.attend.default, (q, k, v, captured, str(spec), SEED))
    q, k, v, captured = draw(spec)
    out, lse = op_with(SEED)(spec, q, k, v, captured)
    args = (out, lse, q, k, v, captured, out, lse, str(spec), [True, False, True, True], SEED)
    torch.library.opcheck(torch.ops.attnc.attend_backward.default, args)
    given = (q, k, v, captured, [q, v], [True, False, True, False], str(spec))
    torch.library.opcheck(torch.ops.attnc.attend_tangent.default, (*given, SEED))
    results = torch.ops.attnc.attend_tangent(*given, SEED)
    args = (*results, *given[:-1], *results, str(spec), [True] * 8, SEED)
    torch.library.opcheck(torch.ops.attnc.attend_tangent_backward.default, args)


def test_vmap_with_dropout_equals_a_loop() -> None:
    spec = dropping("padding")
    drawn = [draw(spec, seed=s) for s in range(3)]
    q, k, v = (torch.stack([d[i] for d in drawn]) for i in range(3))
    pad = torch.stack([d[3][0] for d in drawn])
    seeds = torch.arange(3)
    got = torch.vmap(lambda s, q, k, v, p: op_with(s)(spec, q, k, v, [p]))(seeds, q, k, v, pad)
    shared = torch.vmap(lambda q, k, v, p: op_with(SEED)(spec, q, k, v, [p]))(q, k, v, pad)
    for i, d in enumerate(drawn):
        for g, w in zip(got, op_with(seeds[i])(spec, *d), strict=True):
            torch.testing.assert_close(g[i], w, rtol=1e-13, atol=1e-13)
        for g, w in zip(shared, op_with(SEED)(spec, *d), strict=True):
            torch.testing.assert_close(g[i], w, rtol=1e-13, atol=1e-13)
    # and so are gradients per example
    grad = torch.func.grad(lambda q, s, k, v, p: op_with(s)(spec, q, k, v, [p])[0].square().sum())
    found = torch.vmap(grad)(q, seeds, k, v, pad)
    for i in range(3):
        torch.testing.assert_close(found[i], grad(q[i], seeds[i], k[i], v[i], pad[i]), rtol=1e-12, atol=1e-12)


def test_a_compiled_program_draws_what_eager_does() -> None:
    spec = dropping("causal")
    q, k, v, _ = draw(spec, grad=True)
    text = str(spec)

    def loss(q, k, v, seed):
        return torch.ops.attnc.attend(q, k, v, [], text, seed)[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for seed in (SEED, SEED + 1):
        found, want = (torch.autograd.grad(f(q, k, v, seed), (q, k, v)) for f in (compiled, loss))
        torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)


def test_an_exported_site_with_dropout_stays_an_operator_when_it_is_lowered() -> None:
    text = str(make_spec(torch.float32, dropout=0.3, mask=CAUSAL))

    class Model(torch.nn.Module):
        def forward(self, q, k, v, seed):
            return torch.ops.attnc.attend(q, k, v, [], text, seed)[0]

    tensors = tuple(x.float() for x in draw(make_spec(), sq=6)[:3])
    program = torch.export.export(Model(), (*tensors, SEED), strict=False)
    want = program.module()(*tensors, SEED + 1)
    for portable in (False, True):
        assert lower(program.graph, portable)[0] == {"attend": 1}
    program.graph_module.recompile()
    assert torch.equal(program.module()(*tensors, SEED + 1), want)
    assert not torch.equal(want, program.module()(*tensors, SEED))


def test_dropout_without_a_seed_is_refused() -> None:
    spec = make_spec(dropout=0.1)
    with pytest.raises(UnsupportedError, match=r"expected a seed for the rate 0\.1, found none"):
        op(spec, *draw(spec))


def test_wrong_heads_and_wrong_captured_are_refused() -> None:
    spec = CASES["plain"]
    q, k, v, _ = draw(spec)
    with pytest.raises(ValueError, match=r"expected q \[B, 2 \* Hkv"):
        op(spec, q[:, :3], k, v, [])
    with pytest.raises(ValueError, match="expected 0 captured tensors, found 1"):
        op(spec, q, k, v, [q])
