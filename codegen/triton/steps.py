"""Write score steps and fills of a spec as text: for the kernel in base 2, for the reference in torch.

The kernel's scores are ``log2(e)`` times the spec's, so that the softmax is one ``exp2``.  Constant factors
are gathered and applied where they cost least: as one product with the contraction, inside a tanh, or with
a bias.
Source: FlashAttention-2 (arXiv:2307.08691), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from attnc.codegen.triton.inputs import Input, find
from attnc.codegen.triton.pointwise import (
    OWN,
    TILE,
    called_functions,
    kernel_lines,
    least_constant,
    torch_lines,
)
from attnc.ir import AttentionSpec, Bias, Elementwise, Fill, Gain, Normalized, Pointwise, Scale, Softcap, Step

LOG2E = math.log2(math.e)
FP32_MIN = torch.finfo(torch.float32).min
LEAST = FP32_MIN / LOG2E
"""The lowest score that base 2 can hold in fp32; lower ones, which only masks have, stand for themselves."""
WEIGHED = (Elementwise, Normalized)
"""Normalizers that weigh by an expression of the score, which stays in natural units."""
UNDERFLOW = 151.0
"""Base-2 distance below the maximum at which a weight is 0 in fp32: the least subnormal is 2**-149."""


def kernel_steps(
    steps: Sequence[Step],
    inputs: tuple[Input, ...],
    *,
    base2: bool = True,
    kept: dict[int, float] | None = None,
    places: Mapping[str, str] = TILE,
) -> list[str]:
    """Return the lines that turn ``s``, the bare contraction, into scores in base 2, or in natural units.

    Given ``kept``, the lines also name what derivatives need: ``t<n>``, the tanh of the soft cap at step n,
    and ``s<n>``, which times ``kept[n]`` is the score before any other step with a slope of its own.

    A score may be as low as fp32 goes where a bias stands for a mask; what multiplies such a score comes
    before base 2 then, in which it could not be told from one that stands for itself.
    """
    lines: list[str] = []
    factor, in_base2 = 1.0, not base2
    last_cap = max((i for i in range(len(steps)) if _is_natural(steps, i)), default=-1)
    huge = False

    def keep(at: int, name: str) -> None:
        if kept is not None:
            lines.append(f"{name}{at} = s")
            kept[at] = factor / LOG2E if in_base2 and base2 else factor

    for at, step in enumerate(steps):
        if isinstance(step, Scale):
            factor *= step.factor
        elif isinstance(step, Softcap):
            lines.append(f"s = _tanh({times('s', factor / step.cap)})  # {step}")
            factor, huge = step.cap, False
            keep(at, "t")
        elif isinstance(step, Gain):
            keep(at, "s")
            lines.append(f"s = s * {find(inputs, step.operand, 'bhqk').name}")
        elif isinstance(step, Pointwise):
            if factor != 1.0:
                lines.append(f"s = {times('s', factor)}")
            factor = 1.0
            keep(at, "s")
            named = {n: find(inputs, n, "bhqk").name for n in step.operands}
            lines += kernel_lines(step, named, places)
            huge = huge or least_constant(step.term) < LEAST
        else:
            bias = find(inputs, step.operand, "bhqk")
            unit = LOG2E if at > last_cap and base2 else 1.0
            scaled = times("s", factor if in_base2 else factor * unit)
            if huge and not in_base2 and unit != 1.0:
                scaled = f"_base2({times('s', factor)})"
            lines.append(f"s = {scaled} + {_addend(bias, step.sign, unit)}")
            factor, in_base2 = 1.0, at > last_cap or not base2
            huge = huge or bias.operand.dtype != torch.float16
    rest = factor if in_base2 else factor * LOG2E
    if huge and not in_base2:
        lines.append(f"s = _base2({times('s', factor)})")
    elif rest != 1.0:
        lines.append(f"s = {times('s', rest)}{_why(steps, factor, in_base2)}")
    return lines


def _is_natural(steps: Sequence[Step], at: int) -> bool:
    """Say whether a step needs scores in natural units."""
    biased = any(isinstance(s, Bias) for s in steps[:at])
    return isinstance(steps[at], Softcap | Pointwise) or (biased and isinstance(steps[at], Scale | Gain))


def _why(steps: Sequence[Step], factor: float, in_base2: bool) -> str:
    base = "" if in_base2 else "log2(e)"
    return f"  # {factor!r} * {base}" if base and factor != 1.0 else f"  # {base or factor}"


def times(name: str, factor: float) -> str:
    """Return ``name * factor`` as text."""
    return name if factor == 1.0 else f"{name} * {factor!r}"


def reference_steps(steps: Sequence[Step], inputs: tuple[Input, ...]) -> list[str]:
    """Return the same steps in torch, on ``s`` in natural units."""
    lines = []
    for step in steps:
        if isinstance(step, Scale):
            lines.append(f"s = s * {step.factor!r}")
        elif isinstance(step, Softcap):
            lines.append(f"s = {step.cap!r} * torch.tanh(s / {step.cap!r})")
        elif isinstance(step, Gain):
            lines.append(f"s = s * {find(inputs, step.operand, 'bhqk').tensor}.to(work)")
        elif isinstance(step, Pointwise):
            named = {n: _side(find(inputs, n, "bhqk")) for n in step.operands}
            lines += torch_lines(step, named)
        else:
            sign = "-" if step.sign < 0 else "+"
            lines.append(f"s = s {sign} {find(inputs, step.operand, 'bhqk').tensor}.to(work)")
    return lines


def _side(x: Input) -> str:
    """Return a captured tensor of an expression, in torch."""
    return x.tensor if x.is_bool else f"{x.tensor}.to(work)"


def _addend(bias: Input, sign: int, unit: float) -> str:
    """Return a bias in the unit of the scores; a wide dtype may hold what base 2 cannot."""
    if unit != 1.0 and bias.operand.dtype != torch.float16:
        return f"_base2({'-' if sign < 0 else ''}{bias.name})"
    return times(bias.name, sign * unit)


def wide_biases(spec: AttentionSpec, inputs: tuple[Input, ...]) -> bool:
    """Say whether a bias may be lower than base 2 can hold: a mask that was written as a bias, as a rule."""
    return any("_base2(" in line for line in kernel_steps(spec.scores, inputs))


def hidden(fill: Fill) -> float:
    """Return the base-2 score that stands for the fill; the fill itself where fp32 cannot hold that."""
    if fill.value == -math.inf:
        return fill.value
    return fill.value * LOG2E if fill.value * LOG2E >= FP32_MIN else max(fill.value, FP32_MIN)


def fill_text(fill: Fill, *, base2: bool = True) -> str:
    """Return ``s`` with hidden positions filled, as kernel text."""
    value = 'float("-inf")' if fill.value == -math.inf else repr(hidden(fill) if base2 else fill.value)
    return f"tl.where(keep, s, {'s + ' if fill.how == 'add' else ''}{value})"


def overflows(fill: Fill) -> bool:
    """Say whether a finite fill is lower than base 2 can hold; ``hidden`` is then in natural units."""
    return math.isfinite(fill.value) and fill.value * LOG2E < FP32_MIN


def own_functions(spec: AttentionSpec) -> dict[str, bool]:
    """Say of each function that Triton lacks whether the file has to bring it along."""
    weighs = [Pointwise(spec.norm.expr)] if isinstance(spec.norm, WEIGHED) else []
    called = {f for s in (*spec.scores, *weighs) if isinstance(s, Pointwise) for f in called_functions(s)}
    capped = {"tanh"} if any(isinstance(s, Softcap) for s in spec.scores) else set()
    return {name: name in called | capped for name in OWN}


def reference_fill(fill: Fill) -> str:
    """Return ``s`` filled, in torch; ``keep`` is the mask."""
    value = 'float("-inf")' if fill.value == -math.inf else repr(max(fill.value, FP32_MIN))
    if fill.how == "replace":
        return f"s.masked_fill(~keep, {value})"
    return f"s + torch.zeros_like(s).masked_fill(~keep, {value})"
