"""Edit a graph by hand: insert typed nodes, share equal ones, erase what a rewrite leaves, and prove that it is gone.

Dead code elimination is not enough: fx calls dropout and metadata asserts impure and keeps them, and with them the whole old attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from attnc import expr as E
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
    """Insert calls before a point of ``graph``; equal calls are made once (the graph is functional where we insert).

    ``stamp`` goes into the ``attnc`` entry of each new node's meta, so that any node tells who made it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.mode = fake_mode_of(graph)
        self.stamp: Mapping[str, Any] = {}
        self.like: fx.Node | None = None
        self._point: fx.Node | None = None
        self._made: dict[Any, fx.Node] = {}
        self._sizes: dict[Expr, fx.Node] = {}
        self._read_sizes()

    def _read_sizes(self) -> None:
        """Note which placeholder (or its axis) gives each symbolic size."""
        self._axes: dict[Expr, tuple[fx.Node, int]] = {}
        self._top = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt):
                self._sizes.setdefault(dim(val), node)
            elif isinstance(val, torch.Tensor):
                for i, n in enumerate(val.shape):
                    if not isinstance(n, int):
                        self._axes.setdefault(dim(n), (node, i))

    def before(self, node: fx.Node, stamp: Mapping[str, Any] | None = None, like: fx.Node | None = None) -> Builder:
        """Insert before ``node`` from now on; new nodes take module and source line from ``like`` (default: ``node``)."""
        self._point, self.stamp, self.like = node, stamp or {}, like or node
        return self

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Return a node calling ``target``; its meta value comes from running it on fake tensors."""
        key = (target, _frozen(args), _frozen(kwargs))
        if key in self._made:
            return self._made[key]
        assert self._point is not None, "call before() first"
        values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            val = target(*values, **named)
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

    def size(self, n: Expr, near: fx.Node | None = None) -> int | fx.Node:
        """Return a size as a number or as a node that computes it from the graph's inputs (or from an axis of ``near``).

        Raises:
            RewriteError: the size is no polynomial of sizes that some input has.
        """
        number = E.as_int(n)
        if number is not None:
            return number
        if n in self._sizes:
            return self._sizes[n]
        near_val = near.meta.get("val") if near is not None else None
        if n not in self._axes and isinstance(near_val, torch.Tensor):
            for i, m in enumerate(near_val.shape):
                if not isinstance(m, int) and dim(m) == n:
                    return self.call(aten.sym_size.int, near, i)
        if n in self._axes:
            self._sizes[n] = out = self._at_top(aten.sym_size.int, *self._axes[n])
            return out
        if E.only_generator(n) is not None:
            raise RewriteError(f"size {n} is no polynomial of the sizes of the inputs")
        total: int | fx.Node | None = None
        for mono, c in E.terms(n):
            part: int | fx.Node = c
            for g in mono:
                factor = self.size(E.generator(g), near)
                part = factor if isinstance(part, int) and part == 1 else self._at_top(operator.mul, part, factor)
            total = part if total is None else self._at_top(operator.add, total, part)
        assert total is not None
        if isinstance(total, fx.Node):
            self._sizes[n] = total
        return total

    def _at_top(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Compute a size where it dominates every use: behind the inputs, or here if it reads a later node."""
        early = all(a.op == "placeholder" or a.meta.get("attnc_top") for a in args if isinstance(a, fx.Node))
        point = self._point
        if early:
            self._point = self._top
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


def _frozen(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return ("seq", *map(_frozen, x))
    if isinstance(x, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in x.items()))
    return (type(x).__name__, x)


def erase(graph: fx.Graph, roots: Iterable[fx.Node], keep: frozenset[str] = frozenset()) -> list[str]:
    """Erase nodes that have no users, from ``roots`` backwards, whatever fx thinks of their purity; return their names.

    Inputs of the graph, nodes named in ``keep`` and ops that write to their arguments stay.
    """
    gone: list[str] = []
    stack = [r for r in roots]
    while stack:
        node = stack.pop()
        if node._erased or node.op in ("placeholder", "output") or node.name in keep or _mutates(node):
            continue
        for user in list(node.users):
            if _metadata_only(user) or (not user.users and user.op == "call_function" and not _mutates(user)):
                graph.erase_node(user)
        if node.users:
            continue
        sources = list(node.all_input_nodes)
        gone.append(node.name)
        graph.erase_node(node)
        stack += sources
    return gone


def _metadata_only(node: fx.Node) -> bool:
    return "_assert_tensor_metadata" in str(node.target)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
