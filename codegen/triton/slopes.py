"""Write derivatives as kernel text: how the gradient of scores goes back through the steps that made them.

A rule takes the gradient of a function's value and returns those of its arguments, as expressions.  It is
given the gradient, not a slope to multiply with, so that a choice (``where``, ``relu``) chooses gradients:
the arm that is not chosen gets an exact zero even where its own slope is infinite.
Source: reverse accumulation, Griewank and Walther, Evaluating Derivatives (2008), section 3.2.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attnc.codegen.triton.inputs import Input, find
from attnc.codegen.triton.pointwise import PAIRS, WIDE, Term, bare, kernel_form, number
from attnc.codegen.triton.steps import kernel_steps, times
from attnc.ir import Bias, Elementwise, Gain, Normalized, Pointwise, Scale, Softcap, Step
from attnc.pointwise import POSITIONS, SCORE, Call

GRAD = "ds"
"""The gradient of the scores: the name that the rules' results are expressions of."""
PULL = "pull"
"""Times: the gradient first, then a slope.  Not ``mul``: an infinite slope has to leave a zero as it is."""

Rule = Callable[..., tuple[Term, ...]]


def product(a: Term, b: Term) -> Term:
    """Return ``a * b``."""
    if a == 0.0 or b == 0.0:
        return 0.0
    if a == 1.0 or b == 1.0:
        return b if a == 1.0 else a
    return a * b if isinstance(a, float) and isinstance(b, float) else Call("mul", (a, b))


def pulled(grad: Term, slope: Term) -> Term:
    """Return a gradient times a slope."""
    if grad == 0.0 or slope == 0.0:
        return 0.0
    return grad if slope == 1.0 else negative(grad) if slope == -1.0 else Call(PULL, (grad, slope))


def negative(a: Term) -> Term:
    """Return ``-a``."""
    return -a if isinstance(a, float) else Call("neg", (a,))


def total(a: Term, b: Term) -> Term:
    """Return ``a + b``."""
    return b if a == 0.0 else a if b == 0.0 else Call("add", (a, b))


def _call(op: str) -> Callable[..., Term]:
    return lambda *args: Call(op, args)


_add, _sub, _div, _where = map(_call, ("add", "sub", "div", "where"))
_exp, _rsqrt, _square, _reciprocal, _erf = map(_call, ("exp", "rsqrt", "square", "reciprocal", "erf"))
_sin, _cos, _tan, _sinh, _cosh, _tanh, _sigmoid = map(
    _call, ("sin", "cos", "tan", "sinh", "cosh", "tanh", "sigmoid")
)


def _smooth(*slopes: Callable[..., Term]) -> Rule:
    """Return the rule of a function with these slopes along its arguments."""
    return lambda g, *x: tuple(pulled(g, slope(*x)) for slope in slopes)


def _flat(g: Term, *x: Term) -> tuple[Term, ...]:
    """Return zeros: the function is constant between its steps."""
    return (0.0,) * len(x)


def _either(op: str) -> Rule:
    """Return the rule of a maximum (``gt``) or minimum (``lt``): at a tie each side gets half."""

    def rule(g: Term, x: Term, y: Term) -> tuple[Term, ...]:
        half = _where(Call("eq", (x, y)), product(0.5, g), 0.0)
        return _where(Call(op, (x, y)), g, half), _where(Call(op, (y, x)), g, half)

    return rule


def _sigmoid_slope(x: Term) -> Term:
    return product(_sigmoid(x), _sub(1.0, _sigmoid(x)))


def _silu_slope(x: Term) -> Term:
    return product(_sigmoid(x), _add(1.0, product(x, _sub(1.0, _sigmoid(x)))))


def _gelu_slope(x: Term) -> Term:
    below = product(0.5, _add(1.0, _erf(product(math.sqrt(0.5), x))))
    return _add(below, product(1 / math.sqrt(2 * math.pi), product(x, _exp(product(-0.5, _square(x))))))


def _gelu_tanh_slope(x: Term) -> Term:
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    t = _tanh(product(product(root, x), _add(1.0, product(cubic, _square(x)))))
    inner = product(root, _add(1.0, product(3 * cubic, _square(x))))
    return product(0.5, _add(_add(1.0, t), product(product(x, _sub(1.0, _square(t))), inner)))


def _power(x: Term, y: Term) -> Term:
    """Return ``x ** (y - 1)``."""
    if not isinstance(y, float):
        return Call("pow", (x, _sub(y, 1.0)))
    return 1.0 if y == 1.0 else x if y == 2.0 else Call("pow", (x, y - 1.0))


