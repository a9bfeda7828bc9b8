"""What a graph computes from nothing but its own constants: evaluated once, and fitted with a closed form.

Buffers and lifted constants are constants; parameters are not (they train), nor is anything that the user
passes.  A fit holds at the sizes of the graph, which are fixed where its values are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from attnc.expr import Expr
from attnc.passes.detect.graph import tensor_of
from attnc.passes.detect.masks.fit import LARGEST, Fit, fit

COMPUTED = 1 << 22
"""Elements of the largest tensor that is computed in order to look at it."""
DEEPEST = 400
"""Nodes of the largest sub-graph that is computed."""


class Constants:
    """Constants of one working graph; ``tensors`` has those that are known by the names of their nodes."""

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self.tensors = tensors
        self._values: dict[str, Tensor | None] = {}
        self._fits: dict[str, Fit | None] = {}
        self._left = 0

    def stored(self, name: str) -> Tensor | None:
        """Return a tensor that the model stores and does not train, None if it has no such values."""
        t = self.tensors.get(name)
        if (
            t is None
            or isinstance(t, FakeTensor | torch.nn.Parameter)
            or t.is_meta
            or t.layout != torch.strided
        ):
            return None
        return t

    def at(self, node: fx.Node, index: Sequence[Expr]) -> Expr | None:
        """Return the closed form of a constant node's element, None if it is no constant or has none."""
        if node.name not in self._fits:
            value = self._value(node)
            self._fits[node.name] = None if value is None else fit(value)
        found = self._fits[node.name]
        return None if found is None else found(index)

    def condition(self, name: str) -> str | None:
        """Return what a closed form of this node stands on, in words, None if none was given."""
        if self._fits.get(name) is None:
            return None
        stored = self.stored(name) is not None
        return f"{name} holds the values it held" if stored else f"{name} has the sizes it had"

    def _value(self, node: fx.Node) -> Tensor | None:
        stored = self.stored(node.name)
        if stored is not None:
            return stored if stored.numel() <= LARGEST else None
        if node.op != "call_function" or not _is_small(node) or not self._is_constant(node):
            return None
        self._left = DEEPEST
        try:
            with unset_fake_temporarily(), torch.no_grad():
                found = self._computed(node)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return None  # the op does not run on these constants as it stands in the graph
        return found if isinstance(found, Tensor) and not found.is_meta else None

    def _is_constant(self, node: fx.Node) -> bool:
        """Say whether the node is computed from constants by ops that always give the same."""
        seen: set[str] = set()
        stack = [node]
        while stack:
            n = stack.pop()
            if n.name in seen:
                continue
            seen.add(n.name)
            if len(seen) > DEEPEST:
                return False
            if self.stored(n.name) is not None:
                continue
            if n.op != "call_function" or not _repeats_itself(n) or not _is_small(n):
                return False
            stack += n.all_input_nodes
        return True

    def _computed(self, node: fx.Node) -> Any:
        if node.name in self._values:
            return self._values[node.name]
        stored = self.stored(node.name)
        if stored is None:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._computed)
            assert callable(node.target), f"{node} calls nothing"
            stored = node.target(*args, **kwargs)
        self._values[node.name] = stored
        return stored


def _repeats_itself(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in tags
    return not random and (schema is None or not schema.is_mutable)


def _is_small(node: fx.Node) -> bool:
    """Say whether the node's tensors have fixed sizes and few elements; symbols are not small."""
    val = node.meta.get("val")
    values = val if isinstance(val, list | tuple) else [val]
    for v in values:
        if isinstance(v, Tensor):
            if not all(isinstance(n, int) for n in v.shape) or v.numel() > COMPUTED:
                return False
        elif not isinstance(v, int | float | bool):
            return False
    return tensor_of(node) is not None or isinstance(val, list | tuple | int | float)
