"""The graph being read: values by name, calls on fake tensors, and links back to the file.

A value is an fx node, or a small integer tensor whose elements are known as numbers and symbolic sizes, or
both: a constant.  A rule asks the reader for an input in the form it needs and returns what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from attnc.codegen.onnx.reading.symbols import Size, Symbols
from attnc.codegen.onnx.reading.tensors import to_torch, torch_type
from attnc.editing import _looks as looks

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten
Items = np.ndarray[Any, np.dtype[np.object_]]
"""Elements of a small integer tensor: numbers and symbolic sizes."""
AXES, VARYING = 16, 6
"""Axes of a tensor that is followed, and those of varying size: with ten, one product takes torch seconds."""
KNOWN = 256
"""Elements of the largest integer tensor whose elements are followed one by one."""
STORED = 1 << 22
"""Elements of the largest constant that is looked at; a larger one is known to be constant and no more."""


class UnreadError(Exception):
    """This node has no reading: the words say why, and it becomes an opaque call."""


@dataclass(slots=True)
class Entry:
    """A value as read: a node, known elements, or both.  ``value`` is where the file has it."""

    node: fx.Node | None = None
    items: Items | None = None
    dtype: torch.dtype = torch.int64
    value: ir.Value | None = None
    tensor: torch.Tensor | None = None


def size_in_file() -> int:
    """Stand for a size that the file computes; its symbol is the node's value, and links say where it is."""
    raise NotImplementedError("a size that the file computes is not run here")


def unread(*inputs: Any) -> Any:
    """Stand for an operator that is not read; only its shape is known."""
    raise NotImplementedError("an operator that is not read is not run here")


