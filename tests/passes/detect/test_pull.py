"""Derived values of masks are the executed ones, element by element.

And what cannot be derived stays opaque.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.detect.graph import shape
from attnc.passes.detect.pull import OverBudgetError, Puller

S, T, B = 5, 7, 2
NEG = float("-inf")

Build = Callable[..., Tensor]


def traced(
    f: Build, args: tuple[Tensor, ...] = (), symbolic: bool = False
) -> tuple[fx.Node, dict[str, Tensor]]:
    """Return the node of the result and the inputs by the names of their nodes."""
    mode = "symbolic" if symbolic else "fake"
    anchor = torch.zeros(S, T)
    with torch.no_grad():
        graph = make_fx(lambda z, *a: f(z, *a), tracing_mode=mode, pre_dispatch=True)(anchor, *args).graph
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    return output, dict(zip(inputs, (anchor, *args), strict=True))


def derive(f: Build, *args: Tensor, symbolic: bool = False) -> tuple[Expr, fx.Node, dict[str, Tensor]]:
    node, inputs = traced(f, args, symbolic)
    index = tuple(E.index(f"i{d}", n) for d, n in enumerate(shape(node)))
    return Puller().value(node, index), node, inputs


def compute(e: Expr, env: Mapping[str, int], inputs: Mapping[str, Tensor]) -> float | int | bool:
    """Evaluate a derived value at one element."""

    def go(x: Expr) -> float | int | bool:
        return compute(x, env, inputs)

    match e.op:
        case "poly":
            total = 0
            for mono, c in E.terms(e):
                for g in mono:
                    c *= go(g)
                total += c
            return total
        case "const":
            return e.args[0]
        case "true" | "false":
            return e.op == "true"
        case "index" | "size":
            return env[e.args[0]]
        case "le0":
            return go(e.args[0]) <= 0
        case "eq0":
            return go(e.args[0]) == 0
        case "not":
            return not go(e.args[0])
        case "and":
            return all(go(x) for x in e.args[0])
        case "or":
            return any(go(x) for x in e.args[0])
        case "where":
            return go(e.args[1] if go(e.args[0]) else e.args[2])
        case "floordiv":
            return go(e.args[0]) // go(e.args[1])
        case "mod":
            return go(e.args[0]) % go(e.args[1])
        case "load":
            return inputs[e.args[0]][tuple(go(i) for i in e.args[1])].item()
        case "call":
            name, args = e.args
            return CALLS[name](*(go(x) for x in args))
    raise AssertionError(f"{e.op} cannot be computed: {e}")


CALLS: dict[str, Callable[..., float | int | bool]] = {
    "guarded": lambda x: x,
    "is_zero": lambda x: x == 0,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul")},
}


def assert_same_everywhere(
    e: Expr, value: Tensor, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> None:
    for place in itertools.product(*map(range, value.shape)):
        env = {**sizes, **{f"i{d}": p for d, p in enumerate(place)}}
        found, expected = compute(e, env, inputs), value[place].item()
        assert found == expected or (found != found and expected != expected), (
            place,
            found,
            expected,
            str(e),
        )


def anchor_of(inputs: Mapping[str, Tensor]) -> Tensor:
    return next(iter(inputs.values()))


def is_closed(e: Expr) -> bool:
    return not any(x.op in ("load", "call") for x in E.walk(e))


def q(z: Tensor) -> Tensor:
    return torch.arange(z.shape[0])[:, None]


def k(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1])[None, :]


CLOSED: dict[str, Build] = {
    "comparison": lambda z: k(z) <= q(z),
    "strict comparison": lambda z: k(z) - 1 < q(z),
    "reversed comparison": lambda z: q(z) >= k(z),
    "greater": lambda z: q(z) + 1 > k(z),
    "scaled comparison": lambda z: 2 * k(z) <= 2 * q(z) + 1,
    "equal": lambda z: k(z) == q(z) + 1,
    "not equal": lambda z: k(z) != q(z),
    "and": lambda z: (k(z) <= q(z)) & (q(z) - k(z) < 3),
    "or": lambda z: (k(z) > q(z)) | (k(z) < 2),
    "xor": lambda z: (k(z) > q(z)) ^ (k(z) < 2),
    "not": lambda z: ~(k(z) > q(z)),
    "logical": lambda z: torch.logical_and(
        torch.logical_not(k(z) > q(z)), torch.logical_or(k(z) < 2, k(z) > 3)
    ),
    "abs": lambda z: (q(z) - k(z)).abs() <= 2,
    "tril": lambda z: torch.ones(z.shape, dtype=torch.bool).tril(1),
    "triu": lambda z: torch.ones(z.shape).triu(-1) == 0,
    "tril and triu of numbers": lambda z: torch.ones(z.shape).tril(2) * torch.ones(z.shape).triu(-1),
    "full of infinity above": lambda z: torch.full(z.shape, NEG).triu(1),
    "where": lambda z: torch.where(k(z) <= q(z), 0.0, -1e9),
    "nested where": lambda z: torch.where(k(z) <= q(z), torch.where(k(z) < 2, 1.0, 2.0), -3.0),
    "masked fill": lambda z: torch.zeros(z.shape).masked_fill(k(z) > q(z), NEG),
    "fill of a fill": lambda z: (
        torch.zeros(z.shape).masked_fill(k(z) > q(z), -2.0).masked_fill(k(z) < 1, 3.0)
    ),
    "one minus a mask": lambda z: (1.0 - (k(z) <= q(z)).float()) * torch.finfo(torch.float32).min,
    "integers of a mask": lambda z: (k(z) <= q(z)).long() * 3 - 1,
    "mask of integers": lambda z: ((k(z) <= q(z)).int() * 2).bool(),
    "sum of masks": lambda z: (k(z) <= q(z)).int() + (k(z) < 2).int() == 2,
    "sum of bools": lambda z: (k(z) <= q(z)) + (k(z) < 2),
    "product of bools": lambda z: (k(z) <= q(z)) * (k(z) < 2),
    "float positions": lambda z: q(z).float() - k(z).float() >= 0,
    "half positions": lambda z: q(z).half() - k(z).half() >= 0,
    "negation": lambda z: -(k(z) - q(z)) >= 0,
    "reversed subtraction": lambda z: torch.rsub(k(z), q(z)) >= 0,
    "alpha": lambda z: torch.add(q(z), k(z), alpha=-2) >= 0,
    "chunks": lambda z: torch.div(q(z), 3, rounding_mode="floor") == k(z) // 3,
    "chunks of negatives": lambda z: (k(z) - q(z)) // 3,
    "truncated division": lambda z: torch.div(q(z), 3, rounding_mode="trunc") == 1,
    "remainder": lambda z: (k(z) - q(z)) % 3,
    "remainder of Python": lambda z: torch.remainder(q(z) - k(z), 4) == 0,
    "fmod of positives": lambda z: torch.fmod(k(z), 3) == 0,
    "flipped positions": lambda z: torch.arange(z.shape[1] - 1, -1, -1)[None] <= q(z),
    "stepped positions": lambda z: torch.arange(0, 3 * z.shape[1], 3)[None] <= q(z),
    "cat": lambda z: torch.cat([k(z) * 0, k(z) + 1, k(z) - 2], 0)[:3] <= 4,
    "cat along keys": lambda z: torch.cat([torch.ones(3, 2, dtype=torch.bool), k(z) <= q(z)[:3]], 1),
    "pad": lambda z: torch.nn.functional.pad(k(z) <= q(z), (1, 2), value=True),
    "pad with a number": lambda z: torch.nn.functional.pad((k(z) + q(z)).float(), (2, 0, 1, 1), value=-7.0),
    "crop by pad": lambda z: torch.nn.functional.pad(k(z) + q(z), (-1, -2)),
    "gather by broadcast positions": lambda z: (k(z) <= q(z))[q(z), (k(z) // 2)],
    "index select": lambda z: (k(z) <= q(z)).index_select(1, torch.arange(z.shape[1]) // 2),
    "cumsum of a constant": lambda z: torch.full((z.shape[1],), 2).cumsum(0) - 1,
    "diff": lambda z: torch.diff(torch.arange(z.shape[1]) * 3),
    "diff with prepend": lambda z: torch.diff(k(z)[0], prepend=k(z)[0, :1] - 1) != 1,
    "packed sequences": lambda z: (
        (torch.diff(k(z), prepend=k(z)[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        == (torch.diff(k(z), prepend=k(z)[:, :1] - 1, dim=-1) != 1).cumsum(-1)[:, :1].T
    ),
    "zeros and ones": lambda z: torch.zeros_like(z) + torch.ones_like(z) * 2 + z.new_full((), 4.0),
    "type as": lambda z: (k(z) <= q(z)).type_as(z),
    "log and exp": lambda z: torch.full(z.shape, 1.0).exp().log() + torch.full(z.shape, 4.0).sqrt(),
}

# Rounded or wrapped when computed with the mask's own type, or not integers at all.
OPAQUE: dict[str, Build] = {
    "positions beyond bfloat16": lambda z: (
        (k(z) * 300).to(torch.bfloat16) <= (q(z) * 300 + 1).to(torch.bfloat16)
    ),
    "positions beyond half": lambda z: (k(z) * 3000).half() <= (q(z) * 3000 + 1).half(),
    "unsigned difference": lambda z: q(z).to(torch.uint8) - k(z).to(torch.uint8) > 3,
    "bytes that wrap": lambda z: (q(z) * 100).to(torch.int8) < k(z),
    "fmod of negatives": lambda z: torch.fmod(q(z) - k(z), 3) == 1,
    "truncated negatives": lambda z: torch.div(q(z) - k(z), 3, rounding_mode="trunc") == 0,
    "a running count": lambda z: torch.arange(z.shape[1]).cumsum(0)[3],
    "negative places": lambda z: (k(z) + 10)[:, torch.arange(z.shape[1]) - 2],
    "cosine": lambda z: torch.cos(k(z).float()) > 0,
}

DATA: dict[str, Build] = {
    "mask cast to float and back": lambda z, m: (1.0 - m.float()).bool(),
    "inverted mask filled": lambda z, m: (1.0 - m.float()).masked_fill((1.0 - m.float()).bool(), -5.0),
    "mask equals": lambda z, m: (m == 0)[:, None, None] | (k(z) > q(z)),
    "mask at a shifted place": lambda z, m: torch.cat([m[:, 1:], m[:, :1]], 1) > 0,
    "lengths": lambda z, m: k(z)[0] < m.sum(-1)[:, None],
    "difference of data": lambda z, m: m[:, :, None] - m[:, None, :] == 0,
}


@pytest.mark.parametrize("name", CLOSED)
def test_masks_made_of_positions_are_closed_and_equal_the_executed_ones(name):
    value, node, inputs = derive(CLOSED[name])
    assert is_closed(value), str(value)
    assert_same_everywhere(value, CLOSED[name](anchor_of(inputs)), inputs, {})
    assert (value.op in ("true", "false") or E.is_bool(value)) == (node.meta["val"].dtype == torch.bool)


@pytest.mark.parametrize(
    "name", ["and", "tril", "where", "chunks", "pad", "packed sequences", "flipped positions"]
)
def test_masks_of_symbolic_lengths_hold_at_other_lengths(name):
    value, node, _ = derive(CLOSED[name], symbolic=True)
    assert is_closed(value), str(value)
    anchor = torch.zeros(9, 4)
    sizes = {}
    for n, length in zip(shape(next(iter(node.graph.nodes))), anchor.shape, strict=True):
        sizes[str(n)] = length
    assert_same_everywhere(value, CLOSED[name](anchor), {}, sizes)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_rounds_or_wraps_is_not_derived(name):
    value, node, inputs = derive(OPAQUE[name])
    assert not is_closed(value)
    known = {n.name for n in node.graph.nodes}
    assert {x.args[0] for x in E.loads(value)} <= known - set(inputs)


@pytest.mark.parametrize("name", DATA)
def test_masks_of_data_load_it_where_it_is(name):
    mask = (torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5).long() * 3
    value, node, inputs = derive(DATA[name], mask)
    loaded = {n.name: n for n in node.graph.nodes if n.name in {x.args[0] for x in E.loads(value)}}
    assert loaded
    for name_, n in loaded.items():
        inputs.setdefault(name_, run_to(n, inputs))
    assert_same_everywhere(value, run_to(node, inputs), inputs, {})


def run_to(node: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run the graph up to a node."""
    env: dict[fx.Node, object] = {}
    for n in node.graph.nodes:
        if n.op == "placeholder":
            env[n] = inputs[n.name]
        elif n.op == "call_function":
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda x: env[x])
            env[n] = n.target(*args, **kwargs)
        if n is node:
            break
    out = env[node]
    assert isinstance(out, Tensor)
    return out


