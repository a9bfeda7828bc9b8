"""Write an elementwise expression over the score as kernel text, and as torch for the reference in the file.

The kernel computes in fp32 and natural units.  Triton has few functions of its own; the others are written
out by identities that lose at most a rounding or two (``expm1`` and ``log1p`` near 0 are the plain forms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from attnc.ir import Pointwise
from attnc.pointwise import POSITIONS, SCORE, Call, names

Term = Call | str | float

_INFIX = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/"},
    **{"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="},
}
_ROOT = math.sqrt(2 / math.pi)
_KERNEL: Mapping[str, str] = {
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "(tl.exp({0}) - 1.0)",
    "log": "tl.log({0})",
    "log1p": "tl.log(1.0 + {0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "(1.0 / {0})",
    "square": "({0} * {0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "tan": "(tl.sin({0}) / tl.cos({0}))",
    "sinh": "(0.5 * (tl.exp({0}) - tl.exp(-{0})))",
    "cosh": "(0.5 * (tl.exp({0}) + tl.exp(-{0})))",
    "atan": "_atan({0})",
    "tanh": "_tanh({0})",
    "sigmoid": "tl.sigmoid({0})",
    "relu": "tl.maximum({0}, 0.0)",
    "silu": "({0} * tl.sigmoid({0}))",
    "softplus": "(tl.maximum({0}, 0.0) + tl.log(1.0 + tl.exp(-tl.abs({0}))))",
    "elu": "tl.where({0} > 0.0, {0}, tl.exp(tl.minimum({0}, 0.0)) - 1.0)",
    "gelu": f"(0.5 * {{0}} * (1.0 + tl.erf({{0}} * {math.sqrt(0.5)!r})))",
    "gelu_tanh": f"(0.5 * {{0}} * (1.0 + _tanh({_ROOT!r} * {{0}} * (1.0 + 0.044715 * {{0}} * {{0}}))))",
    "erf": "tl.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "trunc": "tl.where({0} < 0.0, tl.ceil({0}), tl.floor({0}))",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "where": "tl.where({0}, {1}, {2})",
}
OWN = ("tanh", "atan", "pow")
"""Functions that a file brings along where it calls them."""
MOST_FACTORS = 8
"""The largest whole exponent that is written as a product."""
WIDE = 80
"""Characters of a function's arguments, above which they get names of their own."""
_TORCH: Mapping[str, str] = {
    "gelu": "torch.nn.functional.gelu({0})",
    "gelu_tanh": 'torch.nn.functional.gelu({0}, approximate="tanh")',
    "silu": "torch.nn.functional.silu({0})",
    "softplus": "torch.nn.functional.softplus({0})",
    "elu": "torch.nn.functional.elu({0})",
    "neg": "(-{0})",
}
"""What is not ``torch.<name>``."""
_PLACES = {"h": "head.to(tl.float32)", "b": "batch.to(tl.float32)"}
TILE: Mapping[str, str] = {
    "q": "rows[:, None].to(tl.float32)",
    "k": "cols[None, :].to(tl.float32)",
    **_PLACES,
}
"""Positions in a tile of scores, queries down and keys across."""
PAIRS: Mapping[str, str] = {"q": "qi.to(tl.float32)", "k": "ki.to(tl.float32)", **_PLACES}
"""Positions in a tile that lies either way: ``qi`` and ``ki`` broadcast against each other."""


def problem(step: Pointwise, places: str = "qkhb") -> str | None:
    """Return what of an expression kernels do not have, or None; ``places`` are the positions they know."""
    absent = sorted({c.op for c in _calls(step.term) if not kernel_form(c)})
    if absent:
        return f"kernels have no {', '.join(absent)}"
    placed = [n for n in names(step.term) if n in POSITIONS and n not in places]
    return f"kernels do not compute with the position {placed[0]}" if placed else None


def _calls(term: Term) -> Iterator[Call]:
    """Yield the calls in an expression."""
    if isinstance(term, Call):
        yield term
        for arg in term.args:
            yield from _calls(arg)


def called_functions(step: Pointwise) -> set[str]:
    """Return which functions of ``OWN`` the expression calls."""
    forms = [kernel_form(c) for c in _calls(step.term)]
    return {name for name in OWN if any(f"_{name}(" in form for form in forms)}


def least_constant(term: Term) -> float:
    """Return the least number in an expression, as it may stand for a hidden score."""
    if isinstance(term, Call):
        return min(map(least_constant, term.args), default=math.inf)
    return term if isinstance(term, float) else math.inf


