"""What peelers know about the graph they walk: constants, side operands, and which nodes carry scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.ir import Scale, Softcap
from attnc.passes.detect.contraction import Contraction, contraction
from attnc.passes.detect.graph import base_name, inputs, op_name, tensor_of
from attnc.passes.detect.pull import OverBudgetError, Puller
from attnc.passes.detect.views import At, broadcast
from attnc.pointwise import Call

_BARRIER_NAMES = """
linear addmm matmul mm bmm baddbmm einsum _softmax softmax _safe_softmax _log_softmax log_softmax
logsumexp layer_norm native_layer_norm rms_norm group_norm batch_norm convolution conv1d conv2d conv3d
embedding scaled_dot_product_attention sum mean amax amin max_pool2d topk sort gather scatter index_put
cumsum cumprod prod var std linalg_vector_norm norm argmax
"""
_METADATA_READERS = (
    "zeros_like ones_like full_like empty_like rand_like new_zeros new_ones new_full new_empty"
)
_PRODUCTS = frozenset(("addmm", "matmul", "mm", "bmm", "baddbmm", "einsum"))
_LAYERS = frozenset(("linear", "convolution", "conv1d", "conv2d", "conv3d")) | _PRODUCTS
BARRIERS = frozenset(_BARRIER_NAMES.split() + _METADATA_READERS.split())


@dataclass(frozen=True, slots=True)
class RawBias:
    """``sign`` times the value at ``at`` is added to the score."""

    at: At
    sign: Literal[1, -1] = 1


@dataclass(frozen=True, slots=True)
class RawGain:
    """The score is multiplied by the value at ``at``."""

    at: At


@dataclass(frozen=True, slots=True)
class RawPointwise:
    """The score becomes ``term``, an expression of ``s`` and of the values at ``sides``, named t0, t1, .."""

    term: Call | str | float
    sides: tuple[At, ...] = ()


@dataclass(frozen=True, slots=True)
class RawMask:
    """Hidden positions get ``value``, added or put in place.

    ``at`` is the tensor it came from: what is added (``sense`` is its sign), or the condition (``sense`` is 1
    if a true one keeps the score, -1 if it hides it).
    """

    keep: Expr
    value: float
    how: str
    at: At | None
    sense: Literal[1, -1] = 1


@dataclass(frozen=True, slots=True)
class RawShift:
    """A constant is added to every score; a softmax does not see it."""

    value: float


RawMod = Scale | Softcap | RawBias | RawGain | RawPointwise | RawMask | RawShift


@dataclass(frozen=True, slots=True)
class Peeled:
    """The step is understood; ``mods`` innermost first; continue at ``rest``."""

    mods: tuple[RawMod, ...]
    rest: At
    name: str
    through: tuple[fx.Node, ...] = ()


def _settle(
    node: fx.Node,
    memo: dict[str, bool],
    rule: Callable[[fx.Node], bool | None],
    sources: Callable[[fx.Node], Sequence[fx.Node]],
    join: Callable[[Iterable[bool]], bool],
) -> bool:
    """Decide a property of a node by ``rule``, or where that is None by joining those of its sources."""
    stack = [node]
    while stack:
        n = stack[-1]
        if n.name in memo:
            stack.pop()
            continue
        known = rule(n)
        above = sources(n) if known is None else ()
        todo = [x for x in above if x.name not in memo]
        if todo:
            stack += todo
        else:
            memo[n.name] = known if known is not None else join(memo[x.name] for x in above)
    return memo[node.name]


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the inputs that are tensors, or several tensors."""
    values = ((x, x.meta.get("val")) for x in node.all_input_nodes)
    return [x for x, val in values if isinstance(val, torch.Tensor | tuple | list)]


def _elements_read(node: fx.Node) -> Sequence[fx.Node]:
    return node.all_input_nodes if op_name(node) == "py.getitem" else inputs(node)