def test_arms_read_outside_of_their_tensor_stay_opaque():
    def padded(z: Tensor, m: Tensor) -> Tensor:
        return torch.cat([torch.ones(B, 3, dtype=torch.bool), m > 0], 1)

    value, _, _ = derive(padded, torch.ones(B, T, dtype=torch.long))
    assert any(x.op == "call" and x.args[0] == "guarded" for x in E.walk(value))


def test_numbers_that_may_be_negative_decide_nothing():
    def shifted(z: Tensor, n: Tensor) -> Tensor:
        return k(z) >= -n

    value, _, inputs = derive(shifted, torch.tensor(3))
    assert value not in (E.TRUE, E.FALSE)
    assert_same_everywhere(value, shifted(anchor_of(inputs), torch.tensor(3)), inputs, {})


def test_a_derivation_has_a_budget():
    def deep(z: Tensor) -> Tensor:
        x = k(z)
        for i in range(300):
            x = torch.cat([x[:, i % 5 :], x[:, : i % 5]], 1) + q(z)[:1]
        return x <= 3

    with pytest.raises(OverBudgetError):
        derive(deep)


def test_long_chains_do_not_exhaust_the_stack():
    def long(z: Tensor) -> Tensor:
        x = z
        for _ in range(1500):
            x = x + 1
        return x

    with pytest.raises(OverBudgetError):
        derive(long)


def test_a_known_constant_is_read_and_a_parameter_is_not():
    graph = fx.Graph()
    node = graph.placeholder("scale")
    node.meta["val"] = torch.empty((), device="meta")
    half = torch.tensor(0.5)
    assert Puller({"scale": half}).value(node, ()) == E.real(0.5)
    assert Puller({"scale": torch.nn.Parameter(half)}).value(node, ()).op == "load"
    assert Puller({"scale": None}).value(node, ()).op == "load"