def _logarithm(x: Term, y: Term) -> Term:
    """Return the slope of ``x ** y`` along ``y``; a fixed exponent has no use for it."""
    if isinstance(y, float):
        return 0.0
    slope = math.log(x) if isinstance(x, float) else Call("log", (x,))
    return product(Call("pow", (x, y)), slope)


RULES: Mapping[str, Rule] = {
    "neg": lambda g, x: (negative(g),),
    "abs": _smooth(_call("sign")),
    "exp": _smooth(_exp),
    "exp2": _smooth(lambda x: product(math.log(2), Call("exp2", (x,)))),
    "expm1": _smooth(_exp),
    "log": _smooth(_reciprocal),
    "log1p": _smooth(lambda x: _reciprocal(_add(1.0, x))),
    "sqrt": _smooth(lambda x: product(0.5, _rsqrt(x))),
    "rsqrt": _smooth(lambda x: product(-0.5, _div(_rsqrt(x), x))),
    "reciprocal": _smooth(lambda x: negative(_square(_reciprocal(x)))),
    "square": _smooth(lambda x: product(2.0, x)),
    "sin": _smooth(_cos),
    "cos": _smooth(lambda x: negative(_sin(x))),
    "tan": _smooth(lambda x: _add(1.0, _square(_tan(x)))),
    "sinh": _smooth(_cosh),
    "cosh": _smooth(_sinh),
    "tanh": _smooth(lambda x: _sub(1.0, _square(_tanh(x)))),
    "sigmoid": _smooth(_sigmoid_slope),
    "relu": lambda g, x: (_where(Call("gt", (x, 0.0)), g, 0.0),),
    "silu": _smooth(_silu_slope),
    "softplus": _smooth(_sigmoid),
    "elu": lambda g, x: (_where(Call("gt", (x, 0.0)), g, pulled(g, _exp(x))),),
    "gelu": _smooth(_gelu_slope),
    "gelu_tanh": _smooth(_gelu_tanh_slope),
    "atan": _smooth(lambda x: _reciprocal(_add(1.0, _square(x)))),
    "erf": _smooth(lambda x: product(2 / math.sqrt(math.pi), _exp(negative(_square(x))))),
    "add": lambda g, x, y: (g, g),
    "sub": lambda g, x, y: (g, negative(g)),
    "mul": _smooth(lambda x, y: y, lambda x, y: x),
    "div": _smooth(lambda x, y: _reciprocal(y), lambda x, y: negative(_div(_div(x, y), y))),
    "pow": lambda g, x, y: (pulled(g, product(y, _power(x, y))), pulled(g, _logarithm(x, y))),
    "maximum": _either("gt"),
    "minimum": _either("lt"),
    "where": lambda g, c, x, y: (0.0, _where(c, g, 0.0), _where(c, 0.0, g)),
    **dict.fromkeys(("sign", "floor", "ceil", "trunc", "lt", "le", "gt", "ge", "eq", "ne"), _flat),
}
"""For each function that kernels have: from the gradient of its value and its arguments, their gradients."""

