"""Operators of the namespace ``attnc`` whose derivatives in both modes are our own.

``torch.library.custom_op`` knows derivatives in reverse mode only: PyTorch would take the tangents of its
results for zeros.  So an operator here brings its kernel for the dispatch key Autograd.  That kernel sees the
tensors of one level of nested transforms, and it must not start transforms of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_LIBRARY: Any = torch.library.Library("attnc", "FRAGMENT")  # type: ignore[no-untyped-call]
_unpack: Callable[..., Any] = forward_ad.unpack_dual
_make: Callable[..., Any] = forward_ad.make_dual
Below = Callable[..., Any]
"""Runs an operator beneath Autograd, on tensors of the same level."""


class Operator:
    """One operator: ``attnc::name`` with a schema, and the function that it runs.

    The methods register what else it needs and return what they are given; see those of the same names in
    ``torch.library``.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any], device: str | None) -> None:
        self._name, self.__doc__ = name, function.__doc__
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        every = "CompositeExplicitAutograd"
        _LIBRARY.impl(name, function, torch._C._dispatch_key_for_device(device) if device else every)
        self._overload = getattr(torch.ops.attnc, name).default

    def __call__(self, *args: Any) -> Any:
        """Call the operator."""
        return self._overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the results look like."""
        torch.library.register_fake(f"attnc::{self._name}", function, lib=_LIBRARY)
        return function

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Run the operator by another function on a device such as ``cuda``."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            _LIBRARY.impl(self._name, function, torch._C._dispatch_key_for_device(device))
            return function

        return register

    def register_vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say how a batch of calls is run: ``function(info, in_dims, *args)``."""
        torch.library.register_vmap(f"attnc::{self._name}", function, lib=_LIBRARY)
        return function

    def register_vmap_loop(self) -> None:
        """Run a batch of calls one by one."""

        def run(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            rows = [self._overload(*select(args, in_dims, i)) for i in range(info.batch_size)]
            if isinstance(rows[0], Tensor):
                return torch.stack(rows), 0
            stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
            return type(rows[0])(stacked), type(rows[0])([0] * len(stacked))

        self.register_vmap(run)

    def register_autograd(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Give it derivatives: ``kernel(below, *args)`` returns the results."""
        _register(self._overload, kernel, "Autograd")
        return kernel


def operator(
    name: str, schema: str, *, device: str | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """Make the decorated function the operator ``attnc::name``, on one device or on every one."""
    return lambda function: Operator(name, schema, function, device)


def differentiate(overload: Any, kernel: Callable[..., Any]) -> None:
    """Give an operator of ``attnc`` that was made by other means these derivatives in place of its own."""
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta"):  # they go before what has the key Autograd
        _register(overload, kernel, key)


def _register(overload: Any, kernel: Callable[..., Any], key: str) -> None:
    def autograd(keyset: Any, *args: Any) -> Any:
        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        return kernel(below, *args)

    _LIBRARY.impl(overload._opname, autograd, key, with_keyset=True)


def select(args: Sequence[Any], dims: Any, at: int) -> list[Any]:
    """Return the arguments of one call of a batch; ``dims`` has one mapped dimension, or None, for each."""
    dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(args)
    found: list[Any] = []
    for x, dim in zip(args, dims, strict=True):
        if isinstance(x, (list, tuple)):
            found.append(select(x, dim, at))
        else:
            found.append(x.select(dim, at) if isinstance(x, Tensor) and dim is not None else x)
    return found


def tangent_of(x: Tensor | None) -> Tensor | None:
    """Return the tangent that a tensor carries in forward mode, None if it carries none.

    PyTorch has one level of dual tensors.  It is named here: the default is a Python variable, which a graph
    that Dynamo took does not set.
    """
    if x is None or not x.is_floating_point():
        return None
    found: Tensor | None = _unpack(x, level=0).tangent
    return found


def without_tangent(x: Tensor) -> Tensor:
    """Return the tensor's value, which a graph in reverse mode still connects with it."""
    found: Tensor = _unpack(x, level=0).primal
    return found


def with_tangent(x: Tensor, tangent: Tensor) -> Tensor:
    """Return a tensor that carries a tangent."""
    found: Tensor = _make(x, tangent, level=0)
    return found


def is_recorded(*tensors: Tensor | None) -> bool:
    """Say whether a graph in reverse mode is recorded for one of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Node(_SingleLevelFunction):
    """A node of the graph in reverse mode, for one level of nested transforms: made by ``record``."""

    apply: ClassVar[Callable[..., Any]]


def record(node: type[Node], below: Below, *args: Any) -> Any:
    """Return ``node.forward(below, *args)`` and record the node; only a kernel for Autograd may call this.

    PyTorch turns derivatives off in a node's forward, for all levels.  They are off for this one anyway, as
    ``below`` runs beneath Autograd, and the levels that are further out still need theirs.
    """

    def reopened(*args: Any) -> Any:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below(*args)

    with enable_single_level_autograd_function():
        return node.apply(reopened, *args)
