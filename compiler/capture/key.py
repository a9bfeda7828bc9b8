"""Say what a captured program depends on beside sizes: the module tree and the kinds of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

PLAIN = (
    int,
    float,
    bool,
    str,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers' hooks for output_attentions and the like do nothing unless asked, and are captured with the
# forward.
_HARMLESS_HOOKS = frozenset({"transformers.utils.output_capturing"})


class Tree:
    """A module tree as it was when looked at: its modules, their hooks, and where their weights are found."""

    def __init__(self, root: nn.Module) -> None:
        named = list(root.named_modules())
        self._modules = [m for _, m in named]
        self._children = [(m._modules, tuple(m._modules.values())) for m in self._modules if m._modules]
        self._hooks: list[tuple[str, dict[int, Any]]] = [
            (n, getattr(m, hooks)) for n, m in named if n for hooks in HOOKS
        ]
        self._tables = [table for m in self._modules for table in (m._parameters, m._buffers)]

    def changed(self) -> bool:
        """Say whether a submodule was added, removed or replaced."""
        return any(tuple(now.values()) != before for now, before in self._children)

    def hooked(self) -> str | None:
        """Name a submodule with hooks that a program would not call, or torch itself; None if none has."""
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "torch (globally)"
        for name, hooks in self._hooks:
            if hooks and not all(harmless(h) for h in hooks.values()):
                return name
        return None

    def state(self) -> tuple[Any, ...]:
        """Return what a program depends on: training flags, the weights' dtypes and devices, autocast."""
        weights = [None if t is None else (t.dtype, t.device) for d in self._tables for t in d.values()]
        return tuple([m.training for m in self._modules]), tuple(weights), _autocast()


def being_traced() -> bool:
    """Say whether this very call is traced.

    During an export torch says so to all threads, and keeps one stack of pre-dispatch modes for all of them;
    the dispatch keys are of the thread.
    """
    return torch.compiler.is_compiling() and (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def in_forward_mode() -> bool:
    """Say whether tensors may carry tangents: forward mode is on, as in ``torch.func.jvp``."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def harmless(hook: object) -> bool:
    """Say whether a captured program does all that this hook does."""
    return getattr(hook, "__module__", "") in _HARMLESS_HOOKS


def _autocast() -> tuple[Any, ...]:
    """Return which devices autocast, and to what."""
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return tuple((d, torch.get_autocast_dtype(d)) for d in on)


def kind(leaf: object) -> tuple[Any, ...] | None:
    """Return what of an argument a program depends on beside sizes; None for one that no program can take."""
    if isinstance(leaf, torch.Tensor):
        plain = type(leaf) in (torch.Tensor, nn.Parameter) or being_traced()
        return (leaf.dtype, leaf.ndim, leaf.device) if plain and leaf.layout is torch.strided else None
    return (type(leaf), leaf) if type(leaf) in PLAIN else None


def opaque(leaves: Sequence[Any]) -> str:
    """Name the type of the first argument that no program can take."""
    return next(type(leaf).__name__ for leaf in leaves if kind(leaf) is None)
