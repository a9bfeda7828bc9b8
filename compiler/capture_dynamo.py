"""Capture models piece by piece, as a ``torch.compile`` backend: for graph breaks, training and new shapes.

Dynamo hands over a torch-level graph.  ``aot_export_module`` before dispatch makes it functional ATen with
``linear``, ``layer_norm`` and ``softmax`` whole, sizes symbolic and sources kept.  A rewrite edits that graph
in place, and the next stage gets it; if nothing changed, or the graph cannot be had this way, the next stage
gets Dynamo's own graph.
"""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import fx

from attnc import logs
from attnc.capture_alias import bypass, hidden_writes
from attnc.capture_types import Captured
from attnc.errors import CaptureError

log = logs.get("capture")

Then = Literal["eager", "aot_eager", "inductor"]
Rewrite = Callable[[Captured], bool]
Compiled = Callable[..., Any]

_FQN = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
# aot_export_module cannot trace through these; their bodies are captured one by one instead.
_OPAQUE_CALLS = frozenset({"tag_activation_checkpoint"})


class _Declined(Exception):
    """This graph is handed on as it came; the message says why."""


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one piece for ``torch.compile(model, backend="attnc", options={"then": "inductor", ...})``.

    ``then`` names the next stage (default "eager"); ``mode`` is inductor's; all other options are
    ``attnc.optimize``'s.
    """
    from attnc.api import dynamo_rewriter

    rest = dict(options or {})
    then = rest.pop("then", "eager")
    return make_backend(dynamo_rewriter(**rest), then, mode=mode)(gm, example_inputs)


def make_backend(
    rewrite: Rewrite,
    then: str = "eager",
    *,
    mode: str | None = None,
    declined: Callable[[str], None] | None = None,
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """Return a Dynamo backend that lets ``rewrite`` edit each captured graph and hands it to stage ``then``.

    ``rewrite`` edits ``captured.graph`` in place and says whether anything changed.  ``declined`` is told, in
    one line, about each graph that could not be captured and runs as it was.

    Raises:
        CaptureError: ``then`` is not "eager", "aot_eager" or "inductor".
    """
    if then not in get_args(Then):
        raise CaptureError(f"backend: expected then to be one of {get_args(Then)}, found {then!r}")

    def tell(reason: str) -> None:
        log.warning("%s", reason)
        if declined is not None:
            declined(reason)

    def compile_piece(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        graph, mutated = _rewritten(gm, example_inputs, rewrite, tell)
        run = _next_stage(graph, example_inputs, then, mode)
        return _writing_back(run, mutated) if mutated else run

    return compile_piece


def _rewritten(
    gm: fx.GraphModule, inputs: Sequence[Any], rewrite: Rewrite, tell: Callable[[str], None]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Return the graph to run, ``gm`` if unchanged, and the positions of inputs it has new values for."""
    bodies = [n for n in gm.graph.nodes if _is_call_of_body(gm, n)]
    try:
        if any(n.target.name() in _OPAQUE_CALLS for n in bodies):
            raise _Declined("torch cannot trace through its checkpoint calls")
        captured, mutated = _to_aten(gm, inputs)
    except _Declined as reason:
        tell(
            f"a graph of {len(gm.graph.nodes)} nodes runs as it was"
            f"{', apart from the bodies of its higher-order calls' if bodies else ''}: {reason}"
        )
        for call in bodies:
            _rewrite_body(gm, call, rewrite, tell)
        return gm, ()
    return (captured.owner, mutated) if _edited(captured, rewrite) else (gm, ())


def _edited(captured: Captured, rewrite: Rewrite) -> bool:
    """Let ``rewrite`` edit the graph; check and recompile it if it did."""
    if not rewrite(captured):
        return False
    captured.graph.lint()
    captured.owner.recompile()
    return True


