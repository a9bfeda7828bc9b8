"""The instance forward that Dynamo compiles piece by piece, and what it shares with the dispatcher."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from attnc.capture.key import in_forward_mode
from attnc.errors import CheckpointError

RECOMPILES = 64
"""Kinds of call that one frame is compiled for before it runs as it is: layers of one class share a frame."""


class InstanceForward:
    """What both kinds of forward share: the class's forward, its signature, and no pickling."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._original = types.MethodType(type(model).forward, model)
        self.__signature__ = inspect.signature(self._original)
        self.__doc__ = self._original.__doc__
        self.__code__ = inspect.unwrap(type(model).forward).__code__  # torch.export names its sources by it

    @property
    def original(self) -> Callable[..., Any]:
        """The class's forward, on the clone's tensors."""
        return self._original

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled: a captured program is no part of a pickle."""
        raise CheckpointError(
            f"an optimized {type(self._model).__name__} cannot be pickled\n"
            "  try: attnc.save(fast, directory) and attnc.load(directory),"
            " or torch.save(fast.state_dict(), path)"
        )


class LazyForward(InstanceForward):
    """The class's forward, compiled at the first call by a Dynamo backend."""

    def __init__(self, model: nn.Module, backend: Callable[..., Any]) -> None:
        super().__init__(model)
        self._backend = backend
        self._compiled = compiled(self._original, backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the call as the class's forward would, in compiled pieces; in forward mode, as it is."""
        if in_forward_mode():
            return self._original(*args, **kwargs)
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyForward:
        return LazyForward(memo.get(id(self._model), self._model), self._backend)


def compiled(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compile`` of ``function``, with a count of recompiles of its own where torch has that.

    Otherwise Dynamo counts per code object, so that the layers of a deep model, and other models of its class
    in the same process, would use up one small limit and run uncaptured from there on.
    """
    known = inspect.signature(torch.compile).parameters
    wanted = {"recompile_limit": RECOMPILES, "isolate_recompiles": True}
    options: dict[str, Any] = {k: v for k, v in wanted.items() if k in known}
    return torch.compile(function, backend=backend, **options)