@dataclass
class Env:
    """Facts of one working graph, memoised.

    ``tensors`` names parameters, buffers and lifted constants; ``linked`` the nodes whose values exist in the
    user's graph (None: all).
    """

    tensors: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    linked: frozenset[str] | None = None

    def __post_init__(self) -> None:
        self.puller = Puller(self.tensors)
        self.given_up: dict[str, str] = {}
        self._carries: dict[str, bool] = {}
        self._pure: dict[str, bool] = {}
        self._weight: dict[str, bool] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._positions: dict[str, int] = {}
        self._sources: dict[str, frozenset[str]] = {}

    def node(self, name: str, graph: fx.Graph) -> fx.Node:
        """Return the node of the working graph with this name."""
        if not self._nodes:
            self._nodes = {n.name: n for n in graph.nodes}
        return self._nodes[name]

    def usable(self, node: fx.Node) -> bool:
        """Say whether a rewritten graph can read the node's value."""
        return self.linked is None or node.name in self.linked

    def pure(self, node: fx.Node) -> bool:
        """Say whether the node depends on no input of the user.

        Parameters, buffers (``fixed``) and constants are none.
        """
        return _settle(node, self._pure, self._is_fixed_input, _value_inputs, all)

    def _is_fixed_input(self, node: fx.Node) -> bool | None:
        is_input = node.op in ("placeholder", "get_attr")
        return node.name in self.fixed or node.op == "get_attr" if is_input else None

    def is_weight(self, node: fx.Node) -> bool:
        """Say whether the node is a parameter or constant, or made from such without any layer.

        Learned queries that pass through a projection are computed, although they read no input.
        """
        if not self.pure(node):
            return False

        def rule(n: fx.Node) -> bool | None:
            return False if base_name(n) in _LAYERS else None

        return _settle(node, self._weight, rule, lambda n: n.all_input_nodes, all)

    def scores_of(self, node: fx.Node) -> Contraction | None:
        """Return the node as a contraction that may produce scores.

        It sums, and neither operand is a mere parameter.
        """
        c = contraction(node)
        if c is None or not c.summed or self.is_weight(c.lhs) or self.is_weight(c.rhs):
            return None
        return c

    def carries(self, node: fx.Node) -> bool:
        """Say whether the node's value comes from a scores contraction.

        Another contraction or a barrier between the two ends the way.
        """
        return _settle(node, self._carries, self._is_scores, _elements_read, any)

    def _is_scores(self, node: fx.Node) -> bool | None:
        if self.scores_of(node) is not None:
            return True
        return False if base_name(node) in BARRIERS or node.op != "call_function" else None

    def position(self, node: fx.Node) -> int:
        """Return the place of the node in its graph."""
        if node.name not in self._positions:
            self._positions = {n.name: i for i, n in enumerate(node.graph.nodes)}
        return self._positions[node.name]

    def sources(self, node: fx.Node) -> frozenset[str]:
        """Return the names of the scores contractions that a carrying node's value comes from."""
        memo, stack = self._sources, [node]
        while stack:
            n = stack[-1]
            if n.name in memo:
                stack.pop()
            elif self.scores_of(n) is not None:
                memo[n.name] = frozenset({n.name})
            else:
                above = [x for x in n.all_input_nodes if self.carries(x)] if self.carries(n) else []
                todo = [x for x in above if x.name not in memo]
                if todo:
                    stack += todo
                else:
                    memo[n.name] = frozenset().union(*(memo[x.name] for x in above))
        return memo[node.name]

    def sides(self, node: fx.Node) -> tuple[object, object] | None:
        """Return (carrying argument, other argument) of a two-argument op.

        None unless exactly one carries.
        """
        a, b = node.args[:2]
        ca, cb = (isinstance(x, fx.Node) and tensor_of(x) is not None and self.carries(x) for x in (a, b))
        return (a, b) if ca and not cb else (b, a) if cb and not ca else None

    def derive(self, at: At) -> Expr | None:
        """Return the closed form of a side operand's element, None when it takes too many terms.

        ``given_up`` then has the reason by the operand's name.
        """
        try:
            return self.puller.value(at.node, at.index)
        except OverBudgetError as e:
            self.given_up.setdefault(at.node.name, f"its derivation was given up at {e}")
            return self.puller.constants.at(at.node, at.index)

    def fitted_under(self, node: fx.Node) -> tuple[str, ...]:
        """Return what must hold of the constants that ``node`` is made from and closed forms stand for."""
        seen: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            n = stack.pop()
            if n not in seen:
                seen[n] = None
                stack += n.all_input_nodes
        texts = (self.puller.constants.condition(n.name) for n in seen)
        return tuple(sorted(t for t in texts if t is not None))

    def scalar(self, x: object) -> float | None:
        """Return a constant argument, else None.

        A constant is a number, or a tensor whose every element is the same constant.
        """
        if isinstance(x, bool):
            return None
        if isinstance(x, int | float):
            return float(x)
        if not isinstance(x, fx.Node) or tensor_of(x) is None:
            val = x.meta.get("val") if isinstance(x, fx.Node) else None
            return float(val) if isinstance(val, int | float) and not isinstance(val, bool) else None
        rank = len(tensor_of(x).shape)  # type: ignore[union-attr]
        at = At(x, tuple(E.index(f"c{i}", E.size(f"n{i}")) for i in range(rank)))
        value = self.derive(At(x, broadcast(at.index, x)))
        number = E.as_number(value) if value is not None else None
        return float(number) if number is not None and not isinstance(number, bool) else None


def step_into(at: At, node: object) -> At:
    """Return the element of ``node`` that an elementwise op at ``at`` reads."""
    assert isinstance(node, fx.Node)
    return At(node, broadcast(at.index, node))
