"""Expressions as kernel text compute what they mean, function by function, and the rest is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnc.codegen.triton.emit import can_run
from attnc.codegen.triton.pointwise import (
    _INFIX,
    _KERNEL,
    called_functions,
    kernel_lines,
    problem,
    torch_lines,
)
from attnc.ir import Pointwise
from attnc.pointwise import FUNCTIONS, POSITIONS
from attnc.printer import parse

_OWN = (
    "abs",
    "exp",
    "exp2",
    "log",
    "log2",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "sigmoid",
    "erf",
    "floor",
    "ceil",
    "where",
)


def _beside(f):
    return lambda a, b: f(*torch.broadcast_tensors(torch.as_tensor(a).double(), torch.as_tensor(b).double()))


TL = SimpleNamespace(
    **{n: getattr(torch, n) for n in _OWN}, maximum=_beside(torch.maximum), minimum=_beside(torch.minimum)
)


def values(lines: list[str], **scope: object) -> torch.Tensor:
    own = {"_tanh": torch.tanh, "_atan": torch.atan, "_pow": torch.pow}
    space = {"tl": TL, "torch": torch, "work": torch.float64, **own, **scope}
    exec("\n".join(lines), space)
    found = space["s"]
    assert isinstance(found, torch.Tensor)
    return found


def call(name: str) -> Pointwise:
    """Return an expression that calls a function on the score's square, so that logarithms are defined."""
    count = len(FUNCTIONS[name].slopes)
    first = "((s*s)+0.125)" if name in ("log", "sqrt", "rsqrt", "log1p", "pow") else "(s*1.5)"
    args = [first, "t", "0.25"][:count]
    if name == "where":
        args[0] = "(s>0.1)"
    return Pointwise(f"({args[0]}{_INFIX[name]}{args[1]})" if name in _INFIX else f"{name}({','.join(args)})")


@pytest.mark.parametrize("name", sorted((*_KERNEL, *_INFIX, "pow")))
def test_text_computes_the_function(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    s, t = (torch.randn(1, 2, 9, 7, generator=g, dtype=torch.float64) for _ in range(2))
    step = call(name)
    want = step.apply(s, {"t": t})
    assert problem(step) is None
    for lines in (kernel_lines(step, {"t": "side"}), torch_lines(step, {"t": "side"})):
        found = values(lines, s=s, side=t)
        torch.testing.assert_close(found.to(want.dtype), want, rtol=1e-12, atol=1e-12)


def test_what_is_read_twice_is_computed_once() -> None:
    lines = kernel_lines(Pointwise("silu((s+gelu((s*2.0))))"), {})
    assert lines[0] == "# pointwise(silu((s+gelu((s*2.0)))))"
    assert sum(line.count("tl.erf") for line in lines) == 1
    assert lines[-1].startswith("s = ")
    s = torch.randn(5, dtype=torch.float64)
    inner = s + torch.nn.functional.gelu(s * 2)
    torch.testing.assert_close(values(lines, s=s), torch.nn.functional.silu(inner), rtol=1e-12, atol=1e-12)


def test_long_expressions_are_cut_into_lines_that_can_be_read() -> None:
    text = "s"
    for _ in range(12):
        text = f"(sigmoid(({text}*0.25))+(tanh(({text}-1.5))/7.0))" if len(text) < 400 else f"tanh({text})"
    step = Pointwise(text)
    s = torch.randn(5, dtype=torch.float64)
    for lines in (kernel_lines(step, {})[1:], torch_lines(step, {})):
        assert max(map(len, lines)) <= 116
        assert len(lines) > 3
        torch.testing.assert_close(values(lines, s=s), step.apply(s, {}), rtol=1e-12, atol=1e-12)


def test_positions_are_rows_columns_heads_and_batch_entries() -> None:
    step = Pointwise("((s+(q-(2.0*k)))+((8.0*h)-b))")
    b, h = torch.arange(2.0)[:, None, None, None], torch.arange(3.0)[:, None, None]
    q, k = torch.arange(4.0)[:, None], torch.arange(3.0)[None]
    want = 1.0 + q - 2 * k + 8 * h - b
    one = torch.ones(2, 3, 4, 3, dtype=torch.float64)
    scope = {"rows": torch.arange(4), "cols": torch.arange(3), "head": h, "batch": b}
    lines = [line.replace("tl.float32", "work") for line in kernel_lines(step, {})]
    torch.testing.assert_close(values(lines, s=one, **scope), want.double())
    torch.testing.assert_close(
        values(torch_lines(step, {}), s=one, qi=q, ki=k, head=h, batch=b), want.double()
    )


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 8.0, 9.0, 12.0, 0.5, 1.5, 2.7, -1.0, -3.0, -0.5, -0.1])
def test_a_fixed_power_is_torchs_at_negative_bases_and_at_zero(exponent: float) -> None:
    s = torch.tensor([-2.5, -1.0, -0.0, 0.0, 0.3, 1.0, 7.0], dtype=torch.float64)
    step = Pointwise(f"pow(s,{exponent!r})")
    torch.testing.assert_close(values(kernel_lines(step, {}), s=s).abs(), (s**exponent).abs(), equal_nan=True)
    nonzero = s != 0  # which sign an infinity has is not kept
    got = values(kernel_lines(step, {}), s=s)
    torch.testing.assert_close(got[nonzero], (s**exponent)[nonzero], equal_nan=True)


def test_what_kernels_lack_is_named() -> None:
    assert problem(Pointwise("pow(0.0,s)")) == "kernels have no pow"
    assert problem(Pointwise("pow(s,inf)")) == "kernels have no pow"
    assert problem(Pointwise("(s+h)"), "qk") == "kernels do not compute with the position h"
    assert problem(Pointwise("(s+h)")) is None
    assert set(FUNCTIONS) - set(_KERNEL) - set(_INFIX) == {"pow"}
    assert set(POSITIONS) == set("qkhb")
    spec = parse(
        "attn q=bhqd[b,2,s,16]:float32 k=bhkd[b,2,s,16]:float32 v=bhke[b,2,s,16]:float32 group=1 "
        "pointwise(pow(-1.0,s)) mask=none softmax"
    )
    miss = can_run(spec)
    assert miss is not None
    assert miss.code == "triton-score-step"
    assert miss.why == "triton: kernels have no pow, found pointwise(pow(-1.0,s))"


def test_functions_that_the_file_brings_along_are_noticed() -> None:
    assert called_functions(Pointwise("gelu_tanh((s*2.0))")) == {"tanh"}
    assert called_functions(Pointwise("(atan(s)+pow(s,c0))")) == {"atan", "pow"}
    assert called_functions(Pointwise("gelu(pow(s,2.0))")) == set()
