"""Bring attention out of the bodies of higher-order calls, where rules and rewrites cannot follow it.

``torch.export`` puts what runs without gradients, or under autocast, into sub-graphs.  Such a body is written
into the outer graph, where masks can be derived and sites rewritten:

- without gradients, always (a rotary table, say): the body reads detached inputs, so nothing in it is
  recorded for a backward pass and nothing that leaves it requires gradients, as under ``torch.no_grad``;
- autocast, where the body may hold attention: every cast that autocast makes is written down
  (``capture.autocast``).  That is right only where the call itself runs without autocast, which is what a
  program's key asks for.

Branches of ``torch.cond`` stay bodies, since only one of them runs; each is a small captured graph of its
own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc.capture.alias import flat, op_name
from attnc.capture.autocast import write_casts
from attnc.capture.functional import Declined, functional
from attnc.capture.types import Captured
from attnc.programs import copy_program, fix_outputs

aten = torch.ops.aten
_CONTRACTIONS = frozenset({"matmul", "bmm", "baddbmm", "mm", "addmm", "einsum", "tensordot", "__matmul__"})
_FUSED = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def higher_order_calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the calls of higher-order operators in order."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            yield node


def bodies_of(call: fx.Node) -> list[tuple[str, fx.GraphModule]]:
    """Return the sub-graphs that a call reads, with the names under which its graph's owner holds them."""
    owner = call.graph.owning_module
    names = [str(a.target) for a in flat(call.args) if isinstance(a, fx.Node) and a.op == "get_attr"]
    held = [(n, getattr(owner, n, None)) for n in dict.fromkeys(names)]
    return [(n, m) for n, m in held if isinstance(m, fx.GraphModule)]


def may_attend(graph: fx.Graph) -> bool:
    """Say whether ``graph`` or a body in it may hold attention: two contractions, or one fused call."""
    names = [op_name(n) for n in graph.nodes if n.op in ("call_function", "call_method")]
    if any(n in _FUSED for n in names) or sum(n in _CONTRACTIONS for n in names) >= 2:
        return True
    return any(may_attend(body.graph) for call in higher_order_calls(graph) for _, body in bodies_of(call))


def inline_bodies(program: ExportedProgram, *, autocast: bool) -> ExportedProgram:
    """Return the program with the bodies that can be written out in its graph; itself if there is none.

    ``autocast`` says whether bodies under autocast may be written out.
    """
    if not any(_can_inline(c, autocast) for c in higher_order_calls(program.graph)):
        return program
    program = copy_program(program)
    tried: set[str] = set()
    while True:
        calls = [c for c in higher_order_calls(program.graph) if c.name not in tried]
        call = next((c for c in calls if _can_inline(c, autocast)), None)
        if call is None:
            break
        tried.add(call.name)
        _inline(program.graph_module, call)
    program.graph.eliminate_dead_code()
    fix_outputs(program)
    program.graph.lint()
    program.graph_module.recompile()
    return program


def _can_inline(call: fx.Node, autocast: bool) -> bool:
    name = call.target.name() if isinstance(call.target, torch._ops.HigherOrderOperator) else ""  # type: ignore[no-untyped-call]
    if not all(u.op == "call_function" and op_name(u) == "getitem" for u in call.users):
        return False
    if name == "wrap_with_set_grad_enabled":
        return call.args[0] is False
    return name == "wrap_with_autocast" and autocast and any(may_attend(b.graph) for _, b in bodies_of(call))


def _inline(owner: fx.GraphModule, call: fx.Node) -> None:
    """Write one body into the graph of ``owner``; an autocast body that cannot be followed stays."""
    graph = owner.graph
    ((_, body),) = bodies_of(call)
    operands = [a for a in call.args[call.args.index(_holder(call)) + 1 :]]
    casts = call.target.name() == "wrap_with_autocast"  # type: ignore[union-attr]
    if casts:
        try:
            body = _with_casts(body, call)
        except Declined:
            return
    inner: dict[fx.Node, Any] = {}
    with graph.inserting_before(call):
        for node, value in zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True):
            inner[node] = value if casts else _detached(graph, value)
        returned = _copied(graph, owner, body, inner)
    for user in list(call.users):
        user.replace_all_uses_with(returned[user.args[1]], propagate_meta=False)  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(call)


def _holder(call: fx.Node) -> fx.Node:
    return next(a for a in call.args if isinstance(a, fx.Node) and a.op == "get_attr")


def _detached(graph: fx.Graph, value: Any) -> Any:
    """Return ``value`` without its history, where it has one."""
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(fake, torch.Tensor) or not (fake.is_floating_point() or fake.is_complex()):
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = {k: v for k, v in value.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta["val"] = fake.detach()
    return node


def _copied(
    graph: fx.Graph, owner: fx.GraphModule, body: fx.GraphModule, inner: dict[fx.Node, Any]
) -> list[Any]:
    """Copy the body's nodes before the insertion point; return what it returns."""
    for node in body.graph.nodes:
        if node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            return [inner[r] if isinstance(r, fx.Node) else r for r in returned]
        if node.op == "placeholder":
            continue
        new = graph.node_copy(node, inner.__getitem__)
        if node.op == "get_attr":
            held = getattr(body, str(node.target))
            if getattr(owner, str(node.target), held) is not held:
                new.target = f"{node.target}_of_{new.name}"
            setattr(owner, str(new.target), held)
        inner[node] = new
    raise AssertionError("a graph without an output")


def _with_casts(body: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """Return a copy of the body with autocast's casts written down.

    Raises:
        Declined: they cannot be.
    """
    device, dtype, enabled, _ = call.args[:4]
    lower = (dtype or torch.get_autocast_dtype(str(device))) if enabled else None
    written = fx.GraphModule(body, copy.deepcopy(body.graph))
    write_casts(written.graph, lower)  # type: ignore[arg-type]
    return written


def branches(owner: fx.GraphModule, graph: fx.Graph) -> tuple[tuple[str, Captured], ...]:
    """Capture each branch of each ``torch.cond`` that may hold attention, as a functional graph of its own.

    Returns (name under which ``owner`` holds it, capture); rewriting one edits its own copy.
    """
    found: list[tuple[str, Captured]] = []
    for call in higher_order_calls(graph):
        if call.target.name() != "cond":  # type: ignore[union-attr]
            continue
        for name, body in bodies_of(call):
            if may_attend(body.graph):
                captured = _branch(body, call)
                found += [(name, captured)] if captured is not None else []
    return tuple(found)


def _branch(body: fx.GraphModule, call: fx.Node) -> Captured | None:
    """Capture one branch; None where torch cannot make it functional."""
    operands = call.args[3] if len(call.args) > 3 else ()
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operands]  # type: ignore[union-attr]
    try:
        made, signature = functional(body, values)
    except Declined:
        return None
    if signature.user_inputs_to_mutate or signature.inputs_to_buffers or signature.inputs_to_parameters:
        return None
    names = tuple(n.name for n in made.graph.nodes if n.op == "placeholder")
    return Captured(
        door="dynamo",
        owner=made,
        graph=made.graph,
        work=made.graph,
        links={n.name: n.name for n in made.graph.nodes},
        tensors={},
        fqn={},
        user_inputs=names,
        exported=None,
        seconds={},
    )
