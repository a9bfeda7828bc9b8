"""Cut a piece out of a graph and run it on real tensors: in its own dtypes, in fp64, or rounded at random.

A region is what lies between boundary nodes and one output.  What it reads besides (sizes, tables, masks that
do not depend on the boundary) are its ``needs``, whose values are given.  A node that writes in place is part
of a region when a value that the region reads shares the memory it wrote to; values that would be written to
are copied first.

In fp64 the same nodes run with every floating dtype replaced.  Numbers of 2**23 and more, where one unit of
fp32 is 1, are fills: they absorb what is added to them even in the fp32 that kernels keep inside, so they are
enlarged to absorb it in fp64 too.  Smaller ones, such as -1e4 in bf16, stay the numbers they are.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnc.capture.alias import last_writes, op_name, writes
from attnc.rounding import FILL, Rounding

_FILL_FACTOR = 2.0**300
_LARGEST = 2.0**128
_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_SHAPE_ONLY = frozenset(
    (
        *("sym_size", "sym_stride", "sym_numel", "sym_is_contiguous", "size", "stride", "numel", "dim"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty"),
    )
)
_KEEPS_STATISTICS = frozenset(
    ("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "_batch_norm_impl_index")
)


class Dataflow:
    """What each node of a graph reads: its inputs, and earlier writes to memory that an input shares."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes = {n.name: n for n in graph.nodes}
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        # Nodes that share memory have the same last write; so its position names the memory.
        self.memory = last_writes(graph)
        self.autocast = _autocasts(graph)
        self._writers: dict[int, list[fx.Node]] = {}
        for node in graph.nodes if self.memory else ():
            for group in {self.memory[x] for x in writes(node)}:
                self._writers.setdefault(group, []).append(node)

    def node(self, name: str) -> fx.Node:
        """Return the node of this name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.nodes:
            raise ValueError(f"expected the name of a node of the graph, found {name!r}")
        node: fx.Node = self.nodes[name]
        return node

    def reads(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the inputs of ``node``, and the last write before it to the memory of each."""
        for source in node.all_input_nodes:
            yield source
            earlier = self._writers.get(self.memory.get(source, -1), ())
            before = [w for w in earlier if self.order[w] < self.order[node] and w is not source]
            if before:
                yield before[-1]

    def behind(self, nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> list[fx.Node]:
        """Return ``nodes`` and all that they are computed from, in order, as far as ``stop``."""
        seen: set[fx.Node] = set()
        stack = [n for n in nodes if n not in stop]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += [d for d in self.reads(node) if d not in stop and d not in seen]
        return sorted(seen, key=self.order.__getitem__)

    def depends_on_values(self, sources: Collection[fx.Node]) -> set[fx.Node]:
        """Return ``sources`` and every node that reads their values, not only their sizes or dtypes."""
        out = set(sources)
        for node in self.graph.nodes:
            if op_name(node) not in _SHAPE_ONLY and any(d in out for d in self.reads(node)):
                out.add(node)
        return out

    def is_written(self, node: fx.Node) -> bool:
        """Say whether some node writes to memory that ``node`` may share."""
        return node in self.memory

    def rewrites(self, node: fx.Node) -> bool:
        """Say whether ``node`` writes to memory, or is a view of memory that is written somewhere."""
        return node in self.memory and any(
            self.memory.get(x) == self.memory[node] for x in node.all_input_nodes
        )


class Region:
    """The nodes of a graph that compute ``output`` from ``boundary`` nodes; values of all else are given.

    Attributes:
        inputs: names in ``boundary`` that the region reads, in that order.
        needs: names of the other nodes it reads; they do not depend on the boundary.
        nodes: the region, in graph order; the last one is the output.
    """

    def __init__(
        self,
        graph: fx.Graph,
        output: str,
        boundary: Sequence[str],
        flow: Dataflow | None = None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        """Cut the region out of ``graph``; ``flow`` is the graph's dataflow, if the caller has it.

        ``called`` says which node of this graph a name in ``boundary`` stands for, where it is another's.

        Raises:
            ValueError: a name is no node of the graph, or the output does not depend on the boundary.
        """
        flow = flow or Dataflow(graph)
        self.graph, self.output = graph, output
        stands = {n: flow.node((called or {}).get(n, n)) for n in boundary}
        stops = set(stands.values())
        seen = flow.behind([flow.node(output)], stops)
        inside: set[fx.Node] = set()
        for node in seen:
            if node.op == "placeholder":
                continue
            if flow.rewrites(node) or any(d in stops or d in inside for d in flow.reads(node)):
                inside.add(node)
        if flow.node(output) not in inside:
            raise ValueError(f"expected {output} to be computed from {list(boundary)}, found that it is not")
        self.nodes = tuple(n for n in seen if n in inside)
        read = {d for n in self.nodes for d in flow.reads(n)}
        self.inputs = tuple(n for n in stands if stands[n] in read)
        outside = sorted(read - inside - stops, key=flow.order.__getitem__)
        self.needs = tuple(n.name for n in outside if n.op != "get_attr")
        self._given = {stands[n]: n for n in self.inputs} | {flow.node(n): n for n in self.needs}
        self._attributes = [n for n in outside if n.op == "get_attr"]
        written = {flow.memory[x] for n in self.nodes for x in writes(n)}
        self._copied = {n for n in [*self._given, *self._attributes] if flow.memory.get(n) in written}
        self._last_use = _last_uses(self.nodes)
        self._autocast = flow.autocast.get(self.nodes[-1])

    def run(
        self,
        values: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        rounding: Rounding | None = None,
    ) -> torch.Tensor:
        """Run the region on ``values`` of its inputs and needs, which stay as they are; autograd flows.

        ``dtype`` torch.float64 runs everything in fp64, None as it is; ``rounding`` perturbs the fp64 run.

        Raises:
            ValueError: a value is missing, or another dtype is asked for.
        """
        if dtype not in (None, torch.float64):
            raise ValueError(f"a region runs as it is or in torch.float64, found dtype={dtype}")
        missing = [name for name in self._given.values() if name not in values]
        if missing:
            raise ValueError(f"region of {self.output}: expected values of {missing}, found {sorted(values)}")
        exact = dtype is not None
        env: dict[fx.Node, Any] = {}
        for node in (*self._given, *self._attributes):
            value = values[self._given[node]] if node in self._given else attribute(node)
            env[node] = _copied(value, exact) if node in self._copied else _widened(value, exact)
        loud = self._rounded(rounding) if rounding is not None else set()
        with autocast(None if exact else self._autocast):
            for node in self.nodes:
                env[node] = run_node(node, env, exact=exact, rounding=rounding if node in loud else None)
                for dead in self._last_use.get(node, ()):
                    del env[dead]
        out: torch.Tensor = env[self.nodes[-1]]
        return out

    def _rounded(self, rounding: Rounding) -> set[fx.Node]:
        """Return the nodes whose results would be rounded: they compute with inputs that are not exact."""
        moving = {n for n, name in self._given.items() if name in self.inputs and name not in rounding.exact}
        for node in self.nodes:
            if any(d in moving for d in node.all_input_nodes):
                moving.add(node)
        return {n for n in self.nodes if n in moving and not _is_view(n)}

    def key(self, names: Mapping[str, str]) -> str:
        """Return a text, equal for regions that compute the same function; ``names`` renames the inputs."""
        known = {n: names.get(name, name) for n, name in self._given.items()}
        known |= {n: f"attribute {n.target}" for n in self._attributes}
        lines = [str(self._autocast)]
        for i, node in enumerate(self.nodes):
            known[node] = f"%{i}"
            args = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            lines.append(f"{known[node]} = {node.target} {args!r}")
        return "\n".join(lines)


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return, per node, the nodes of the region that nothing in it reads any more afterwards."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in (*node.all_input_nodes, node):
            last[source] = node
    out: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        if source is not nodes[-1]:
            out.setdefault(user, []).append(source)
    return out


# ---------------------------------------------------------------- running nodes


def run_node(
    node: fx.Node, env: Mapping[fx.Node, Any], *, exact: bool = False, rounding: Rounding | None = None
) -> Any:
    """Run one call on the values in ``env``, in fp64 if ``exact``.

    Raises:
        ValueError: the node is no function call.
    """
    if node.op == "get_attr":
        return attribute(node)
    if node.op != "call_function" or not callable(node.target):
        raise ValueError(f"{node.name}: expected a call of a function, found {node.op} {node.target}")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if not exact:
        return node.target(*_shielded(node, args), **kwargs)
    floats = any(t.is_floating_point() for t in _tensors(node.meta.get("val")))
    args, kwargs = pytree.tree_map(lambda a: _exact_argument(a, floats), (args, kwargs))
    if op_name(node) in ("_softmax", "_log_softmax"):
        args = (*args[:2], False)  # half_to_float
    if rounding is not None and floats:
        return rounding.call(op_name(node), node.target, args, kwargs)
    with _default_of(torch.float64):  # numbers alone make a tensor of the default type
        return _widened(node.target(*args, **kwargs), True)


@contextmanager
def _default_of(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default of floating tensors for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _shielded(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the running statistics that a normalization updates behind its schema's back."""
    if op_name(node) not in _KEEPS_STATISTICS:
        return args
    return (args[0], *(a.clone() if isinstance(a, torch.Tensor) else a for a in args[1:]))


def _exact_argument(a: Any, floats: bool) -> Any:
    """Return an argument of a call in fp64; ``floats`` says that the call has floating results."""
    if isinstance(a, torch.dtype):
        return _WIDER.get(a, a)
    if isinstance(a, fx.GraphModule):
        return _exact_module(a)
    # Among integers only negative ones: large positive ones are sizes and the ends of slices.
    number = isinstance(a, float) or (isinstance(a, int) and not isinstance(a, bool) and a < 0)
    return a * _FILL_FACTOR if number and floats and FILL <= abs(a) < _LARGEST else a


def _exact_module(module: fx.GraphModule) -> Callable[..., Any]:
    """Return a function that runs a sub-graph in fp64."""

    def run(*inputs: Any) -> Any:
        given = iter(inputs)
        env: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            env[node] = next(given) if node.op == "placeholder" else run_node(node, env, exact=True)
        raise AssertionError("a graph without output")

    return run


def _widened(value: Any, exact: bool) -> Any:
    """Return tensors in fp64 if ``exact``, all else as it is."""
    if not exact:
        return value
    return pytree.tree_map_only(torch.Tensor, widen, value)


def widen(t: torch.Tensor) -> torch.Tensor:
    """Return a floating tensor in fp64 (or complex128) with its fills enlarged, any other as it is."""
    if t.dtype not in _WIDER:
        return t
    wide = t.to(_WIDER[t.dtype])
    if wide.is_complex():
        return wide
    fills = (wide.abs() >= FILL) & wide.isfinite()
    return torch.where(fills, wide * _FILL_FACTOR, wide) if bool(fills.any()) else wide


def _copied(value: Any, exact: bool) -> Any:
    """Return ``value`` on memory of its own."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, _widened(value, exact))


def _is_view(node: fx.Node) -> bool:
    """Say whether ``node`` returns, or writes to, the memory of an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    yield from (t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def attribute(node: fx.Node) -> Any:
    """Return what a get_attr node reads from the module that owns its graph.

    Raises:
        ValueError: the graph belongs to no module, or it has no such attribute.
    """
    module = node.graph.owning_module
    if module is None:
        raise ValueError(f"{node.name}: expected a graph owned by a module, to read {node.target!r} from it")
    try:
        return operator.attrgetter(str(node.target))(module)
    except AttributeError as error:
        raise ValueError(f"{node.name}: expected the module to have {node.target!r}: {error}") from error


def _autocasts(graph: fx.Graph) -> dict[fx.Node, tuple[Any, ...]]:
    """Return the arguments of the innermost autocast, for each node that runs in one."""
    stack: list[tuple[Any, ...]] = []
    out: dict[fx.Node, tuple[Any, ...]] = {}
    for node in graph.nodes:
        if op_name(node) == "_enter_autocast":
            stack.append(tuple(node.args))
        elif op_name(node) == "_exit_autocast":
            stack.pop()
        elif stack:
            out[node] = stack[-1]
    return out


def autocast(state: tuple[Any, ...] | None) -> contextlib.AbstractContextManager[Any]:
    """Enter an autocast of ``Dataflow.autocast``."""
    return contextlib.nullcontext() if state is None else torch.autocast(*state)