def kernel_lines(step: Pointwise, named: Mapping[str, str], places: Mapping[str, str] = TILE) -> list[str]:
    """Return the lines that put the expression's value in place of ``s``; ``named`` are the captured tensors.

    What a function reads more than once gets a name of its own, and so does what makes a line too long.
    """
    lines: list[str] = []

    def called(term: Call, args: list[str]) -> str:
        form = kernel_form(term)
        if form.count("{0}") > 1 and isinstance(term.args[0], Call):
            args[0] = _name(lines, args[0])
        return form.format(*args)

    value = bare(_written(step.term, {**places, **named}, called, lines))
    return [f"# {step}", *lines, f"s = {value}"]


def kernel_form(term: Call) -> str:
    """Return the kernel text of a call with places for its arguments, '' if kernels have none."""
    if term.op in _INFIX:
        return f"({{0}} {_INFIX[term.op]} {{1}})"
    return _power(*term.args) if term.op == "pow" else _KERNEL.get(term.op, "")


def _power(base: Term, exponent: Term) -> str:
    """Return the text of a power: products, or by way of base 2, whose logarithm of a negative is NaN."""
    if not isinstance(exponent, float):
        if not isinstance(base, float):
            return "_pow({0}, {1})"
        return f"tl.exp2({math.log2(base)!r} * {{1}})" if 0 < base < math.inf else ""
    if not math.isfinite(exponent) or exponent == 0:
        return ""
    size = abs(exponent)
    if size == 0.5:
        text = "tl.sqrt({0})"
    elif size.is_integer() and size <= MOST_FACTORS:
        text = f"({' * '.join(['{0}'] * int(size))})"
    elif size.is_integer():
        text = f"tl.exp2({size!r} * tl.log2(tl.abs({{0}})))"
        text = f"tl.where({{0}} < 0.0, -{text}, {text})" if size % 2 else text
    else:
        text = f"tl.exp2({size!r} * tl.log2({{0}}))"
    return f"(1.0 / {text})" if exponent < 0 else text


def torch_lines(step: Pointwise, named: Mapping[str, str]) -> list[str]:
    """Return the same in torch, on ``s`` and captured tensors; ``qi, ki, head, batch`` are positions.

    Numbers stand as they are beside a tensor; a function of two tensors gets them as tensors.
    """
    lines: list[str] = []

    def called(term: Call, args: list[str]) -> str:
        if term.op in ("maximum", "minimum"):
            args = [
                f"s.new_tensor({a})" if isinstance(t, float) else a
                for t, a in zip(term.args, args, strict=True)
            ]
        return _TORCH.get(term.op, f"torch.{term.op}({', '.join(args)})").format(*args)

    positions = {n: f"{x}.to(work)" for n, x in zip("qkhb", ("qi", "ki", "head", "batch"), strict=True)}
    value = bare(_written(step.term, {**positions, **named}, called, lines))
    return [*lines, f"s = {value}"]


def _written(
    term: Term, named: Mapping[str, str], called: Callable[[Call, list[str]], str], lines: list[str]
) -> str:
    """Return a term as text: names by ``named``, operators between their operands, the rest by ``called``.

    Arguments that are too long for a line get names of their own in ``lines``.
    """
    if isinstance(term, str):
        return term if term == SCORE else named[term]
    if not isinstance(term, Call):
        return number(term)
    args = [_written(a, named, called, lines) for a in term.args]
    while sum(map(len, args)) > WIDE:
        longest = max(range(len(args)), key=lambda i: len(args[i]))
        args[longest] = _name(lines, args[longest])
    return f"({args[0]} {_INFIX[term.op]} {args[1]})" if term.op in _INFIX else called(term, args)


def _name(lines: list[str], text: str) -> str:
    """Add a line that gives ``text`` a name; return the name."""
    name = f"x{len(lines)}"
    lines.append(f"{name} = {bare(text)}")
    return name


def reads_positions(step: Pointwise) -> bool:
    """Say whether the expression computes with where a score stands."""
    return any(n in POSITIONS for n in names(step.term))


def number(x: float) -> str:
    """Return a number as kernel text, and as torch."""
    return repr(x) if math.isfinite(x) else f'float("{x}")'


def bare(text: str) -> str:
    """Return the text without brackets around all of it."""
    if not text.startswith("(") or not text.endswith(")"):
        return text
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and at < len(text) - 1:
            return text
    return text[1:-1]
