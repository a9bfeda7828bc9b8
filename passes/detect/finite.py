"""Say of an expression over a score whether finite scores stay finite."""

from __future__ import annotations

import math

from attnc.pointwise import Call

_BOUNDED = frozenset({"tanh", "sigmoid", "relu", "maximum", "minimum", "atan", "erf", "elu"})
"""Functions that are finite at every finite number, and finite or -inf at -inf."""


def is_total(term: Call | str | float, hidden: bool = False) -> bool:
    """Say whether finite scores stay finite or become -inf; ``hidden`` says that some may be -inf already."""
    match term:
        case float():
            return math.isfinite(term) or term == -math.inf
        case str():
            return True
        case Call("where", (_, x, y)):
            return is_total(x, hidden) and is_total(y, hidden)
        case Call("add", (x, y)):
            return is_total(x, hidden) and is_total(y, hidden)
        case Call("mul", (x, float(y))) if math.isfinite(y):
            return is_total(x, hidden) and (y > 0 or not hidden)
        case Call(op, args) if op in _BOUNDED:
            return all(is_total(a, hidden) for a in args)
    return False
