"""Write an elementwise expression over a score as Python that FlexAttention compiles."""

from __future__ import annotations

import math
from collections.abc import Callable

from attnc.errors import UnsupportedError
from attnc.pointwise import POSITIONS, SCORE, Call

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_NAMES = (
    "neg abs sign exp exp2 expm1 log log1p sqrt rsqrt reciprocal square sin cos tan atan sinh cosh tanh "
    "sigmoid relu erf floor ceil trunc"
)
_TORCH = frozenset(_NAMES.split())
_MODULE = {"silu": "silu", "softplus": "softplus", "elu": "elu", "gelu": "gelu"}


def written(term: Call | str | float, read: Callable[[str], str]) -> str:
    """Return the expression; ``read`` writes a captured tensor's element.

    Raises:
        UnsupportedError: a function that has no text here.
    """
    if isinstance(term, str):
        return "score" if term == SCORE else f"{term}.to(torch.float32)" if term in POSITIONS else read(term)
    if not isinstance(term, Call):
        return repr(term) if math.isfinite(term) else f'float("{term}")'
    args = [written(a, read) for a in term.args]
    sign = _INFIX.get(term.op) or _COMPARE.get(term.op)
    if sign:
        return f"({args[0]} {sign} {args[1]})"
    if term.op in _TORCH:
        return f"torch.{term.op}({args[0]})"
    if term.op in _MODULE:
        return f"torch.nn.functional.{_MODULE[term.op]}({args[0]})"
    if term.op == "gelu_tanh":
        return f'torch.nn.functional.gelu({args[0]}, approximate="tanh")'
    if term.op in ("maximum", "minimum"):
        return _bound(term, args)
    if term.op == "where":
        return f"torch.where({', '.join(args)})"
    raise UnsupportedError(f"flex: expected an elementwise function with a text, found {term.op}")


def _bound(term: Call, args: list[str]) -> str:
    """Return a maximum or minimum; torch's own takes tensors only, so one with a number is a clamp."""
    numbers = [not isinstance(a, Call | str) for a in term.args]
    if not any(numbers):
        return f"torch.{term.op}({args[0]}, {args[1]})"
    x, bound = (args[1], args[0]) if numbers[0] else (args[0], args[1])
    return f"torch.clamp({x}, {'min' if term.op == 'maximum' else 'max'}={bound})"
