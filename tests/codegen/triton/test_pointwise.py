"""Expressions as kernel text compute what they mean, function by function, and the rest is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnc.codegen.triton.emit import can_run
from attnc.codegen.triton.pointwise import _INFIX, _KERNEL, kernel_lines, problem, torch_text, uses_tanh
from attnc.ir import Pointwise
from attnc.pointwise import FUNCTIONS, POSITIONS
from attnc.printer import parse

_OWN = (
    "abs",
    "exp",
    "exp2",
    "log",
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
    space = {"tl": TL, "torch": torch, "_tanh": torch.tanh, "work": torch.float64, **scope}
    exec("\n".join(lines), space)
    found = space["s"]
    assert isinstance(found, torch.Tensor)
    return found


def call(name: str) -> Pointwise:
    """Return an expression that calls a function on the score's square, so that logarithms are defined."""
    count = len(FUNCTIONS[name].slopes)
    first = "((s*s)+0.125)" if name in ("log", "sqrt", "rsqrt", "log1p") else "(s*1.5)"
    args = [first, "t", "0.25"][:count]
    if name == "where":
        args[0] = "(s>0.1)"
    return Pointwise(f"({args[0]}{_INFIX[name]}{args[1]})" if name in _INFIX else f"{name}({','.join(args)})")


@pytest.mark.parametrize("name", sorted((*_KERNEL, *_INFIX)))
def test_text_computes_the_function(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    s, t = (torch.randn(1, 2, 9, 7, generator=g, dtype=torch.float64) for _ in range(2))
    step = call(name)
    want = step.apply(s, {"t": t})
    assert problem(step) is None
    for lines in (kernel_lines(step, {"t": "side"}), [f"s = {torch_text(step, {'t': 'side'})}"]):
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


def test_positions_are_rows_and_columns() -> None:
    step = Pointwise("(s+(q-(2.0*k)))")
    q, k = torch.arange(4.0)[:, None], torch.arange(3.0)[None]
    want = 1.0 + q - 2 * k
    one = torch.ones(4, 3, dtype=torch.float64)
    scope = {"rows": torch.arange(4), "cols": torch.arange(3)}
    lines = [line.replace("tl.float32", "work") for line in kernel_lines(step, {})]
    torch.testing.assert_close(values(lines, s=one, **scope), want.double())
    text = [f"s = {torch_text(step, {})}"]
    torch.testing.assert_close(values(text, s=one, qi=q, ki=k), want.double())


def test_what_kernels_lack_is_named() -> None:
    assert problem(Pointwise("pow(atan(s),2.0)")) == "kernels have no atan, pow"
    assert problem(Pointwise("(s+h)")) == "kernels do not compute with the position h"
    assert set(FUNCTIONS) - set(_KERNEL) - set(_INFIX) == {"atan", "pow"}
    assert set(POSITIONS) == set("qkhb")
    spec = parse(
        "attn q=bhqd[b,2,s,16]:float32 k=bhkd[b,2,s,16]:float32 v=bhke[b,2,s,16]:float32 group=1 "
        "pointwise(atan(s)) mask=none softmax"
    )
    miss = can_run(spec)
    assert miss is not None
    assert miss.code == "triton-score-step"
    assert miss.why == "triton: kernels have no atan, found pointwise(atan(s))"


def test_a_tanh_inside_is_noticed() -> None:
    assert uses_tanh(Pointwise("gelu_tanh((s*2.0))"))
    assert not uses_tanh(Pointwise("gelu((s*2.0))"))
