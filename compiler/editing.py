"""Edit a graph by hand: insert typed nodes, share equal ones, erase what a rewrite leaves.

Dead code elimination is not enough: fx calls dropout and metadata asserts impure and keeps them, and with
them the whole old attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attnc import expr as E
from attnc.capture.alias import _storage_groups as storage_groups
from attnc.capture.alias import writes
from attnc.errors import RewriteError
from attnc.expr import Expr
from attnc.sizes import dim

aten = torch.ops.aten


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode that the graph's values were traced with.

    Raises:
        RewriteError: no node holds a fake tensor.
    """
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    raise RewriteError("expected a graph traced with fake tensors, found none on any node")


class Builder:
    """Insert calls before a point of ``graph``; equal calls are made once, where the first one comes before.

    Reading the same node gives the same value everywhere: links to nodes that are written later do not exist.

    ``stamp`` goes into the ``attnc`` entry of each new node's meta, so that any node tells who made it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = fake_mode_of(graph)
        self.stamp: Mapping[str, Any] = {}
        self.like: fx.Node | None = None
        self._point: fx.Node | None = None
        self._made: dict[Any, fx.Node] = {}
        self._values: dict[Any, Any] = {}
        self._sizes: dict[Expr, fx.Node] = {}
        self._read_sizes()

    def _read_sizes(self) -> None:
        """Note which placeholder (or its axis) gives each symbolic size, and which node computes one."""
        self._axes: dict[Expr, tuple[fx.Node, int]] = {}
        self._computed: dict[Expr, list[fx.Node]] = {}
        inputs = ("placeholder", "get_attr")
        self._first: fx.Node = next(n for n in self.graph.nodes if n.op not in inputs)
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if node.op != "placeholder":
                if isinstance(val, torch.SymInt) and node.target is not aten.sym_size.int:
                    self._computed.setdefault(dim(val), []).append(node)
                continue
            if isinstance(val, torch.SymInt):
                self._sizes.setdefault(dim(val), node)
            elif isinstance(val, torch.Tensor):
                for i, n in enumerate(val.shape):
                    if not isinstance(n, int):
                        self._axes.setdefault(dim(n), (node, i))

    def before(
        self, node: fx.Node, stamp: Mapping[str, Any] | None = None, like: fx.Node | None = None
    ) -> Builder:
        """Insert before ``node`` from now on.

        New nodes take module and source line from ``like`` (default: ``node``).
        """
        self._point, self.stamp, self.like = node, stamp or {}, like or node
        return self

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Return a node calling ``target``; its meta value comes from running it on fake tensors."""
        key = (target, _frozen(args), _frozen(kwargs))
        assert self._point is not None, "call before() first"
        made = self._made.get(key)
        if made is not None and not made._erased and made < self._point:
            return made
        val = self._value(target, args, kwargs)
        with self.graph.inserting_before(self._point):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = val
        node.meta["attnc"] = dict(self.stamp)
        if self.like is not None:
            for k in ("nn_module_stack", "stack_trace", "torch_fn"):
                if k in self.like.meta:
                    node.meta[k] = self.like.meta[k]
        self._made[key] = node
        return node

    def _value(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the fake value of a call.

        Layers repeat, so calls on values that look the same are run once.
        """
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        key = (target, _looks(values), _looks(named))
        if key not in self._values:
            with self.mode, torch.no_grad():
                self._values[key] = target(*values, **named)
        return self._values[key]

    def knows(self, n: Expr, near: fx.Node | None = None) -> bool:
        """Say whether ``size`` can compute the size."""
        if E.as_int(n) is not None or n in self._sizes or n in self._axes or _axis_of(near, n) is not None:
            return True
        if self._computed_before(n) is not None:
            return True
        if E.only_generator(n) is not None:
            return False
        return all(self.knows(E.generator(g), near) for mono, _ in E.terms(n) for g in mono)

    def size(self, n: Expr, near: fx.Node | None = None) -> int | fx.Node:
        """Return a size as a number, or as a node that computes it.

        It is computed from the inputs' sizes, or read from an axis of ``near``.

        Raises:
            RewriteError: the size is no polynomial of sizes that some input has, and is not computed yet.
        """
        number = E.as_int(n)
        if number is not None:
            return number
        known = self._sizes.get(n)
        if known is not None and not known._erased:
            return known
        axis = _axis_of(near, n)
        if n in self._axes:
            self._sizes[n] = out = self._at_top(aten.sym_size.int, *self._axes[n])
            return out
        if axis is not None:
            return self.call(aten.sym_size.int, near, axis)
        computed = self._computed_before(n)
        if computed is not None:
            return computed
        if E.only_generator(n) is not None:
            raise RewriteError(f"size {n} is no polynomial of the sizes of the inputs")
        return self._sum(n, near)

    def _computed_before(self, n: Expr) -> fx.Node | None:
        """Return a node of the user's graph that computes the size ahead of where calls are inserted."""
        for node in self._computed.get(n, ()):
            if self._point is not None and not node._erased and node < self._point:
                return node
        return None

    def _sum(self, n: Expr, near: fx.Node | None) -> int | fx.Node:
        total: int | fx.Node | None = None
        for mono, c in E.terms(n):
            part: int | fx.Node = c
            for g in mono:
                factor = self.size(E.generator(g), near)
                part = (
                    factor
                    if isinstance(part, int) and part == 1
                    else self._at_top(operator.mul, part, factor)
                )
            total = part if total is None else self._at_top(operator.add, total, part)
        assert total is not None, "zero is a number"
        if isinstance(total, fx.Node) and total.meta.get("attnc_top"):
            self._sizes[n] = total
        return total

    def _top(self) -> fx.Node:
        """Return the first node of the user that is not an input; sizes are computed before it."""
        if self._first._erased:
            inputs = ("placeholder", "get_attr")
            of_user = (n for n in self.graph.nodes if n.op not in inputs and not n.meta.get("attnc_top"))
            self._first = next(of_user)
        return self._first

    def _at_top(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Compute a size behind the inputs, where all may use it, or here if it reads a later node."""
        early = all(a.op == "placeholder" or a.meta.get("attnc_top") for a in args if isinstance(a, fx.Node))
        point = self._point
        if early:
            self._point = self._top()
        node = self.call(target, *args)
        if early:
            node.meta["attnc_top"] = True
        self._point = point
        return node

    def reshape(self, x: fx.Node, sizes: Sequence[Expr]) -> fx.Node:
        """Return ``x`` with the sizes given, itself if it has them already."""
        if tuple(dim(n) for n in x.meta["val"].shape) == tuple(sizes):
            return x
        return self.call(aten.reshape.default, x, [self.size(n, x) for n in sizes])

    def permute(self, x: fx.Node, axes: Sequence[int]) -> fx.Node:
        """Return ``x`` with its axes in a new order."""
        return x if list(axes) == sorted(axes) else self.call(aten.permute.default, x, list(axes))

    def expand(self, x: fx.Node, sizes: Sequence[Expr]) -> fx.Node:
        """Return ``x`` broadcast to the sizes given, without a copy."""
        if tuple(dim(n) for n in x.meta["val"].shape) == tuple(sizes):
            return x
        return self.call(aten.expand.default, x, [self.size(n, x) for n in sizes])

    def apply(self, x: fx.Node, steps: Iterable[tuple[str, tuple[Any, ...]]]) -> fx.Node:
        """Apply the view steps of a recipe to ``x``."""
        for name, arg in steps:
            if name == "reshape":
                x = self.reshape(x, arg)
            elif name == "permute":
                x = self.permute(x, arg)
            elif name == "expand":
                x = self.expand(x, arg)
            elif name == "select":
                x = self.call(aten.select.int, x, arg[0], self.size(arg[1], x))
            elif name == "slice":
                x = self.call(aten.slice.Tensor, x, arg[0], self.size(arg[1], x), self.size(arg[2], x))
            else:
                raise AssertionError(f"unknown view step {name!r}")
        return x


def _axis_of(near: fx.Node | None, n: Expr) -> int | None:
    """Return the axis of a node whose size is the symbol or polynomial ``n``."""
    val = near.meta.get("val") if near is not None else None
    if not isinstance(val, torch.Tensor):
        return None
    return next((i for i, m in enumerate(val.shape) if not isinstance(m, int) and dim(m) == n), None)


def _frozen(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return ("seq", *map(_frozen, x))
    if isinstance(x, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in x.items()))
    return (type(x).__name__, x)


def _looks(x: Any) -> Any:
    """Return what of a fake value decides the result's metadata."""
    if isinstance(x, torch.Tensor):
        sizes = tuple(map(dim, (*x.shape, *x.stride())))
        return ("tensor", x.dtype, x.device, sizes, dim(x.storage_offset()), x.requires_grad)
    if isinstance(x, torch.SymInt):
        return ("size", dim(x))
    if isinstance(x, list | tuple):
        return ("seq", *map(_looks, x))
    if isinstance(x, dict):
        return tuple(sorted((k, _looks(v)) for k, v in x.items()))
    return (type(x).__name__, x)


class SharedMemory:
    """Which nodes of a graph share memory, if any node writes at all; worked out at the first question.

    Nodes that are added later share nothing that is known here.  ``alive`` are nodes whose values are known
    to be read in the end.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.alive: set[fx.Node] = set()
        self._alike: dict[fx.Node, list[fx.Node]] | None = None

    def of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that share written memory with ``node``, itself included; else ``node`` alone."""
        if self._alike is None:
            self._alike = self._index()
        return [n for n in self._alike.get(node, (node,)) if not n._erased]

    def _index(self) -> dict[fx.Node, list[fx.Node]]:
        """Return, per node, the nodes of its group; nothing where no node writes."""
        if not any(writes(n) for n in self.graph.nodes):
            return {}
        groups = storage_groups(self.graph)
        members: dict[int, list[fx.Node]] = {}
        for node, group in groups.items():
            members.setdefault(group, []).append(node)
        return {node: members[group] for node, group in groups.items()}


def erase(
    graph: fx.Graph,
    roots: Iterable[fx.Node],
    keep: frozenset[str] = frozenset(),
    shared: SharedMemory | None = None,
) -> list[str]:
    """Erase nodes that have no users, from ``roots`` backwards, whatever fx thinks of their purity.

    Inputs of the graph and nodes named in ``keep`` stay, and so do ops that write to memory which anybody
    else may read; memory that is written and never read goes with all its writers. ``shared`` spares asking
    again which memory is whose. Returns the names of what is gone.
    """
    gone: list[str] = []
    stack = list(roots)
    shared = shared or SharedMemory(graph)

    def drop(node: fx.Node) -> None:
        stack.extend(node.all_input_nodes)
        gone.append(node.name)
        graph.erase_node(node)

    def closed(node: fx.Node) -> bool:
        """Say whether nothing but its own writers reads the memory of ``node``."""
        alike = shared.of(node)
        return all(
            n.op == "call_function" and n.name not in keep and set(n.users) <= set(alike) for n in alike
        )

    def doomed(node: fx.Node) -> bool:
        """Say whether all that is made from ``node`` ends in asserts, or in memory that nobody reads.

        What is found alive stays so for later calls: to leave too much is safe.
        """
        path = [iter([node])]
        walked: list[fx.Node] = []
        while path:
            n = next(path[-1], None)
            if n is None:
                path.pop()
                del walked[max(0, len(path) - 1) :]
            elif n.op != "call_function" or n.name in keep or n in shared.alive:
                shared.alive.update(walked)
                return False
            elif writes(n):
                if not closed(n):
                    shared.alive.update((*walked, n))
                    return False
            elif not _metadata_only(n):
                walked.append(n)
                path.append(iter(list(n.users)))
        return True

    def drop_with_users(node: fx.Node) -> None:
        for user in list(node.users):
            if not user._erased:
                drop_with_users(user)
        if not node._erased:
            drop_memory_of(node) if writes(node) else drop(node)

    def drop_memory_of(node: fx.Node) -> None:
        for n in reversed(shared.of(node)):
            drop(n)

    while stack:
        node = stack.pop()
        if node._erased or node.op in ("placeholder", "output") or node.name in keep:
            continue
        for user in list(node.users):
            if not user._erased and doomed(user):
                drop_with_users(user)
        if node._erased:
            continue
        if not node.users and not writes(node):
            drop(node)
        elif closed(node):
            drop_memory_of(node)
    return gone


def _metadata_only(node: fx.Node) -> bool:
    return "_assert_tensor_metadata" in str(node.target)
