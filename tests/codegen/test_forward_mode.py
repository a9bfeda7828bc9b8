"""Forward mode through ``attnc::attend``: tangents, their gradients, and both modes nested."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import attnc.codegen.ops  # noqa: F401  (registers the operators)
from attnc.errors import UnsupportedError
from attnc.ir import AttentionSpec, Softmax
from attnc.printer import parse

LINES = (Path(__file__).parent / "triton" / "corpus.txt").read_text(encoding="utf-8").splitlines()
TEXTS = {n: text for n, _, text in (line.partition(" ") for line in LINES if not line.startswith("#"))}
FLOATS = ("float16", "float32")
SIZES = {"b": 2, "h": 4, "hkv": 4, "s": 5, "t": 7}
SQUARE = ("packed",)
"""Masks over one tensor of tokens, for queries and for keys."""
ALL_KINDS = ("causal", "biases", "softmax_plus_one", "sink_logits", "expression", "sigmoid", "signed")
Function = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Tensors = tuple[torch.Tensor, ...]


def wide(name: str, dtype: str = "float64") -> AttentionSpec:
    """Return a spec of the corpus in another dtype and with narrow heads."""
    text = TEXTS[name]
    for old in FLOATS:
        text = text.replace(f":{old}", f":{dtype}")
    return parse(text)


def draw(spec: AttentionSpec, name: str = "", *, seen: bool = False, **sizes: int) -> list[torch.Tensor]:
    """Draw q, k, v and captured tensors; ``seen``: no query is without a key."""
    g = torch.Generator().manual_seed(7)
    at = {**SIZES, "hkv": SIZES["h"] // spec.group_size, **sizes}
    at["t"] = at["s"] if name in SQUARE else at["t"]
    out = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        shape = [at[d] if isinstance(d, str) else d for d in o.shape]
        if o.dtype == torch.bool:
            x = (torch.rand(shape, generator=g) < 0.6) | seen
            x[..., 0] |= seen
            x[:1, ..., 1:] &= seen  # the first batch entry sees nothing
            x[:1, ..., :1] &= seen
        elif o.dtype.is_floating_point:
            x = torch.randn(shape, generator=g, dtype=torch.float64).to(o.dtype)
        else:
            x = torch.randint(0, 1 if seen else 3, shape, generator=g).to(o.dtype)
        out.append(x)
    return out


def at_floats(f: Function, tensors: list[torch.Tensor]) -> tuple[Function, Tensors]:
    """Return ``f`` as a function of the float tensors alone, and these."""
    places = [i for i, x in enumerate(tensors) if x.is_floating_point()]

    def of_floats(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = list(tensors)
        for i, t in zip(places, x, strict=True):
            every[i] = t
        return f(*every)

    return of_floats, tuple(tensors[i] for i in places)


def operator_of(spec: AttentionSpec) -> Function:
    text = str(spec)
    return lambda *x: torch.ops.attnc.attend(*x[:3], list(x[3:]), text)


def eager_of(spec: AttentionSpec) -> Function:
    return lambda *x: spec(*x[:3], x[3:])


def both(name: str, **options: object) -> tuple[Function, Function, Tensors, Tensors]:
    """Return the operator, the executed spec, a point and a direction, in fp64."""
    spec = wide(name)
    tensors = draw(spec, name, **options)
    ours, point = at_floats(operator_of(spec), tensors)
    eager, _ = at_floats(eager_of(spec), tensors)
    g = torch.Generator().manual_seed(8)
    return ours, eager, point, tuple(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in point)


def assert_close(found: object, wanted: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", TEXTS)
def test_tangents_are_those_of_the_executed_spec(name: str) -> None:
    ours, eager, x, t = both(name)
    (out, lse), (tout, tlse) = torch.func.jvp(ours, x, t)
    want, tangents = torch.func.jvp(eager, x, t)
    assert_close((out, lse), want)
    usual = want[1].abs() < 1e6  # a query that sees a key
    assert_close((tout[usual], tlse[usual]), (tangents[0][usual], tangents[1][usual]))
    assert tout[usual].abs().sum() > 0
    lost = want[1] == -math.inf
    norm = wide(name).norm
    if isinstance(norm, Softmax) and norm.safe:
        assert (tout[lost] == 0).all()


def twice_backwards(f: Function, x: Tensors, t: Tensors) -> tuple[Tensors, Tensors]:
    """Return what ``torch.func.jvp`` does by reverse mode alone: its rules for powers give NaN below zero."""
    found: tuple[Tensors, Tensors] = torch.autograd.functional.jvp(f, x, t, create_graph=True)
    return found


def mixed(f: Function, n: int, jvp: Callable[..., object] = torch.func.jvp) -> Callable[..., torch.Tensor]:
    """Return a scalar that depends on every result of ``f`` and on every tangent, in no linear way."""

    def loss(*x: torch.Tensor) -> torch.Tensor:
        (out, lse), (tout, tlse) = jvp(f, x[:n], x[n:])
        parts = (out.sin().sum(), lse.cos().sum(), (0.3 * tout).cos().sum(), (0.5 * tlse).sin().sum())
        return torch.stack(parts).sum()

    return loss


def gradients(loss: Callable[..., torch.Tensor], x: Tensors) -> Tensors:
    leaves = [y.clone().requires_grad_() for y in x]
    found = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    return tuple(torch.zeros_like(y) if g is None else g for g, y in zip(found, x, strict=True))


@pytest.mark.parametrize("name", TEXTS)
def test_gradients_of_tangents_are_those_of_the_executed_spec(name: str) -> None:
    ours, eager, x, t = both(name, seen=True, s=3, t=5)
    found = gradients(mixed(ours, len(x)), (*x, *t))
    wanted = gradients(mixed(eager, len(x), twice_backwards), (*x, *t))
    for got, want in zip(found, wanted, strict=True):
        assert want.isfinite().all()
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_tangents_are_linear(name: str) -> None:
    ours, _, x, t = both(name, seen=True)
    other = tuple(y.flip(-1) for y in t)

    def along(*t: torch.Tensor) -> Tensors:
        return torch.func.jvp(ours, x, t)[1]

    first, second = along(*t), along(*other)
    joined = along(*(2.0 * a - 3.0 * b for a, b in zip(t, other, strict=True)))
    for a, b, got in zip(first, second, joined, strict=True):
        assert_close(got, 2.0 * a - 3.0 * b, 1e-11)
    for zero in along(*map(torch.zeros_like, x)):
        assert (zero == 0).all()


@pytest.mark.parametrize("name", ALL_KINDS)
def test_the_tangent_of_the_values_alone_is_weighed_as_the_values_are(name: str) -> None:
    ours, _, x, t = both(name, seen=True)
    _, (tout, tlse) = torch.func.jvp(lambda v: ours(*x[:2], v, *x[3:]), (x[2],), (t[2],))
    assert_close(tout, ours(*x[:2], t[2], *x[3:])[0])
    assert (tlse == 0).all()


@pytest.mark.parametrize("name", ALL_KINDS)
def test_forward_and_reverse_mode_are_adjoint(name: str) -> None:
    ours, _, x, t = both(name, seen=True)
    results, pull = torch.func.vjp(ours, *x)
    _, tangents = torch.func.jvp(ours, x, t)
    g = tuple(y.cos() for y in results)
    forward = sum((a * b).sum() for a, b in zip(g, tangents, strict=True))
    backward = sum((a * b).sum() for a, b in zip(pull(g), t, strict=True))
    assert_close(forward, backward)


def test_rows_without_keys_have_zero_tangents_if_safe_and_spread_if_the_fill_is_finite() -> None:
    pad = "attn q=bhqd[b,h,s,8]:float32 k=bhkd[b,hkv,t,8]:float32 v=bhke[b,hkv,t,8]:float32 group=2"
    pad += " scale(0.3) mask=padding(key,pad) fill(replace,{}) {} with pad=bk[b,t]:bool"
    for fill, norm in ((-math.inf, "softmax(safe)"), (-3.4028234663852886e38, "softmax")):
        spec = parse(pad.format(fill, norm))
        q, k, v, keep = draw(spec)
        assert not keep[0].any()
        f, x = at_floats(operator_of(spec), [q, k, v, keep])
        t = tuple(y.flip(-1) for y in x)
        _, (tout, tlse) = torch.func.jvp(f, x, t)
        leaves = [y.clone().requires_grad_() for y in (*x, *t)]
        _, (moved, _) = torch.func.jvp(f, tuple(leaves[:3]), tuple(leaves[3:]))
        moved.sum().backward()
        grads = [y.grad for y in leaves]
        assert all(g is None or g.isfinite().all() for g in grads)
        if norm == "softmax":
            assert_close(tout[0], t[2][0].mean(1, keepdim=True).repeat_interleave(2, 0).expand(4, 5, 8), 1e-6)
            assert_close(grads[5][0], torch.full_like(v[0], 2 * 5 / 7), 1e-5)
        else:
            assert (tout[0] == 0).all()
            assert all((g[0] == 0).all() for g in grads if g is not None)
        assert (tlse[0] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tangents_keep_the_dtypes_of_their_results(dtype: str) -> None:
    spec = wide("causal", dtype)
    x = draw(spec, t=5)
    t = tuple(y.flip(-1) for y in x)
    results, tangents = torch.func.jvp(operator_of(spec), tuple(x), t)
    wanted = torch.func.jvp(eager_of(spec), tuple(y.double() for y in x), tuple(y.double() for y in t))[1]
    for y, got, want in zip(results, tangents, wanted, strict=True):
        assert (got.dtype, got.shape) == (y.dtype, y.shape)
        unit = torch.finfo(y.dtype).eps
        assert (got - want).abs().max() <= 2 * unit * want.abs().max()


def scalar(f: Function) -> Callable[..., torch.Tensor]:
    def value(*x: torch.Tensor) -> torch.Tensor:
        out, lse = f(*x)
        return out.sin().sum() + lse.cos().sum()

    return value


def in_dual_level(f: Function, x: Tensors, t: Tensors) -> Tensors:
    with forward_ad.dual_level():
        results = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)))
        return tuple(forward_ad.unpack_dual(y).tangent for y in results)


def twice(x: Tensors) -> Tensors:
    return tuple(torch.stack([y, y.flip(-1)]) for y in x)


func = torch.func
NESTED: dict[str, Callable[[Function, Tensors, Tensors], object]] = {
    "dual level": lambda f, x, t: in_dual_level(f, x, t) if f.__name__ == "ours" else func.jvp(f, x, t)[1],
    "jacobian forwards": lambda f, x, t: func.jacfwd(f, argnums=(0, 3))(*x),
    "jacobian backwards": lambda f, x, t: func.jacrev(f, argnums=(0, 3))(*x),
    "gradient": lambda f, x, t: func.grad(scalar(f), argnums=(0, 1, 2, 3))(*x),
    "forward over reverse": lambda f, x, t: func.jvp(func.grad(scalar(f), argnums=(0, 1, 2, 3)), x, t),
    "reverse over reverse": lambda f, x, t: func.vjp(func.grad(scalar(f), argnums=(0, 1, 2, 3)), *x)[1](t),
    "reverse over forward": lambda f, x, t: func.grad(mixed(f, 4), argnums=tuple(range(8)))(*x, *t),
    "hessian": lambda f, x, t: func.hessian(scalar(f))(*x),
    "batch of tangents": lambda f, x, t: func.vmap(lambda x, t: func.jvp(f, x, t))(twice(x), twice(t)),
    "tangent of a batch": lambda f, x, t: func.jvp(func.vmap(f), twice(x), twice(t)),
    "without a graph": lambda f, x, t: torch.no_grad()(func.jvp)(f, x, t),
}


@pytest.mark.parametrize("nested", NESTED)
def test_nested_transforms_are_those_of_the_executed_spec(nested: str) -> None:
    spec = parse(
        "attn q=bhqd[b,h,s,3]:float64 k=bhkd[b,hkv,t,3]:float64 v=bhke[b,hkv,t,2]:float64 group=2 scale(0.7)"
        " softcap(2.0) bias(x) mask=causal fill(replace,-inf) softmax with x=bhqk[1,h,s,t]:float64"
    )
    x = tuple(draw(spec, b=1, h=2, hkv=1, s=2, t=3))
    t = tuple(y.flip(-1) for y in x)
    run = NESTED[nested]

    def ours(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return operator_of(spec)(*x)

    assert_close(run(ours, x, t), run(eager_of(spec), x, t), 1e-11)


@pytest.mark.parametrize(("backend", "way"), [("eager", "dual level"), ("aot_eager", "jvp")])
def test_compiled_losses_of_tangents(backend: str, way: str) -> None:
    ours, _, x, t = both("causal", s=3, t=5)
    forward = in_dual_level if way == "dual level" else lambda f, x, t: torch.func.jvp(f, x, t)[1]

    def loss(*x: torch.Tensor) -> torch.Tensor:
        tout, tlse = forward(ours, x[:3], x[3:])
        return tout.sin().sum() + tlse.cos().sum()

    torch.compiler.reset()
    found = gradients(torch.compile(loss, backend=backend, fullgraph=True), (*x, *t))
    assert_close(found, gradients(loss, (*x, *t)))


def test_what_goes_beyond_two_derivatives_is_refused() -> None:
    ours, _, x, t = both("causal", s=2, t=3)
    f = scalar(ours)
    with pytest.raises(UnsupportedError, match="found a tangent of a tangent"):
        torch.func.jvp(lambda *x: torch.func.jvp(f, x, t)[1], x, t)
    _, pull = torch.func.vjp(lambda *x: torch.func.jvp(f, x, t)[1], *x)
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="found a tangent of the gradient of a tangent"):
        torch.func.jvp(pull, (one,), (one,))
    with pytest.raises(UnsupportedError, match="found a gradient of the gradient of a tangent"):
        torch.func.grad(lambda *x: torch.func.grad(lambda *x: torch.func.jvp(f, x, t)[1])(*x).sum())(*x)


def test_grouped_keys_and_values_are_not_expanded() -> None:
    spec = dataclasses.replace(wide("causal", "float32"), group_size=16)
    x = draw(spec, h=32, hkv=2, s=1, t=512)
    with (
        torch.utils._python_dispatch._disable_current_modes(),
        torch.profiler.profile(profile_memory=True) as seen,
    ):
        torch.ops.attnc.attend_tangent(*x, [], x, [True] * 3, str(spec))
    most = max(e.cpu_memory_usage for e in seen.events())
    assert most <= 2 * 32 * 512 * 8  # the scores, in fp32, and a mask


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    spec = wide("biases")
    q, k, v, *captured = draw(spec, seen=True)
    given = [True, False, True, *(c.is_floating_point() for c in captured)]
    moved = [y.flip(-1) for y, g in zip((q, k, v, *captured), given, strict=True) if g]
    for y in (q, k, v, *captured, *moved):
        y.requires_grad_(grad and y.is_floating_point())
    args = (q, k, v, captured, moved, given, str(spec))
    torch.library.opcheck(torch.ops.attnc.attend_tangent.default, args)
    if grad:
        return
    results = torch.ops.attnc.attend_tangent(*args)
    needs = [g != (at == 1) for at, g in enumerate([*given, *given])]
    grads = (results[0], None, results[2], results[3])
    torch.library.opcheck(
        torch.ops.attnc.attend_tangent_backward.default, (*grads, *args[:6], *results, str(spec), needs)
    )
