"""Index maps of views: what is read back through a chain of views is what torch computes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnc import expr as E
from attnc.expr import Expr
from attnc.passes.detect.graph import base_name, shape
from attnc.passes.detect.views import At, stepped

Step = Callable[[Tensor], Tensor]
LARGEST = 4000


def factors(n: int) -> list[int]:
    return [f for f in range(1, n + 1) if n % f == 0]


def permute(r: random.Random, sizes: list[int]) -> Step:
    order = r.sample(range(len(sizes)), len(sizes))
    return lambda x: x.permute(order)


def transpose(r: random.Random, sizes: list[int]) -> Step:
    a, b = r.randrange(len(sizes)), -1 - r.randrange(len(sizes))
    return lambda x: x.transpose(a, b)


def move(r: random.Random, sizes: list[int]) -> Step:
    several = r.randint(1, len(sizes))
    source, target = (r.sample(range(len(sizes)), several) for _ in range(2))
    one = lambda x: x.movedim(source[0], target[0] - len(sizes))  # noqa: E731
    return r.choice([one, lambda x: x.movedim(source, target), lambda x: x.swapaxes(source[0], target[0])])


def reshape(r: random.Random, sizes: list[int]) -> Step:
    rest, new = torch.Size(sizes).numel(), []
    while rest > 1 and len(new) < 4:
        new.append(r.choice(factors(rest)))
        rest //= new[-1]
    new.append(rest)
    return lambda x: x.reshape(new)


def split_axis(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(len(sizes))
    f = r.choice(factors(sizes[d]))
    return lambda x: x.unflatten(d, (f, sizes[d] // f))


def join_axes(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(len(sizes) - 1) if len(sizes) > 1 else 0
    return lambda x: x.flatten(d, min(d + 1, len(sizes) - 1))


def unsqueeze(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(-len(sizes) - 1, len(sizes) + 1)
    return lambda x: x.unsqueeze(d)


def squeeze(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(len(sizes))
    return lambda x: x.squeeze(d)


def expand(r: random.Random, sizes: list[int]) -> Step:
    new = [r.choice([2, 3]) if n == 1 else -1 for n in sizes]
    front = [2] if r.random() < 0.3 else []
    return lambda x: x.expand(*front, *new)


def slices(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(len(sizes))
    n = sizes[d]
    start, step = r.randrange(-n, n), r.choice([1, 1, 2])
    end = r.choice([n, n + 5, -1 if start < -1 or (0 <= start < n - 1) else n])
    cut = slice(start, end, step)
    return lambda x: x[(slice(None),) * d + (cut,)]


def select(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(len(sizes))
    i = r.randrange(-sizes[d], sizes[d])
    return lambda x: x.select(d, i)


def piece(r: random.Random, sizes: list[int]) -> Step:
    d = r.randrange(-len(sizes), len(sizes))
    n = sizes[d]
    first = r.randrange(1, n + 1)
    kinds: list[Step] = [
        lambda x: x.chunk(3, d)[-1],
        lambda x: x.split(first, d)[-1],
        lambda x: x.split([first, n - first], d)[0],
        lambda x: x.unbind(d)[n - 1],
    ]
    return r.choice(kinds)


def repeat(r: random.Random, sizes: list[int]) -> Step:
    times = [r.choice([1, 2]) for _ in sizes]
    front = [2] if r.random() < 0.3 else []
    return lambda x: x.repeat(*front, *times)


def repeat_interleave(r: random.Random, sizes: list[int]) -> Step:
    d, times = r.randrange(len(sizes)), r.choice([1, 2, 3])
    return lambda x: x.repeat_interleave(times, d)


def copies(r: random.Random, sizes: list[int]) -> Step:
    kinds: list[Step] = [lambda x: x.contiguous(), lambda x: x.clone(), lambda x: x.detach(), lambda x: x.mT]
    return r.choice(kinds if len(sizes) > 1 else kinds[:3])


KINDS = [
    *(
        permute,
        transpose,
        move,
        reshape,
        reshape,
        split_axis,
        split_axis,
        join_axes,
        join_axes,
        unsqueeze,
        squeeze,
    ),
    *(expand, slices, select, piece, repeat, repeat_interleave, copies),
]


def chain(seed: int) -> tuple[Tensor, list[Step]]:
    """Return a tensor whose elements are all different, and up to seven views of one another."""
    r = random.Random(seed)
    sizes = [r.choice([1, 2, 3, 4, 5, 6, 8, 12]) for _ in range(r.randint(1, 4))]
    x = torch.arange(torch.Size(sizes).numel()).view(sizes)
    now, steps = x, []
    for _ in range(r.randint(1, 7)):
        if not now.dim():
            break
        step = r.choice(KINDS)(r, list(now.shape))
        after = step(now)
        if after.numel() and after.numel() <= LARGEST and after.dim() < 7:
            now = after
            steps.append(step)
    return x, steps


def viewed(x: Tensor, steps: list[Step]) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def pulled(at: At) -> At:
    """Follow an element to the input of the graph."""
    while at.node.op != "placeholder":
        step = stepped(at)
        assert step is not None, f"{base_name(at.node)} was not followed: {at.node.format_node()}"
        at = step[0]
    return at


def compute(e: Expr, env: dict[str, int]) -> int:
    total = 0
    for mono, c in E.terms(e):
        for g in mono:
            if g.op == "index":
                c *= env[g.args[0]]
            else:
                a, m = (compute(x, env) for x in g.args)
                c *= a // m if g.op == "floordiv" else a % m
        total += c
    return total


def assert_chains_read_what_torch_computes(seeds: range) -> None:
    """Trace many chains into one graph, pull elements of each result back, and compare values."""
    chains = [chain(seed) for seed in seeds]

    def run(*inputs: Tensor) -> list[Tensor]:
        return [viewed(x, steps) + 0 for x, (_, steps) in zip(inputs, chains, strict=True)]

    with torch.no_grad():
        graph = make_fx(run, tracing_mode="fake", pre_dispatch=True)(*(x for x, _ in chains)).graph
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    for seed, (x, steps), out in zip(seeds, chains, outputs, strict=True):
        last = out.args[0]
        at = pulled(At(last, tuple(E.index(f"i{d}", n) for d, n in enumerate(shape(last)))))
        assert_same_elements(at, viewed(x, steps), x, seed)


def assert_same_elements(at: At, value: Tensor, x: Tensor, seed: int) -> None:
    r = random.Random(seed)
    for _ in range(12):
        place = tuple(r.randrange(n) for n in value.shape)
        index = tuple(compute(i, {f"i{d}": p for d, p in enumerate(place)}) for i in at.index)
        assert all(0 <= i < n for i, n in zip(index, x.shape, strict=True)), (seed, at.index)
        assert x[index] == value[place], (seed, at.index, place)


@pytest.mark.parametrize("start", range(0, 2000, 100))
def test_chains_of_views_read_what_torch_computes(start):
    assert_chains_read_what_torch_computes(range(start, start + 100))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(2000, 12000, 100))
def test_more_chains_of_views_read_what_torch_computes(start):
    assert_chains_read_what_torch_computes(range(start, start + 100))


def index_of(f: Callable[..., Tensor], *args: Tensor, symbolic: bool = False) -> tuple[str, ...] | None:
    """Return where element (i0, i1, ..) of ``f`` lives in its first input, as text; None if it is no view."""
    with torch.no_grad():
        graph = make_fx(f, tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)(*args).graph
    last = next(n for n in graph.nodes if n.op == "output").args[0]
    at = At(last, tuple(E.index(f"i{d}", n) for d, n in enumerate(shape(last))))
    while at.node.op != "placeholder":
        step = stepped(at)
        if step is None:
            return None
        at = step[0]
    return tuple(map(str, at.index))


def test_heads_are_digits_of_features():
    x = torch.randn(2, 5, 12)
    assert index_of(lambda x: x.view(2, 5, 3, 4).transpose(1, 2), x) == ("i0", "i2", "4*i1 + i3")
    assert index_of(lambda x: x.view(2, 5, 3, 4).permute(0, 2, 1, 3).reshape(6, 5, 4), x) == (
        "(i0) // (3)",
        "i1",
        "4*(i0) % (3) + i2",
    )


def test_untouched_axes_pass_through_a_reshape_unchanged():
    x = torch.randn(2, 7, 12)
    assert index_of(lambda x: x.reshape(2, 7, 3, 4).reshape(2, 7, 12), x) == ("i0", "i1", "i2")


def test_symbolic_sizes_are_divided_exactly():
    x = torch.randn(2, 5, 12)
    heads = index_of(lambda x: x.view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2), x, symbolic=True)
    assert heads == ("i0", "i2", "4*i1 + i3")
    joined = index_of(lambda x: x.reshape(x.shape[0] * x.shape[1], 12), x, symbolic=True)
    assert joined is not None
    assert "//" in joined[0]
    assert "%" in joined[1]
    assert joined[2] == "i1"


def test_a_slice_from_the_end_of_a_symbolic_axis():
    x = torch.randn(3, 9)
    found = index_of(lambda x: x[:, -4:], x, symbolic=True)
    assert found is not None
    assert "-4" in found[1].replace(" ", "")
    assert index_of(lambda x: x[:, -4:-1], x, symbolic=True) is None


def test_reading_bits_as_another_type_is_no_view():
    assert index_of(lambda x: x.view(torch.int32), torch.randn(3, 4)) is None


def test_arithmetic_is_no_view():
    assert index_of(lambda x: x + 1, torch.randn(3, 4)) is None
    assert index_of(lambda x: torch.nn.functional.dropout(x, 0.5, True), torch.randn(3, 4)) is None
    assert index_of(lambda x: x.flip(0), torch.randn(3, 4)) is None
    assert index_of(lambda x: x.max(0).values, torch.randn(3, 4)) is None