_STEEP = {"exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "div", "tan", "pow"}
_STEEP |= {"sinh", "cosh", "gelu_tanh"}
"""Functions whose slopes may be infinite or undefined at finite scores."""


def gradients(term: Term, grad: Term = GRAD) -> dict[str, Term]:
    """Return the gradient of each name that an expression reads, from the gradient of its value."""
    sums: dict[str, Term] = {}

    def walk(t: Term, g: Term) -> None:
        if g == 0.0 or isinstance(t, float):
            return
        if isinstance(t, Call):
            for arg, found in zip(t.args, RULES[t.op](g, *t.args), strict=True):
                walk(arg, found)
        else:
            sums[t] = total(sums.get(t, 0.0), g)

    walk(term, grad)
    return {n: g for n, g in sums.items() if n not in POSITIONS}


def is_steep(term: Term) -> bool:
    """Say whether a slope of the expression may be infinite, so that zero gradients need care."""
    if not isinstance(term, Call):
        return False
    by_number = term.op == "div" and isinstance(term.args[1], float)
    return (term.op in _STEEP and not by_number) or any(map(is_steep, term.args))


def assign(
    targets: Sequence[tuple[str, Term]], named: Mapping[str, str], known: Mapping[Term, str], steep: bool
) -> list[str]:
    """Return a line ``name = expression`` per target, and before it one for each part that is read again.

    ``named`` gives the kernel's names, ``known`` expressions that the kernel has already computed.
    """
    reads: Counter[Term] = Counter()
    names, lines = dict(known), list[str]()

    def form(t: Call) -> str:
        if t.op != PULL:
            return kernel_form(t)
        return "_times({0}, {1})" if steep else "({0} * {1})"

    def name(text: str) -> str:
        lines.append(f"y{len(lines)} = {bare(text)}")
        return f"y{len(lines) - 1}"

    def count(t: Term) -> None:
        reads[t] += 1
        if isinstance(t, Call) and reads[t] == 1 and t not in known:
            for at, arg in enumerate(t.args):
                for _ in range(form(t).count(f"{{{at}}}")):
                    count(arg)

    def write(t: Term) -> str:
        if t in names:
            return names[t]
        if not isinstance(t, Call):
            return named.get(t, t) if isinstance(t, str) else number(t)
        args = [write(a) for a in t.args]
        while sum(map(len, args)) > WIDE:
            longest = max(range(len(args)), key=lambda i: len(args[i]))
            args[longest] = name(args[longest])
        text = form(t).format(*args)
        if reads[t] > 1:
            names[t] = name(text)
        return names.get(t, text)

    for _, term in targets:
        count(term)
    values = [(target, "tl.zeros_like(dp)" if term == 0.0 else bare(write(term))) for target, term in targets]
    return [*lines, *(f"{target} = {value}" for target, value in values)]


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps of a spec, forward and back.

    ``lines`` turn ``s``, the bare contraction, into scores as the forward kernel does, and keep what
    ``pulls`` need; ``pulls`` turn ``ds``, the gradient of the scores, into that of the contraction but for
    ``factor``, and give each captured tensor ``x`` its ``d_x``, not yet summed over what it broadcasts along.
    ``is_steep`` says that ``pulls`` call ``_times``.
    """

    lines: tuple[str, ...]
    pulls: tuple[str, ...]
    factor: float
    is_steep: bool


def chain(steps: Sequence[Step], inputs: tuple[Input, ...], *, base2: bool) -> Chain:
    """Return the lines for ``steps``; gradients are in natural units whatever the scores are in."""
    kept: dict[int, float] = {}
    lines = kernel_steps(steps, inputs, base2=base2, kept=kept, places=PAIRS)
    pulls: list[str] = []
    factor, seen = 1.0, set[str]()

    def add(operand: str, text: str) -> None:
        name = f"d_{find(inputs, operand, 'bhqk').name}"
        pulls.append(f"{name} = {f'{name} + ' if name in seen else ''}{text}")
        seen.add(name)

    for at, step in reversed(list(enumerate(steps))):
        if isinstance(step, Scale):
            factor *= step.factor
        elif isinstance(step, Softcap):
            pulls.append(f"{GRAD} = {GRAD} * (1.0 - t{at} * t{at})  # {step}")
        elif isinstance(step, Bias):
            whole = step.sign * factor
            add(step.operand, f"-{GRAD}" if whole == -1.0 else times(GRAD, whole))
        elif isinstance(step, Gain):
            add(step.operand, times(f"{GRAD} * s{at}", kept[at] * factor))
            pulls.append(f"{GRAD} = {GRAD} * {find(inputs, step.operand, 'bhqk').name}")
        else:
            targets = []
            found = gradients(step.term)
            for x in (find(inputs, n, "bhqk") for n in step.operands):
                if not x.is_bool:
                    name, own = f"d_{x.name}", product(factor, found.get(x.operand.name, 0.0))
                    targets.append((name, total(name, own) if name in seen else own))
                    seen.add(name)
            named = {n: find(inputs, n, "bhqk").name for n in step.operands}
            targets.append((GRAD, found.get(SCORE, 0.0)))
            parts = assign(targets, {**PAIRS, **named, SCORE: f"s{at}"}, {}, is_steep(step.term))
            pulls += [f"# back through {step}", *parts] if parts != [f"{GRAD} = {GRAD}"] else []
    text = "\n".join(pulls)
    needed = [x for x in lines if not re.fullmatch(r"[st]\d+ = s", x) or re.search(rf"\b{x[:-4]}\b", text)]
    return Chain(tuple(needed), tuple(pulls), factor, "_times(" in text)


def weigh_slope(norm: Elementwise | Normalized) -> tuple[list[str], bool]:
    """Return the lines that give ``ds`` from ``dp``, the gradient of weights ``p = f(s)``; is one steep?"""
    term = Pointwise(norm.expr).term
    slope = gradients(term, "dp").get(SCORE, 0.0)
    return assign([(GRAD, slope)], {}, {term: "p"}, is_steep(term)), is_steep(term)