def _is_call_of_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether ``node`` is a higher-order call whose first argument is a sub-graph."""
    holder = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args else None
    return (
        isinstance(holder, fx.Node)
        and holder.op == "get_attr"
        and isinstance(getattr(gm, str(holder.target), None), fx.GraphModule)
    )


def _rewrite_body(gm: fx.GraphModule, call: fx.Node, rewrite: Rewrite, tell: Callable[[str], None]) -> None:
    """Rewrite the body of one higher-order call, in ``gm`` itself, whose other nodes stay at torch level."""
    holder = call.args[0]
    assert isinstance(holder, fx.Node)
    operands = [a.meta["example_value"] if isinstance(a, fx.Node) else a for a in call.args[1:]]
    try:
        captured, mutated = _to_aten(getattr(gm, str(holder.target)), operands)
        if mutated:
            raise _Declined("it writes to its inputs")
    except _Declined as reason:
        tell(f"the body of {call.name} runs as it was: {reason}")
        return
    if _edited(captured, rewrite):
        setattr(gm, str(holder.target), captured.owner)


def _to_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Captured, tuple[int, ...]]:
    """Turn a torch-level graph into functional ATen with the same inputs, in order.

    Returns the capture and the positions of mutated inputs, whose new values are its first outputs, in that
    order.

    Raises:
        _Declined: the graph cannot be had this way.
    """
    start = time.perf_counter()
    aten, signature = _functional(gm, inputs)
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    _unlift(aten, gm, signature)
    placeholders = [n for n in aten.graph.nodes if n.op == "placeholder"]
    written = (*signature.buffers_to_mutate, *signature.user_inputs_to_mutate)
    mutated = _mutated_positions(signature, placeholders)
    _check_convention(gm, aten, len(given), len(placeholders), len(written))
    if written and torch.is_grad_enabled() and any(_requires_grad(x) for x in inputs):
        raise _Declined("it writes to its inputs while gradients are recorded (batch norm in training does)")
    tensors, fqn = _weights(given, placeholders, inputs)
    for node in aten.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(aten, str(node.target), None), torch.Tensor):
            tensors[node.name] = getattr(aten, str(node.target))
    captured = Captured(
        door="dynamo",
        owner=aten,
        graph=aten.graph,
        work=aten.graph,
        links={n.name: n.name for n in aten.graph.nodes},
        tensors=tensors,
        fqn=fqn,
        user_inputs=tuple(n.name for n in placeholders if n.name not in tensors),
        exported=None,
        seconds={"export": time.perf_counter() - start, "functionalize": 0.0},
    )
    return captured, mutated


def _functional(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Return ``gm`` as functional ATen before autograd, and the signature that torch gives with it."""
    from torch._functorch.aot_autograd import aot_export_module  # private: the only use of it is here

    source = _safe_to_functionalize(gm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's own, about its own doings
            aten, signature = aot_export_module(source, tuple(inputs), trace_joint=False, pre_dispatch=True)
    # A tracer raises nearly every type there is.  The graph is handed on as it was, and the reason is told.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise _Declined(f"torch could not make it functional ({type(error).__name__}: {lines[0]})") from error
    assert isinstance(aten, fx.GraphModule)
    return aten, signature


def _safe_to_functionalize(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm``, or a copy without the dropouts through which functionalization would lose a write."""
    if any(hidden_writes(gm.graph)):
        gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        dropouts, others = hidden_writes(gm.graph)
        if others:
            raise _Declined(
                f"it writes to a view that {others[0].target} may return, which torch loses track of"
            )
        bypass(dropouts)
        gm.recompile()
    return gm


def _unlift(aten: fx.GraphModule, gm: fx.GraphModule, signature: Any) -> None:
    """Turn placeholders made of ``gm``'s own tensors into attributes: the inputs are Dynamo's again."""
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = next(n for n in aten.graph.nodes if n.op != "placeholder")
    for node in [n for n in aten.graph.nodes if n.op == "placeholder" and n.name in lifted]:
        target = lifted[node.name]
        name = "lifted_" + target.replace(".", "_")
        if node.name in signature.inputs_to_parameters:
            aten.register_parameter(name, gm.get_parameter(target))
        else:
            aten.register_buffer(name, gm.get_buffer(target))
        with aten.graph.inserting_before(first):
            attribute = aten.graph.get_attr(name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        aten.graph.erase_node(node)


def _mutated_positions(signature: Any, placeholders: list[fx.Node]) -> tuple[int, ...]:
    """Return the positions of the inputs that are written to, in the order of their values in the outputs."""
    if signature.buffers_to_mutate:
        raise _Declined("it writes to a tensor that is part of the graph")
    position = {n.name: i for i, n in enumerate(placeholders)}
    return tuple(position[name] for name in signature.user_inputs_to_mutate.values())


def _check_convention(gm: fx.GraphModule, aten: fx.GraphModule, given: int, taken: int, written: int) -> None:
    """Decline unless ``aten`` takes and returns what ``gm`` does, new values of mutated inputs apart."""
    before, after = (g.graph.output_node().args[0] for g in (gm, aten))
    if not isinstance(before, (tuple, list)) or not isinstance(after, (tuple, list)):
        raise _Declined("its output is not a tuple")
    if given != taken or len(before) + written != len(after):
        raise _Declined(
            f"its {given} inputs and {len(before)} outputs became {taken} and {len(after) - written}"
        )


def _weights(
    given: list[fx.Node], placeholders: list[fx.Node], inputs: Sequence[Any]
) -> tuple[dict[str, torch.Tensor | None], dict[str, str]]:
    """Find the parameters and buffers: placeholder name -> live tensor, and -> name from its module."""
    tensors: dict[str, torch.Tensor | None] = {}
    fqn: dict[str, str] = {}
    for old, new, value in zip(given, placeholders, inputs, strict=True):
        source = getattr(old.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", "")
        text = str(name() if callable(name) else name)
        if isinstance(value, torch.nn.Parameter) or "_parameters[" in text or "_buffers[" in text:
            live = isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
            tensors[new.name] = value if live else None
            if parts := _FQN.findall(text):
                fqn[new.name] = ".".join(parts)
    return tensors, fqn


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _writing_back(run: Compiled, mutated: tuple[int, ...]) -> Compiled:
    """Wrap ``run``, whose first outputs are new values of its inputs at ``mutated``, to write these back."""

    def call(*inputs: Any) -> Any:
        outputs = run(*inputs)
        with torch.no_grad():
            for position, value in zip(mutated, outputs, strict=False):
                inputs[position].copy_(value)
        return outputs[len(mutated) :]

    return call


def _next_stage(gm: fx.GraphModule, inputs: Sequence[Any], then: str, mode: str | None) -> Compiled:
    """Hand ``gm`` to the stage ``then``."""
    if then == "eager":
        return gm.forward
    if then == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend("aot_eager")(gm, list(inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) if mode else {}
    if _has_softmax(gm):
        # Its attention patterns fuse softmax over other axes as if it were over keys (torch 2.13, errors
        # around 1).
        patches["pattern_matcher"] = False
    run: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return cast(Compiled, run)


def _has_softmax(gm: fx.GraphModule) -> bool:
    """Say whether a softmax is spelled out in ``gm``, at torch or ATen level."""
    return any("softmax" in str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes)
