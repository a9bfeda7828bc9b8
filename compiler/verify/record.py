"""Run just enough of a graph to know what its sites read, or draw values where the inputs are unknown."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from attnc.errors import VerifyError
from attnc.region import Dataflow, autocast, run_node

Values = dict[str, Any]


def record(
    graph: fx.Graph, placeholders: Mapping[str, Any] | None, names: Collection[str], seed: int = 0
) -> Values:
    """Run what the named nodes need of ``graph`` once, and return their values; all others are freed early.

    ``placeholders`` gives values of inputs by name (of any other node too).  An input without one is drawn at
    random from ``meta["val"]``, symbolic sizes from those of the given ones, else from their hints; a named
    floating node that depends on such inputs is drawn itself, and nothing is run for it.  Given tensors and
    the state of random number generators stay as they are.

    Raises:
        ValueError: a name is no node of the graph.
        VerifyError: a size of an unknown input is not known.
    """
    return record_values(Dataflow(graph), placeholders, names, frozenset(names), seed)


def record_values(
    flow: Dataflow,
    placeholders: Mapping[str, Any] | None,
    names: Collection[str],
    drawn: Collection[str],
    seed: int,
) -> Values:
    """Record as ``record`` does; only the nodes in ``drawn`` may be drawn instead of computed."""
    wanted = [flow.node(n) for n in dict.fromkeys(names)]
    env = {flow.nodes[n]: v for n, v in (placeholders or {}).items() if n in flow.nodes and is_known(v)}
    sizes = _Sizes(env)
    unknown = {n for n in flow.behind(wanted, env) if n.op == "placeholder"}
    if unknown:
        unclear = flow.depends_on_values({n for n in unknown if traced_tensor(n) is not None})
        for node in wanted:
            fake = traced_tensor(node)
            if node in unclear and node.name in drawn and fake is not None and fake.is_floating_point():
                env[node] = sizes.draw(fake, node.name, seed)
    steps = flow.behind(wanted, env)
    for node in steps:
        if node.op == "placeholder":
            env[node] = sizes.example(node, seed)
    env = {n: _snapshot(flow, n, v) for n, v in env.items()}
    return _run_steps(flow, [n for n in steps if n.op != "placeholder"], env, wanted, seed)


def _run_steps(
    flow: Dataflow, steps: Sequence[fx.Node], env: dict[fx.Node, Any], wanted: Sequence[fx.Node], seed: int
) -> Values:
    out = {n.name: _snapshot(flow, n, env[n]) for n in wanted if n in env}
    names = {n.name for n in wanted}
    last = {source: node for node in steps for source in (*node.all_input_nodes, node)}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        dying.setdefault(node, []).append(source)
    with own_randomness(seed), torch.inference_mode(False), torch.no_grad():
        for node in steps:
            with autocast(flow.autocast.get(node)):
                value = env[node] = run_node(node, env)
            if node.name in names:
                out[node.name] = _snapshot(flow, node, value)
            for dead in dying.get(node, ()):
                del env[dead]
    return out


def _snapshot(flow: Dataflow, node: fx.Node, value: Any) -> Any:
    """Return ``value`` on memory of its own if the graph writes to what it shares."""
    return value.clone() if flow.is_written(node) and isinstance(value, torch.Tensor) else value


def is_known(value: Any) -> bool:
    """Say whether a value is one to compute with, and no traced stand-in."""
    return not isinstance(value, FakeTensor | torch.SymInt)


def traced_tensor(node: fx.Node) -> torch.Tensor | None:
    """Return the traced value of a node that is one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


class _Sizes:
    """Numbers for symbolic sizes: those of given tensors, else hints."""

    def __init__(self, given: Mapping[fx.Node, Any]) -> None:
        self._bound: dict[Any, int] = {}
        for node, value in given.items():
            traced = node.meta.get("val")
            if isinstance(traced, torch.SymInt) and isinstance(value, int):
                self._bound.setdefault(traced.node.expr, value)
            elif isinstance(traced, torch.Tensor) and isinstance(value, torch.Tensor):
                for size, number in zip(traced.shape, value.shape, strict=False):
                    if isinstance(size, torch.SymInt):
                        self._bound.setdefault(size.node.expr, number)

    def number(self, size: Any) -> int:
        """Return a size as a number.

        Raises:
            VerifyError: it depends on data.
        """
        if isinstance(size, int):
            return size
        known = size.node.expr.subs(self._bound)
        if known.is_Integer:
            return int(known)
        if size.node.hint is None:
            raise VerifyError(f"verify: expected sizes that are known by example, found {size.node.expr}")
        return int(size.node.hint)

    def draw(self, fake: torch.Tensor, name: str, seed: int) -> torch.Tensor:
        """Return random values like ``fake``, in its order of strides."""
        shape = [self.number(n) for n in fake.shape]
        strides = [self.number(n) for n in fake.stride()]
        order = sorted(range(len(shape)), key=lambda i: -strides[i])
        dense = torch.empty([shape[i] for i in order], dtype=fake.dtype, device=fake.device)
        out = dense.permute([order.index(i) for i in range(len(shape))])
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
        return fill_random(out, generator)

    def example(self, node: fx.Node, seed: int) -> Any:
        """Return a value for an input: drawn for a tensor, the traced one for all else."""
        if "val" not in node.meta:
            raise VerifyError(
                f"verify: expected a traced value or a given one for the input {node.name}, found neither"
            )
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return self.draw(value, node.name, seed)
        return self.number(value) if isinstance(value, torch.SymInt) else value


def fill_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill ``x`` in place: normal floats; else zeros and ones, with ones in the first column."""
    if x.is_floating_point() or x.is_complex():
        draw = torch.complex64 if x.is_complex() else torch.float32
        return x.copy_(torch.randn(x.shape, generator=generator, dtype=draw))
    x.copy_(torch.randint(0, 2, x.shape, generator=generator))
    if x.ndim and x.numel():
        x[..., 0] = 1
    return x


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators for a block, and put them back as they were."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
