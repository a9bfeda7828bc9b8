from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters

from attnc.codegen import ops
from attnc.codegen.flex import flex_attend, probe, repair, runtime
from attnc.ir import AttentionSpec, Bias, Fill, Gain, Operand, Scale, Softcap, Softmax
from attnc.masks import CAUSAL, Band, Dense, Full, Mask, Not, Or, Padding, Range, both

H, HKV, D, DV = 4, 2, 16, 12
FULL, HARD, SOFTMAX = Full(), Fill(), Softmax()
LOWEST = torch.finfo(torch.float32).min


def operand(name: str, dtype: torch.dtype = torch.float32) -> Operand:
    rows: dict[str, tuple[str, tuple[int | str, ...], torch.dtype]] = {
        "bias": ("bhqk", (1, H, "s", "t"), dtype),
        "gain": ("bhqk", (1, H, 1, 1), dtype),
        "keep": ("bk", ("b", "t"), torch.bool),
        "dense": ("bhqk", ("b", 1, "s", "t"), torch.bool),
        "sink": ("h", (H,), dtype),
    }
    return Operand(name, *rows[name])


def make_spec(
    *names: str,
    dtype: torch.dtype = torch.float32,
    scores: tuple[Scale | Softcap | Bias | Gain, ...] = (Scale(0.25),),
    mask: Mask = FULL,
    fill: Fill = HARD,
    norm: Softmax = SOFTMAX,
) -> AttentionSpec:
    q = Operand("q", "bhqd", ("b", H, "s", D), dtype)
    k, v = (Operand(n, a, ("b", HKV, "t", d), dtype) for n, a, d in (("k", "bhkd", D), ("v", "bhke", DV)))
    captured = tuple(operand(n) for n in names)
    return AttentionSpec(q, k, v, H // HKV, scores, mask, fill, norm, captured)


PADDED = both(CAUSAL, Padding("keep"))
WINDOW = Or((Band(20, 0), Range("k", 0, 3)))

CASES: dict[str, AttentionSpec] = {
    "plain": make_spec(),
    "causal": make_spec(mask=CAUSAL),
    "causal-end": make_spec(mask=Band(None, 0, "end")),
    "window": make_spec(mask=both(CAUSAL, WINDOW)),
    "window-both-ways-end": make_spec(mask=Band(9, 5, "end")),
    "queries-and-not": make_spec(mask=both(Not(Band(3, -1)), Not(Range("q", 0, 2)))),
    "softcap": make_spec(scores=(Scale(0.5), Scale(0.5), Softcap(2.0)), mask=CAUSAL),
    "gain-late-scale": make_spec("gain", scores=(Gain("gain"), Softcap(3.0), Scale(0.7)), mask=CAUSAL),
    "dense-safe": make_spec("dense", mask=Dense("dense"), norm=Softmax(safe=True)),
    "padding-nan": make_spec("keep", mask=PADDED),
    "padding-safe": make_spec("keep", mask=PADDED, norm=Softmax(safe=True)),
    "padding-lowest": make_spec("keep", mask=PADDED, fill=Fill(LOWEST)),
    "padding-added": make_spec("keep", mask=PADDED, fill=Fill(-1e4, "add")),
    "padding-soft": make_spec("keep", mask=PADDED, fill=Fill(-2.0, "add")),
    "padding-soft-sink": make_spec("keep", mask=PADDED, fill=Fill(-2.0), norm=Softmax(1.0)),
    "bias": make_spec("bias", scores=(Scale(0.25), Bias("bias", -1))),
    "bias-lowest": make_spec("bias", "keep", scores=(Bias("bias"),), mask=PADDED, fill=Fill(LOWEST)),
    "sink": make_spec("sink", "keep", mask=PADDED, norm=Softmax("sink")),
    "sink-bias": make_spec("bias", scores=(Bias("bias"),), norm=Softmax(0.0)),
    "sink-window-end": make_spec("sink", mask=Band(9, 0, "end"), norm=Softmax("sink")),
}


def make_call(
    spec: AttentionSpec, b: int, sq: int, sk: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return q, k, v and captured tensors; the last batch elements are padded on the left, ever more."""
    g = torch.Generator().manual_seed(seed)
    d, dv = spec.q.shape[3], spec.v.shape[3]
    assert isinstance(d, int)
    assert isinstance(dv, int)
    q = torch.randn(b, sq, H, d, generator=g).transpose(1, 2)
    k, v = (torch.randn(b, HKV, sk, n, generator=g) for n in (d, dv))
    bias = torch.randn(1, H, sq, sk, generator=g)
    bias[0, 1, sq // 2 : sq // 2 + 1] = LOWEST if math.isfinite(spec.fill.value) else -math.inf
    made = {
        "bias": bias,
        "gain": torch.rand(1, H, 1, 1, generator=g) + 0.5,
        "keep": torch.arange(sk) >= torch.arange(b)[:, None] * (sk // (2 * b)),
        "dense": torch.rand(b, 1, sq, sk, generator=g) > 0.5,
        "sink": torch.randn(H, generator=g),
    }
    made["dense"][:, :, sq // 3 : sq // 3 + 1] = False
    return q.to(dtype), k.to(dtype), v.to(dtype), [made[o.name] for o in spec.captured]


def bound(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exp: float = 0.0) -> float:
    """Return how far an fp32 computation may be from the exact output.

    A score is a sum of D products, each step rounds once, and a relative error of a weight is the absolute
    error of its score; the sums over Sk keys then round again.  A fill that is added rounds the scores of an
    empty row to its own grid, unless it swallows them.  ``exp`` is the relative error of the exponential.
    """
    eps = torch.finfo(torch.float32).eps
    score = float(q.abs().max() * k.abs().max()) * q.shape[3] * abs(spec.scale) + 8.0
    if spec.fill.how == "add" and spec.fill.value > -1e6:
        score += abs(spec.fill.value)
    return float(v.abs().max()) * (eps * (2 * score * (1 + len(spec.scores)) + k.shape[2]) + 2 * exp)


EXP_U20 = 2.0**-19
"""The relative error of the exponential in the C++ template, which computes it to 20 bits."""


def agrees(found: torch.Tensor, spec: AttentionSpec, q, k, v, captured, exp: float = 0.0) -> None:
    """Compare with the spec executed in fp64; NaN stands where NaN stands."""
    exact, _ = spec(q.double(), k.double(), v.double(), tuple(captured))
    torch.testing.assert_close(found.double(), exact, atol=bound(spec, q, k, v, exp), rtol=0, equal_nan=True)


@pytest.fixture
def uncompiled(monkeypatch):
    """Run flex without a compiler: it then makes all scores, which is slow and right."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(runtime, "_call", lambda made, *inputs: made.attend(*inputs))


@pytest.mark.parametrize(
    ("name", "sink"),
    [(n, way) for n, s in CASES.items() for way in ("key", "lse") if way == "key" or s.norm.sink is not None],
)
def test_flex_means_what_the_spec_means(name, sink, uncompiled):
    spec = CASES[name]
    for b, sq, sk in ((3, 70, 70), (1, 64, 66), (2, 5, 130)):
        q, k, v, captured = make_call(spec, b, sq, sk)
        out = runtime.run(spec, str(spec), q, k, v, captured, sink)
        agrees(out, spec, q, k, v, captured)


def test_rows_without_a_key_are_among_the_cases():
    found = {}
    for name in ("padding-nan", "padding-lowest", "dense-safe", "bias", "causal-end"):
        spec = CASES[name]
        q, k, v, captured = make_call(spec, 2, 70, 66)
        out, _ = spec(q, k, v, tuple(captured))
        found[name] = bool(out.isnan().any()), bool((out == 0).all(-1).any())
    assert found == {
        "padding-nan": (True, False),
        "padding-lowest": (False, False),
        "dense-safe": (False, True),
        "bias": (True, False),
        "causal-end": (True, False),
    }


def test_a_zero_output_of_a_row_that_sees_keys_stays_zero(uncompiled):
    spec = CASES["padding-lowest"]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    v[0, :, :10] = 0.0
    agrees(runtime.run(spec, str(spec), q, k, v, captured), spec, q, k, v, captured)


def test_repair_works_in_chunks(uncompiled, monkeypatch):
    monkeypatch.setattr(repair, "CHUNK", 2 * H * 70)
    spec = CASES["padding-added"]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    agrees(runtime.run(spec, str(spec), q, k, v, captured), spec, q, k, v, captured)


def test_half_precision_is_as_near_as_its_rounding(uncompiled):
    spec = make_spec("bias", "sink", scores=(Scale(0.25), Bias("bias")), mask=CAUSAL, norm=Softmax("sink"))
    q, k, v, captured = make_call(spec, 2, 70, 70)
    captured[0].clamp_(min=-5.0)
    halves = [x.bfloat16() for x in (q, k, v)]
    spec = make_spec("bias", "sink", dtype=torch.bfloat16, scores=spec.scores, mask=spec.mask, norm=spec.norm)
    out = runtime.run(spec, str(spec), *halves, captured)
    exact, _ = spec(*(x.double() for x in halves), tuple(captured))
    assert out.dtype == torch.bfloat16
    # weights and the output are rounded to bf16 once each, and the weights of a row sum to at most 1
    assert float((out.double() - exact).abs().max()) <= 2 * torch.finfo(torch.bfloat16).eps * float(
        v.abs().max()
    )


@pytest.mark.parametrize(
    ("axes", "shape", "own_key", "wanted"),
    [
        ("bk", (3, 300), False, (8, 2048)),
        ("bk", (1, 300), False, (1, 2048)),
        ("bk", (9, 2048), True, (16, 4096)),
        ("h", (5,), True, (5,)),
        ("bhqk", (1, 4, 300, 300), False, (1, 4, 320, 320)),
        ("bhqk", (3, 4, 520, 1), False, (8, 4, 2048, 1)),
        ("bhqk", (7, 1, 100, 128), True, (7, 1, 128, 160)),
        ("bhqk", (), False, ()),
    ],
)
def test_captured_tensors_come_in_few_sizes_and_keep_their_values(axes, shape, own_key, wanted):
    x = torch.randn(shape)
    out = runtime._padded(x, axes, own_key)
    assert tuple(out.shape) == wanted
    assert torch.equal(out[tuple(slice(n) for n in shape)], x)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 129, 1000, 65537])
