"""ATen's elementwise ops as functions of ``attnc.pointwise``, with node inputs and numbers as leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnc.passes.detect.graph import argument, base_name, ratio_of_numbers, tensor_of
from attnc.pointwise import Call

_NAMES = (
    "abs sign exp exp2 expm1 log log1p sqrt rsqrt reciprocal square sin cos tan atan sinh cosh tanh sigmoid "
    "relu silu erf floor ceil trunc neg mul maximum minimum lt le gt ge eq ne"
)
_SAME_NAME = frozenset(_NAMES.split())
_ALIASES = {"sgn": "sign", "max": "maximum", "min": "minimum", "true_divide": "div", "arctan": "atan"}
_LINEAR = frozenset({"add", "sub", "mul", "div", "neg"})


@dataclass(frozen=True, slots=True)
class Applied:
    """An elementwise op: ``term`` over the names ``x0``, ``x1``.. that stand for ``inputs``."""

    term: Call | str | float
    inputs: tuple[fx.Node, ...]

    @property
    def linear(self) -> bool:
        """Whether the op only adds, or multiplies by something else."""
        return isinstance(self.term, Call) and self.term.op in _LINEAR


def as_call(node: fx.Node) -> Applied | None:
    """Return the op at ``node``, None if it is not elementwise or not known."""
    if tensor_of(node) is None:
        return None
    name = _ALIASES.get(base_name(node), base_name(node))
    if name in ("maximum", "minimum") and (len(node.args) != 2 or not isinstance(node.args[1], fx.Node)):
        return None  # max over an axis
    rule = _RULES.get(name)
    made = rule(node) if rule is not None else _by_name(name, node) if name in _SAME_NAME else None
    if made is None:
        return None
    inputs: dict[fx.Node, str] = {}
    term = _leaves(made, inputs)
    return None if term is None else Applied(term, tuple(inputs))


def _leaves(made: Any, inputs: dict[fx.Node, str]) -> Call | str | float | None:
    """Return a tree of ops with nodes replaced by names; None if a leaf is neither tensor nor number."""
    if isinstance(made, tuple):
        args = [_leaves(x, inputs) for x in made[1:]]
        return None if None in args else Call(made[0], tuple(a for a in args if a is not None))
    if isinstance(made, fx.Node):
        return inputs.setdefault(made, f"x{len(inputs)}")
    return ratio_of_numbers(made)


def _by_name(name: str, node: fx.Node) -> Any:
    return (name, *node.args) if not node.kwargs else None


def _addition(name: str) -> Callable[[fx.Node], Any]:
    def rule(node: fx.Node) -> Any:
        a, b = node.args[:2]
        alpha = argument(node, 2, "alpha", 1)
        return (name, a, b if alpha == 1 else ("mul", b, alpha))

    return rule


def _rsub(node: fx.Node) -> Any:
    a, b = node.args[:2]
    alpha = argument(node, 2, "alpha", 1)
    return ("sub", b, a if alpha == 1 else ("mul", a, alpha))


def _div(node: fx.Node) -> Any:
    return ("div", *node.args[:2]) if not argument(node, 2, "rounding_mode") else None


def _pow(node: fx.Node) -> Any:
    base, exponent = node.args[:2]
    return ("square", base) if exponent == 2 and isinstance(base, fx.Node) else ("pow", base, exponent)


def _clamp(node: fx.Node) -> Any:
    return _bounded(node.args[0], argument(node, 1, "min"), argument(node, 2, "max"))


def _bounded(x: Any, low: Any, high: Any) -> Any:
    x = x if low is None else ("maximum", x, low)
    return x if high is None else ("minimum", x, high)


def _where(node: fx.Node) -> Any:
    return ("where", *node.args) if len(node.args) == 3 else None


def _masked_fill(node: fx.Node) -> Any:
    x, mask, value = node.args[:3]
    return ("where", mask, value, x)


def _gelu(node: fx.Node) -> Any:
    kind = argument(node, 1, "approximate", "none")
    return {"none": ("gelu", node.args[0]), "tanh": ("gelu_tanh", node.args[0])}.get(str(kind))


def _leaky_relu(node: fx.Node) -> Any:
    x = node.args[0]
    return ("where", ("gt", x, 0.0), x, ("mul", x, argument(node, 1, "negative_slope", 0.01)))


def _plain_elu(node: fx.Node) -> Any:
    return ("elu", node.args[0]) if all(a == 1 for a in node.args[1:]) and not node.kwargs else None


def _plain_softplus(node: fx.Node) -> Any:
    usual = (argument(node, 1, "beta", 1), argument(node, 2, "threshold", 20)) == (1, 20)
    return ("softplus", node.args[0]) if usual else None


_RULES: dict[str, Callable[[fx.Node], Any]] = {
    "add": _addition("add"),
    "sub": _addition("sub"),
    "rsub": _rsub,
    "div": _div,
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": lambda n: _bounded(n.args[0], argument(n, 1, "min"), None),
    "clamp_max": lambda n: _bounded(n.args[0], None, argument(n, 1, "max")),
    "hardtanh": lambda n: _bounded(n.args[0], argument(n, 1, "min_val", -1), argument(n, 2, "max_val", 1)),
    "relu6": lambda n: _bounded(n.args[0], 0.0, 6.0),
    "where": _where,
    "masked_fill": _masked_fill,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "elu": _plain_elu,
    "softplus": _plain_softplus,
    "log_sigmoid": lambda n: ("neg", ("softplus", ("neg", n.args[0]))),
}
