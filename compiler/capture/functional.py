"""Make a torch-level or ATen graph functional ATen before autograd, with the same inputs.

The one place that uses ``aot_export_module``, which is private to torch.

Switches of autocast inside a graph are not followed by that tracer: it records them and traces on as if they
were not there (torch 2.13), so dtypes come out wrong.  Here they act while tracing as well.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from attnc.capture.alias import bypass, hidden_writes

aten = torch.ops.aten
ENTER, EXIT = "_enter_autocast", "_exit_autocast"


class Declined(Exception):
    """This graph is handed on as it came; the message says why."""


def functional(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Return ``gm`` as functional ATen before autograd, and the signature that torch gives with it.

    Raises:
        Declined: torch cannot make it functional, or would lose a write.
    """
    from torch._functorch.aot_autograd import aot_export_module

    source = _with_acting_switches(_safe_to_functionalize(gm))
    try:
        with warnings.catch_warnings(), _same_state():
            warnings.simplefilter("ignore")  # the tracer's own, about its own doings
            aten, signature = aot_export_module(source, tuple(inputs), trace_joint=False, pre_dispatch=True)
    # A tracer raises nearly every type there is.  The graph is handed on as it was, and the reason is told.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Declined(f"torch could not make it functional ({type(error).__name__}: {lines[0]})") from error
    assert isinstance(aten, fx.GraphModule)
    _differentiable(aten.graph)
    return aten, signature


def _differentiable(graph: fx.Graph) -> None:
    """Spell ``aten.copy`` in operations that have a derivative; functionalization makes it of ``copy_``."""
    call = graph.call_function
    for node in [n for n in graph.nodes if n.target is aten.copy.default]:
        into, value = (n.meta["val"] for n in node.args[:2])
        with graph.inserting_before(node):
            new = node.args[1]
            if value.dtype != into.dtype or value.device != into.device:
                new = call(aten._to_copy.default, (new,), {"dtype": into.dtype, "device": into.device})
                new.meta["val"] = value = value.to(into.device, into.dtype)
            if _exprs(value.shape) != _exprs(into.shape):
                new = call(aten.expand.default, (new, _read_sizes(graph, node.args[0], into)))
                new.meta["val"] = value.expand(into.shape)
            if _is_row_major(into) or not into.ndim:
                new = call(aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
            else:  # a write to all of it, which keeps the strides that later views rely on
                new = call(aten.slice_scatter.default, (node.args[0], new))
        new.meta = {**node.meta}
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _exprs(sizes: Sequence[Any]) -> list[Any]:
    """Return sizes as numbers and expressions, which compare without a guard."""
    return [n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes]


def _is_row_major(value: torch.Tensor) -> bool:
    expected: Any = 1
    for size, stride in reversed(list(zip(_exprs(value.shape), _exprs(value.stride()), strict=True))):
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def _read_sizes(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> list[int | fx.Node]:
    """Return the sizes of ``node``, those that are not numbers as nodes that read them off it."""
    sizes: list[int | fx.Node] = []
    for i, n in enumerate(value.shape):
        if isinstance(n, torch.SymInt):
            read = graph.call_function(aten.sym_size.int, (node, i))
            read.meta["val"] = n
            sizes.append(read)
        else:
            sizes.append(n)
    return sizes


def switches_autocast(graph: fx.Graph) -> bool:
    """Say whether ``graph`` enters autocast somewhere."""
    return any(is_switch(n, ENTER) for n in graph.nodes)


def is_switch(node: fx.Node, name: str) -> bool:
    """Say whether ``node`` is a switch of autocast: ``ENTER`` or ``EXIT``."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == name


def _safe_to_functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm``, or a copy without the dropouts through which functionalization would lose a write."""
    if any(hidden_writes(gm.graph)):
        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        dropouts, others = hidden_writes(gm.graph)
        if others:
            raise Declined(
                f"it writes to a view that {others[0].target} may return, which torch loses track of"
            )
        bypass(dropouts)
        gm.recompile()
    return gm


def _with_acting_switches(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm``, or a copy whose switches of autocast are recorded and also act when it is traced."""
    if not switches_autocast(gm.graph):
        return gm
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    acting: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        with gm.graph.inserting_after(node):
            if is_switch(node, ENTER):
                acting[node] = gm.graph.call_function(enter, node.args)
            elif is_switch(node, EXIT) and node.args[0] in acting:
                gm.graph.call_function(leave, (acting[node.args[0]],))
    gm.recompile()
    return gm


Switch = tuple[str, bool, torch.dtype, bool]


def enter(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None = None) -> Switch:
    """Turn autocast on or off as a graph's own switch would, without its cache; return what was before."""
    before = (
        device,
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.is_autocast_cache_enabled(),
    )
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype or before[2])
    torch.set_autocast_cache_enabled(False)
    return before


def leave(before: Switch) -> None:
    """Restore what ``enter`` returned."""
    device, enabled, dtype, cache = before
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cache)


@contextmanager
def _same_state() -> Iterator[None]:
    """Restore autocast, and functorch's nesting, which a tracing that fails inside vmap leaves behind."""
    devices = ("cpu", "cuda")
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cache = torch.is_autocast_cache_enabled()
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        for device, enabled, dtype in before:
            leave((device, enabled, dtype, cache))
