"""Peel logit soft-capping, ``cap * tanh(scores / cap)``.

Any ``a * tanh(b * x)`` is a soft cap: it equals ``Softcap(a)`` after ``Scale(a * b)``, because ``a * tanh(b *
x) == a * tanh((a * b * x) / a)``. So a scale folded into the divisor, a reciprocal multiply, and either
operand order all reach the same spec. A bare ``tanh`` is a cap of 1. Source: Gemma 2 report, section 2
(arXiv:2408.00118).
"""

from __future__ import annotations

from torch import fx

from attnc.ir import Miss, Scale, Softcap
from attnc.passes.detect.env import Env, Peeled, step_into
from attnc.passes.detect.graph import base_name
from attnc.passes.detect.views import At


def peel(at: At, env: Env) -> Peeled | Miss | None:
    """Strip one soft cap off ``at``, an element of a score tensor; a negative one is a cap and a sign."""
    cap, tanh = _split_constant(at, env)
    if base_name(tanh.node) != "tanh":
        return None
    if cap == 0:
        return Miss("softcap-sign", at.node.name, "the tanh is multiplied by zero")
    inner, scores = _split_constant(step_into(tanh, tanh.node.args[0]), env)
    scale = () if abs(cap) * inner == 1.0 else (Scale(abs(cap) * inner),)
    sign = () if cap > 0 else (Scale(-1.0),)
    through = tuple(
        n
        for n in (tanh.node, tanh.node.args[0])
        if isinstance(n, fx.Node) and n is not scores.node and n is not at.node
    )
    return Peeled((*scale, Softcap(abs(cap)), *sign), scores, "softcap", through)


def _split_constant(at: At, env: Env) -> tuple[float, At]:
    """Write the element as ``factor * other element``; what is no constant multiple is ``1 *`` itself."""
    name = base_name(at.node)
    if name not in ("mul", "div") or at.node.kwargs.get("rounding_mode"):
        return 1.0, at
    a, b = at.node.args[:2]
    for number, other in ((b, a), (a, b)):
        factor = env.scalar(number)
        if (
            factor is not None
            and isinstance(other, fx.Node)
            and (name == "mul" or (number is b and factor != 0))
        ):
            return (factor if name == "mul" else 1.0 / factor), step_into(at, other)
    return 1.0, at