def test_buckets_are_never_smaller_and_at_most_a_quarter_larger(n):
    assert n <= runtime.bucket(n, 4) <= max(1.25 * n, n)
    assert n <= runtime.bucket(n) < 2 * n or n == runtime.bucket(n) == 1
    assert len({runtime.bucket(i, 4) for i in range(1025, 2049)}) == 4


def test_one_function_serves_all_lengths(uncompiled):
    spec = CASES["padding-nan"]
    runtime.program.cache_clear()
    for b, sq, sk in ((2, 70, 70), (3, 20, 300), (8, 65, 2048)):
        q, k, v, captured = make_call(spec, b, sq, sk)
        runtime.run(spec, str(spec), q, k, v, captured)
    assert runtime.program.cache_info().currsize == 1


def test_what_flex_has_not_runs_as_the_spec(monkeypatch):
    monkeypatch.setattr(runtime, "run", None)
    spec = CASES["padding-lowest"]
    for sq, dtype in ((1, torch.float32), (7, torch.float64), (0, torch.float32)):
        q, k, v, captured = make_call(spec, 2, sq, 7, dtype)
        out = runtime.flex_attend(q, k, v, captured, str(spec))
        torch.testing.assert_close(out, ops.execute(spec, q, k, v, captured)[0])
    q, k, v, captured = make_call(spec, 2, 7, 7)
    q.requires_grad_()
    runtime.flex_attend(q, k, v, captured, str(spec)).sum().backward()
    assert q.grad is not None