@dataclass
class Reader:
    """Hold the fx graph while it is built.  ``opset`` is that of the default domain.

    ``links`` maps nodes to the values of the file that they are, ``origins`` to the file's nodes that made
    them, ``sizes`` says which element of which value a symbolic size is, ``real`` holds small constants.
    """

    symbols: Symbols
    opset: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    entries: dict[ir.Value, Entry] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor | None] = field(default_factory=dict)
    links: dict[str, ir.Value] = field(default_factory=dict)
    origins: dict[str, ir.Node] = field(default_factory=dict)
    sizes: dict[str, tuple[ir.Value, int]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    at: ir.Node | None = None
    real: dict[str, torch.Tensor] = field(default_factory=dict)
    _front: fx.Node | None = None
    _values: dict[Any, Any] = field(default_factory=dict)

    # ------------------------------------------------------------ inputs of a node

    def entry(self, n: ir.Node, i: int) -> Entry | None:
        """Return input ``i``, None if it is left out."""
        value = n.inputs[i] if i < len(n.inputs) else None
        if value is None:
            return None
        found = self.entries.get(value)
        if found is None:
            raise UnreadError(f"its input {value.name} is not read")
        return found

    def x(self, n: ir.Node, i: int) -> fx.Node:
        """Return input ``i`` as a node of known shape.

        Raises:
            UnreadError: it is left out, or nothing is known of its shape.
        """
        found = self.maybe(n, i)
        if found is None:
            raise UnreadError(f"its input {i} is left out")
        return found

    def maybe(self, n: ir.Node, i: int) -> fx.Node | None:
        """Return input ``i`` as a node, None if it is left out."""
        found = self.entry(n, i)
        return None if found is None else self.node(found)

    def node(self, e: Entry) -> fx.Node:
        """Return a value as a node of known shape."""
        if e.node is None:
            e.node = self._spelled(e)
        val = e.node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            raise UnreadError("the shape of an input is not known")
        varying = sum(not isinstance(n, int) for n in val.shape)
        if val.ndim > AXES or varying > VARYING:
            raise UnreadError(
                f"an input has {val.ndim} axes of at most {AXES}, {varying} of varying size of {VARYING}"
            )
        return e.node

    def items(self, n: ir.Node, i: int) -> Items | None:
        """Return the elements of input ``i``, None if they are not known or it is left out."""
        found = self.entry(n, i)
        return None if found is None else found.items

    def numbers(self, n: ir.Node, i: int) -> list[int] | None:
        """Return input ``i`` as numbers, None if it is left out.

        Raises:
            UnreadError: they are not known, or not all are numbers.
        """
        found = self.entry(n, i)
        if found is None:
            return None
        if found.items is None or any(isinstance(x, torch.SymInt) for x in found.items.flat):
            raise UnreadError(f"its input {i} is no constant")
        return [int(x) for x in found.items.flat]

    def arguments(self, n: ir.Node, i: int) -> list[int | fx.Node]:
        """Return the elements of input ``i`` as arguments of a call: numbers, and nodes for symbolic sizes.

        Raises:
            UnreadError: the elements are not known.
        """
        found = self.entry(n, i)
        if found is None or found.items is None:
            raise UnreadError(f"the elements of its input {i} are not known")
        return [self.argument(x, found, j) for j, x in enumerate(found.items.flat)]

    def argument(self, x: Any, e: Entry, j: int) -> int | fx.Node:
        """Return element ``j`` of ``e``, which is ``x``, as an argument of a call."""
        if not isinstance(x, torch.SymInt):
            return int(x)
        assert e.value is not None, "a symbolic size comes from the file"
        node = self.graph.call_function(size_in_file)
        self._note(node, x)
        self.sizes[node.name] = (e.value, j)
        return node

    def scalar(self, n: ir.Node, i: int) -> int | float | fx.Node | None:
        """Return input ``i`` as a number, or as a symbolic size, if it has one element; else None."""
        e = self.entry(n, i)
        if e is None:
            return None
        if e.items is not None and e.items.size == 1 and e.dtype != torch.bool:
            return self.argument(e.items.flat[0], e, 0)
        if e.tensor is not None and e.tensor.numel() == 1 and e.dtype != torch.bool:
            number: int | float = e.tensor.item()
            return number
        return None

    # ------------------------------------------------------------ making nodes

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call and return its node; its value comes from running it on fake tensors.

        Layers repeat, so calls on values that look the same are run once.
        """
        values, named = fx.node.map_arg((args, kwargs), lambda x: x.meta["val"])
        key = (target, looks(values), looks(named))
        if key not in self._values:
            with self.symbols.mode, torch.no_grad():
                self._values[key] = target(*values, **named)
        val = self._values[key]
        node = self.graph.call_function(target, args, kwargs)
        self._note(node, val)
        self._fold(node)
        return node

    def _fold(self, node: fx.Node) -> None:
        """Work out a small tensor that is made from small constants alone."""
        val, inputs = node.meta["val"], node.all_input_nodes
        if not isinstance(val, torch.Tensor) or not inputs or any(x.name not in self.real for x in inputs):
            return
        if all(isinstance(n, int) for n in val.shape) and val.numel() <= KNOWN:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda x: self.real[x.name])
            assert callable(node.target), f"{node} calls nothing"
            self.real[node.name] = node.target(*args, **kwargs)

    def made(self, node: fx.Node, value: ir.Value) -> Entry:
        """Return what a rule made as an entry, with its elements where they are known."""
        t = self.real.get(node.name)
        return Entry(node, self._items(t), node.meta["val"].dtype, value, t)

    def _items(self, t: torch.Tensor | None) -> Items | None:
        if t is None or t.numel() > KNOWN or t.dtype not in (torch.int64, torch.int32, torch.bool):
            return None
        return as_items(t.tolist(), list(t.shape))

    def pad(self, x: fx.Node, pads: Sequence[int | fx.Node], fill: float) -> fx.Node:
        """Append a constant padding; ``pads`` has two sizes per axis, the last axis first.

        Its shape is worked out here: run on a fake tensor, torch takes free sizes for numbers.
        """
        val = x.meta["val"]
        sizes = list(val.shape)
        for i, p in enumerate(pads):
            d = len(sizes) - 1 - i // 2
            sizes[d] = sizes[d] + (p.meta["val"] if isinstance(p, fx.Node) else p)
        node = self.graph.call_function(aten.constant_pad_nd.default, (x, list(pads), fill))
        self._note(node, self.fake(sizes, val.dtype))
        return node

    def opaque(self, inputs: Sequence[fx.Node], val: Any) -> fx.Node:
        """Append a call that is not read, with the value that it is known to have; None if it is not."""
        node = self.graph.call_function(unread, tuple(inputs))
        self._note(node, val)
        return node

    def fake(self, sizes: Sequence[Size], dtype: torch.dtype) -> torch.Tensor:
        """Return a fake tensor.

        Raises:
            UnreadError: no tensor has such sizes: negative, or too large to be multiplied.
        """
        with self.symbols.mode, torch.no_grad():
            try:
                return torch.empty(list(sizes), dtype=dtype)
            except (RuntimeError, TypeError) as e:
                raise UnreadError(f"no tensor has the sizes {list(sizes)}") from e

    def _note(self, node: fx.Node, val: Any) -> None:
        node.meta["val"] = val
        node.meta.update(self.meta)
        if self.at is not None:
            self.origins[node.name] = self.at

    def placeholder(self, name: str, val: torch.Tensor | None) -> fx.Node:
        """Add an input of the graph, behind those that it has."""
        clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
        if self._front is None:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after():
                node = self.graph.placeholder(clean if clean[:1].isalpha() else f"v_{clean}")
        else:
            with self.graph.inserting_after(self._front):
                node = self.graph.placeholder(clean if clean[:1].isalpha() else f"v_{clean}")
        self._front = node
        node.meta["val"] = val
        return node

    def constant(self, tensor: ir.TensorProtocol, value: ir.Value | None, name: str) -> Entry | None:
        """Return a stored tensor as an entry, None if it has a type that torch has not."""
        dtype = torch_type(tensor.dtype)
        if dtype is None:
            return None
        sizes = [int(n) for n in tensor.shape.numpy()]
        count = math.prod(sizes)
        stored = to_torch(tensor) if count <= STORED else None
        node = self.placeholder(name, self.fake(sizes, dtype))
        self.tensors[node.name] = stored
        if value is not None:
            self.links[node.name] = value
        if stored is not None and count <= KNOWN:
            self.real[node.name] = stored
        return Entry(node, self._items(stored), dtype, value, stored)

    def _spelled(self, e: Entry) -> fx.Node:
        """Return known elements as a tensor node: a constant if all are numbers."""
        assert e.items is not None, "an entry is a node or known elements"
        if not any(isinstance(x, torch.SymInt) for x in e.items.flat):
            t = torch.tensor([int(x) for x in e.items.flat], dtype=e.dtype).reshape(e.items.shape)
            name = e.value.name if e.value is not None and e.value.name else "known"
            node = self.placeholder(name, self.fake(t.shape, e.dtype))
            self.tensors[node.name], self.real[node.name], e.tensor = t, t, t
        else:
            parts = [
                self.call(aten.scalar_tensor.default, self.argument(x, e, j), dtype=e.dtype)
                for j, x in enumerate(e.items.flat)
            ]
            shape = list(e.items.shape)
            node = self.call(aten.stack.default, parts) if len(parts) > 1 else parts[0]
            if shape and (len(parts) == 1 or len(shape) > 1):
                node = self.call(aten.reshape.default, node, shape)
        if e.value is not None:
            self.links.setdefault(node.name, e.value)
        return node

    # ------------------------------------------------------------ shapes

    def align(self, *nodes: fx.Node, skip: int = 0) -> None:
        """See that operands broadcast, but for their last ``skip`` axes.

        Raises:
            EqualSizesError: two sizes must be one.
        """
        shapes = [list(x.meta["val"].shape)[: len(x.meta["val"].shape) - skip] for x in nodes]
        rank = max(map(len, shapes))
        for axis in range(1, rank + 1):
            sizes = [s[-axis] for s in shapes if len(s) >= axis and not is_one(s[-axis])]
            for other in sizes[1:]:
                if not same(sizes[0], other):
                    self.symbols.require_equal(sizes[0], other)


def is_one(size: Size) -> bool:
    """Say whether a size is the number 1."""
    return isinstance(size, int) and size == 1


def same(a: Size, b: Size) -> bool:
    """Say whether two sizes are the same term."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def as_items(values: Any, shape: Sequence[int]) -> Items:
    """Return numbers and symbolic sizes, in row-major order or nested, as elements of a tensor."""
    flat: list[Any] = []

    def walk(x: Any) -> None:
        if isinstance(x, list | tuple):
            for y in x:
                walk(y)
        else:
            flat.append(x)

    walk(values)
    out = np.empty(len(flat), dtype=object)
    for i, x in enumerate(flat):
        out[i] = x
    return out.reshape(tuple(shape))
