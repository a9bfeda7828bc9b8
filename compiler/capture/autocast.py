"""Write down the casts that autocast makes, so that a graph means the same without autocast.

Tracing before dispatch records the user's operations, not autocast's casts, but it records the dtype that
each operation really had.  The casts follow from it: autocast runs an operation on its inputs as they are, or
on all of them in the lower precision, or on all of them in fp32; the first of these that gives the recorded
dtype is what it did, and where two give it they are the same computation (``torch.amp`` documentation,
"Autocast Op Reference").
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnc.capture.alias import writes
from attnc.capture.functional import ENTER, EXIT, Declined, is_switch

aten = torch.ops.aten


def write_casts(graph: fx.Graph, lower: torch.dtype | None) -> None:
    """Insert the casts of every region of ``graph`` under autocast, and remove the switches, in place.

    ``lower`` is the lower precision in force where the graph begins, None where autocast is off there.

    Raises:
        Declined: some operation had a dtype that no casts of its inputs explain, or is a higher-order call.
    """
    held: list[torch.dtype | None] = [lower]
    for node in list(graph.nodes):
        if is_switch(node, ENTER):
            held.append(_precision(node))
        elif is_switch(node, EXIT):
            held.pop()
        elif held[-1] is not None and node.op == "call_function" and _floats(node):
            _cast_inputs(graph, node, held[-1])
    switches = [n for n in graph.nodes if is_switch(n, ENTER) or is_switch(n, EXIT)]
    for node in reversed(switches):
        graph.erase_node(node)


def _precision(enter: fx.Node) -> torch.dtype | None:
    """Return the lower precision that a switch turns on, None if it turns autocast off."""
    device, dtype, enabled = enter.args[:3]
    return (dtype or torch.get_autocast_dtype(str(device))) if enabled else None  # type: ignore[return-value]


def _floats(node: fx.Node) -> bool:
    """Say whether the node makes or reads floating values that autocast may touch."""
    return any(True for n in node.all_input_nodes if _is_castable(n.meta.get("val")))


def _is_castable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _cast_inputs(graph: fx.Graph, node: fx.Node, lower: torch.dtype) -> None:
    """Insert the casts before one operation."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        _cast_in_body(node, lower)
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    wanted = list(_dtypes(node.meta.get("val")))
    for dtype in (None, lower, torch.float32):
        if dtype is not None and writes(node):
            break
        if _gives(node, dtype) == wanted:
            if dtype is not None:
                _insert(graph, node, dtype)
            return
    raise Declined(f"no casts of its inputs explain the dtype of {node.name} under autocast")


def _cast_in_body(call: fx.Node, lower: torch.dtype) -> None:
    """Write the casts into the body of a call that switches gradients.

    One that switches autocast has its own.
    """
    name = call.target.name()  # type: ignore[union-attr]
    holder = next((a for a in call.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
    owner = call.graph.owning_module
    if name == "wrap_with_autocast":
        return
    if name != "wrap_with_set_grad_enabled" or holder is None or owner is None:
        raise Declined(f"autocast around the higher-order call {call.name} cannot be written down")
    body = getattr(owner, str(holder.target))
    written = fx.GraphModule(body, copy.deepcopy(body.graph))
    write_casts(written.graph, lower)
    setattr(owner, str(holder.target), written)


def _gives(node: fx.Node, dtype: torch.dtype | None) -> list[torch.dtype] | None:
    """Return the dtypes that the operation gives for inputs cast to ``dtype``; None if it refuses them."""

    def value(n: fx.Node) -> Any:
        held = n.meta.get("val")
        return held.to(dtype) if dtype is not None and _is_castable(held) else held  # type: ignore[union-attr]

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    mode = next((t.fake_mode for t in pytree.tree_leaves((args, kwargs)) if hasattr(t, "fake_mode")), None)
    try:
        with _quietly_off(), mode or torch.no_grad():
            return list(_dtypes(node.target(*args, **kwargs)))  # type: ignore[operator]
    except RuntimeError:  # torch refuses mixed dtypes so; with fakes nothing else can go wrong here
        return None


@contextmanager
def _quietly_off() -> Iterator[None]:
    """Turn autocast off, and the log of fakes that refuse, which is how mixed dtypes are found out."""
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    fakes = logging.getLogger("torch._subclasses.fake_tensor")
    was, fakes.disabled = fakes.disabled, True
    try:
        for device in on:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        fakes.disabled = was
        for device in on:
            torch.set_autocast_enabled(device, True)


def _dtypes(value: object) -> Iterator[torch.dtype]:
    yield from (t.dtype for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _insert(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Cast every floating input of ``node``, once per input."""
    casts: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for n in node.all_input_nodes:
            held = n.meta.get("val")
            if isinstance(held, torch.Tensor) and _is_castable(held) and held.dtype != dtype:
                cast = graph.call_function(aten.to.dtype, (n, dtype))
                cast.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
                cast.meta["val"] = held.to(dtype)
                casts[n] = cast
    for old, new in casts.items():
        node.replace_input_with(old, new)