def test_a_captured_tensor_that_is_too_short_never_reaches_the_kernel(monkeypatch):
    monkeypatch.setattr(runtime, "run", None)
    spec = CASES["padding-lowest"]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    with pytest.raises(RuntimeError, match="must match"):
        runtime.flex_attend(q, k, v, [captured[0][:, :60]], str(spec))
    with pytest.raises(ValueError, match="expected 1 captured tensors, found 0"):
        runtime.flex_attend(q, k, v, [], str(spec))


def test_a_kernel_that_does_not_compile_is_told_once_and_the_spec_runs(monkeypatch, caplog):
    from torch._dynamo.exc import Unsupported

    def broken(*args):
        raise Unsupported("no compiler today")

    monkeypatch.setattr(torch, "compile", lambda fn, **kw: broken)
    runtime.program.cache_clear()
    spec = CASES["causal"]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    for _ in range(2):
        agrees(flex_attend(q, k, v, captured, str(spec)), spec, q, k, v, captured)
    runtime.program.cache_clear()
    (line,) = told(caplog)
    assert "no compiler today" in line
    assert "def score_mod" in line


def test_the_operator_is_sound(monkeypatch):
    monkeypatch.setattr(runtime, "run", lambda *args: None)  # the checks' modes reach into uncompiled flex
    spec = CASES["padding-lowest"]
    q, k, v, captured = make_call(spec, 2, 20, 20)
    args = (*(x.requires_grad_() for x in (q, k, v)), captured, str(spec))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.attnc.flex_attend.default, args, test_utils=checks)


