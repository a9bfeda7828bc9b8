"""Choose the submodules to capture where a model cannot be captured as a whole.

The model runs once with hooks that keep what each submodule is first called with.  From the top of the module
tree down, a submodule is taken as soon as it can be captured by itself on those inputs; only where it cannot
are its parts tried.  So the largest pieces are found first, and no piece lies inside another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnc.capture.trial import copied, unchanged
from attnc.capture.types import Captured

Capture = Callable[[str, tuple[Any, ...], dict[str, Any]], str]
"""Capture one submodule on the inputs of its first call: '' if that went well, else why not."""


@dataclass(frozen=True)
class Coverage:
    """How one module was captured: ``whole``, ``dynamo``, ``piece``, or not at all (``none``), and why so."""

    module: str
    how: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the entry of a report."""
        return {"module": self.module, "how": self.how, "reason": self.reason}


def first_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run ``model`` once; return what each submodule was first called with, by path, in order of the tree.

    The inputs are copies.  Nothing of the model is changed.  Raises whatever the model raises.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = pytree.tree_map(copied, (given, named))

        return hook

    named = [(n, m) for n, m in model.named_modules() if n]
    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in named]
    try:
        given, keyword = pytree.tree_map(copied, (args, dict(kwargs)))
        with unchanged(model), torch.no_grad():
            model(*given, **keyword)
    finally:
        for handle in handles:
            handle.remove()
    return {n: calls[n] for n, _ in named if n in calls}


def capture_pieces(
    model: nn.Module,
    calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]],
    captured: Callable[[str], bool],
    capture: Capture,
) -> list[Coverage]:
    """Capture the largest submodules that can be, among those that ran and are not ``captured`` yet.

    Returns what was tried: pieces, and modules that could not be captured although they hold no piece.
    """
    return list(_below(model, "", calls, captured, capture))


def _below(
    module: nn.Module,
    path: str,
    calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]],
    captured: Callable[[str], bool],
    capture: Capture,
) -> Iterator[Coverage]:
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        reason = ""
        if at in calls and not captured(at) and not _is_plain(child):
            reason = capture(at, *calls[at])
            if not reason:
                yield Coverage(at, "piece")
                continue
        inner = list(_below(child, at, calls, captured, capture))
        yield from inner
        below = [n for n in calls if n.startswith(at + ".")]
        if reason and not any(map(captured, below)) and not any(c.how == "piece" for c in inner):
            yield Coverage(at, "none", reason)


def _is_plain(module: nn.Module) -> bool:
    """Say whether this is a layer of torch's without parts, such as Linear: it holds no attention."""
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def put_below(path: str, captured: Captured) -> None:
    """Make the module paths in a capture of the submodule at ``path`` paths of the model."""
    graphs = (captured.graph, captured.work, *(branch.graph for _, branch in captured.branches))
    for graph in {id(g): g for g in graphs}.values():
        for node in graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack:
                below = {k: (".".join(filter(None, (path, str(p)))), cls) for k, (p, cls) in stack.items()}
                node.meta["nn_module_stack"] = below
