"""The same model with another forward: a clone of a subclass, which shares tensors and module paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from attnc.errors import CaptureError
from attnc.result import clone_module


def with_forward(
    model: nn.Module,
    names: tuple[str, ...],
    call: Callable[[type, nn.Module, dict[str, Any]], Any],
    **attributes: Any,
) -> nn.Module:
    """Return a clone of ``model`` whose forward takes ``names`` and is ``call(class, module, inputs)``.

    It is of a subclass with the same name and these class ``attributes``, so sites keep their module paths.
    """
    base = type(model)

    def forward(self: nn.Module, **inputs: Any) -> Any:
        return call(base, self, inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = inspect.Signature([inspect.Parameter(n, kind) for n in ("self", *names)])
    forward.__signature__ = shown  # type: ignore[attr-defined]
    clone = clone_module(model)
    clone.__dict__.pop("_attnc", None)
    clone.__class__ = type(
        base.__name__, (base,), {"forward": forward, "__module__": base.__module__, **attributes}
    )
    return clone


def bound_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the arguments of a call of ``model`` by name.

    Raises:
        CaptureError: they do not fit its forward.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}: these inputs do not fit its forward: {error}") from error
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named