def test_merging_the_heads_of_the_output_copies_nothing(uncompiled):
    spec = CASES["causal"]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    out = flex_attend(q, k, v, captured, str(spec))
    merged = out.transpose(1, 2).reshape(2, 70, H * DV)
    assert merged.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("name", ["padding-lowest", "sink", "bias-lowest", "gain-late-scale"])
def test_gradients_are_those_of_the_spec(name, uncompiled):
    spec = CASES[name]
    q, k, v, captured = make_call(spec, 2, 70, 70)
    captured = [x.clamp(min=-5.0) if x.dim() == 4 else x for x in captured]
    mine, exact = ([x.clone() for x in (q, k, v, *captured)] for _ in range(2))
    for tensors in (mine, exact):
        for x in tensors:
            x.requires_grad_(x.is_floating_point())
    weight = torch.randn(2, H, 70, DV)
    (flex_attend(*mine[:3], mine[3:], str(spec)) * weight).sum().backward()
    (spec(*exact[:3], tuple(exact[3:]))[0] * weight).sum().backward()
    for a, b in zip(mine, exact, strict=True):
        if b.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(b.grad.abs().max()))


def test_tangents_are_those_of_the_spec(uncompiled):
    spec = CASES["causal"]
    q, k, v, captured = make_call(spec, 2, 20, 20)
    direction = tuple(torch.randn_like(x) for x in (q, k, v))
    found = torch.func.jvp(lambda *x: flex_attend(*x, captured, str(spec)), (q, k, v), direction)
    wanted = torch.func.jvp(lambda *x: spec(*x, tuple(captured))[0], (q, k, v), direction)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_outer_compile_sees_one_node(uncompiled):
    spec = CASES["padding-nan"]
    text, graphs = str(spec), []

    def keep(gm, example):
        graphs.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        return gm

    @torch.compile(backend=keep, fullgraph=True)
    def model(q, k, v, captured):
        return flex_attend(q * 1.0, k, v, captured, text).transpose(1, 2).flatten(2)

    q, k, v, captured = make_call(spec, 2, 70, 70)
    out = model(q, k, v, captured).unflatten(2, (H, DV)).transpose(1, 2)
    agrees(out, spec, q, k, v, captured)
    assert graphs[0].count(torch.ops.attnc.flex_attend.default) == 1


def test_the_operator_maps_over_an_axis(uncompiled):
    spec = CASES["padding-lowest"]
    calls = [make_call(spec, 2, 20, 20, seed=i) for i in range(3)]
    q, k, v = (torch.stack([c[i] for c in calls]) for i in range(3))
    keep = calls[0][3]
    out = torch.func.vmap(lambda q, k, v: flex_attend(q, k, v, keep, str(spec)))(q, k, v)
    for i in range(3):
        agrees(out[i], spec, *calls[i][:3], keep)


def told(caplog) -> list[str]:
    """Return what attnc has logged; torch's own traces are no concern of ours."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("attnc")]


def needs_compiler() -> None:
    why = probe.why_not("cpu")
    if why:
        pytest.skip(why)


def test_compiled_flex_is_exact_and_compiles_once_for_all_lengths(caplog):
    needs_compiler()
    spec = CASES["padding-lowest"]
    runtime.program.cache_clear()
    before = counters["stats"]["unique_graphs"]
    for b, sq, sk in ((3, 300, 300), (2, 50, 200), (5, 700, 700)):
        q, k, v, captured = make_call(spec, b, sq, sk)
        agrees(flex_attend(q, k, v, captured, str(spec)), spec, q, k, v, captured, EXP_U20)
    assert counters["stats"]["unique_graphs"] == before + 1
    assert not told(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_exact_when_compiled(name, caplog):
    needs_compiler()
    spec = CASES[name]
    for b, sq, sk in ((3, 300, 300), (2, 130, 200), (1, 64, 64), (2, 500, 64)):
        q, k, v, captured = make_call(spec, b, sq, sk)
        agrees(flex_attend(q, k, v, captured, str(spec)), spec, q, k, v, captured, EXP_U20)
    assert not told(caplog)
