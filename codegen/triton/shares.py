"""Say what the backward has to know of a row of weights that are divided by their own sum.

A row's divisor, ``max(sum f(s) + added, least)``, comes from the logarithm that the forward stored.  That of
a negative one is NaN: such a sum is taken again.  Where ``least`` stands for the sum, nothing goes back
through the division; and a divisor of zero leaves no key of the row defined, hidden ones included.
"""

from __future__ import annotations

import math
from typing import Any

from attnc.codegen.triton import tiles
from attnc.codegen.triton.holes import visited
from attnc.codegen.triton.pointwise import Term
from attnc.ir import AttentionSpec, Normalized, Pointwise
from attnc.masks import Full
from attnc.pointwise import Call

NEAR = 2.0**-21
"""How near to ``least``, relative to it, fp32 does not tell a divisor from it by its logarithm."""
NONE = "l = tl.zeros([BLOCK_M], tl.float32)"
"""How a sum of weights starts."""
_NEVER_NEGATIVE = {"abs", "square", "sqrt", "relu", "exp", "exp2", "sigmoid", "softplus", "cosh"}


def never_negative(term: Term) -> bool:
    """Say whether an expression is known to have no negative value."""
    if not isinstance(term, Call):
        return isinstance(term, float) and term >= 0.0
    if term.op in _NEVER_NEGATIVE:
        return True
    if term.op == "mul" and term.args[0] == term.args[1]:
        return True
    if term.op == "pow" and isinstance(term.args[1], float) and term.args[1] % 2.0 == 0.0:
        return True
    if term.op in ("add", "mul", "div", "pow", "minimum"):
        return all(map(never_negative, term.args[: 1 if term.op == "pow" else 2]))
    if term.op == "maximum":
        return any(map(never_negative, term.args))
    return term.op == "where" and all(map(never_negative, term.args[1:]))


def takes_sums_again(norm: Normalized) -> bool:
    """Say whether a divisor may be negative, so that it has no logarithm."""
    return not (_sum_is_positive(norm) or norm.least >= 0.0)


def settles(norm: Normalized) -> bool:
    """Say whether ``least`` may stand for a row's sum."""
    return norm.least > (0.0 if _sum_is_positive(norm) else -math.inf)


def spread(spec: AttentionSpec, norm: Normalized) -> dict[str, str] | None:
    """Return how rows are told that leave hidden keys undefined, by a divisor of zero; None if none do.

    ``of`` is what is read of a row and ``start`` what one past the end has; ``fold`` gathers that of many in
    ``far``; ``here`` and ``anywhere`` are the conditions on a tile of rows, and on what was gathered.
    """
    vanishes = norm.least <= 0.0 and not (_sum_is_positive(norm) and norm.added > 0.0)
    if not vanishes or isinstance(spec.mask, Full) or not tiles.may_skip(visited(spec)):
        return None
    return {
        **{"of": "share", "far": "largest", "fold": "tl.maximum", "start": "1.0"},
        **{
            name: f'tl.max({x}, 0) == float("inf")'
            for name, x in (("here", "share"), ("anywhere", "largest"))
        },
    }


def _sum_is_positive(norm: Normalized) -> bool:
    """Say whether what ``least`` is compared with is known to be zero at least."""
    return norm.added >= 0.0 and never_negative(Pointwise(norm.expr).term)


def share_holes(norm: Normalized) -> dict[str, Any]:
    """Return how the kernel over rows finds divisors; ``lse`` is the logarithm, ``l`` a sum taken again."""
    added = f" + {norm.added!r}" if norm.added else ""
    bounded = norm.least > -math.inf
    held = "lse != lse"  # a bound below zero: rows of negative sums are looked at again
    if norm.least >= 0.0:
        held = 'lse == float("-inf")'
    if norm.least > 0.0:
        bound = math.log(norm.least)
        held = f"lse <= {bound + NEAR * (1.0 + abs(bound))!r}"
    return {
        "settled": held if settles(norm) else "",
        "settled_again": f"l{added} < {norm.least!r}",
        "divisor": f"tl.maximum(l{added}, {norm.least!r})" if bounded else f"l{added}",
    }


def slope_lines(slope: list[str], *, again: bool) -> list[str]:
    """Return the lines that divide a weight ``p`` and give ``ds``, around those that apply f's slope.

    ``again`` says that the sum of weights may be taken again: ``s`` is then the weight itself on the way out.
    """
    return ["dp = (dp - delta) * share", *slope, *(["s = p"] if again else []), "p = p * share"]
