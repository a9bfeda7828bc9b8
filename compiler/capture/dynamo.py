"""Capture models piece by piece, as a ``torch.compile`` backend: for graph breaks, training and new shapes.

Dynamo hands over a torch-level graph.  ``aot_export_module`` before dispatch makes it functional ATen with
``linear``, ``layer_norm`` and ``softmax`` whole, sizes symbolic and sources kept.  A rewrite edits that graph
in place, and the next stage gets it; if nothing changed, or the graph cannot be had this way, the next stage
gets Dynamo's own graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import fx

from attnc import logs
from attnc.capture.autocast import write_casts
from attnc.capture.bodies import branches
from attnc.capture.functional import Declined, functional, switches_autocast
from attnc.capture.names import Watch, qualified, source_name
from attnc.capture.types import Captured
from attnc.errors import CaptureError

log = logs.get("capture")

Then = Literal["eager", "aot_eager", "inductor"]
Rewrite = Callable[[Captured], bool]
Compiled = Callable[..., Any]

_CHECKPOINTS = frozenset({"tag_activation_checkpoint"})
"""Calls that ``aot_export_module`` cannot trace through; their bodies are captured one by one instead."""
_WITH_OPERANDS = _CHECKPOINTS | {"wrap", "wrap_activation_checkpoint"}
"""Calls of the form (body, *operands)."""
_OWN_BACKWARD = "autograd_function_apply"
"""The call of an autograd function, of which ``aot_export_module`` keeps the forward only."""


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


@dataclass
class _Piece:
    """What came of one graph of Dynamo's.

    ``mutated`` are the positions of inputs whose new values are the first outputs; ``declined`` says why the
    graph runs as it was; ``casts`` that autocast's casts are written down, so that it runs without autocast.
    """

    graph: fx.GraphModule
    mutated: tuple[int, ...] = ()
    declined: str = ""
    casts: bool = False


def make_backend(
    rewrite: Rewrite,
    then: str = "eager",
    *,
    mode: str | None = None,
    declined: Callable[[str], None] | None = None,
    watch: Watch | None = None,
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """Return a Dynamo backend that lets ``rewrite`` edit each captured graph and hands it to stage ``then``.

    ``rewrite`` edits ``captured.graph`` in place and says whether anything changed.  ``declined`` is told, in
    one line, about each graph that could not be captured and runs as it was.  ``watch`` learns what was
    covered.

    Raises:
        CaptureError: ``then`` is not "eager", "aot_eager" or "inductor".
    """
    if then not in get_args(Then):
        raise CaptureError(f"backend: expected then to be one of {get_args(Then)}, found {then!r}")
    watch = Watch() if watch is None else watch

    def tell(reason: str) -> None:
        log.warning("%s", reason)
        if declined is not None:
            declined(reason)

    def compile_piece(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        frame = watch.enter(gm, example_inputs)
        made: list[Captured] = []

        def rewrite_and_keep(captured: Captured) -> bool:
            made.append(captured)
            return rewrite(captured)

        try:
            piece = _rewritten(gm, example_inputs, rewrite_and_keep, tell, watch)
        except Exception as error:  # a mistake of ours must not take the user's model down
            log.warning("a graph could not be prepared", exc_info=error)
            tell(f"internal-error: {type(error).__name__}: {error}; a graph runs as it was")
            piece = _Piece(gm, declined="internal-error")
        watch.add(gm, frame, piece.declined)
        run = _next_stage(piece.graph, example_inputs, then, mode)
        run = _writing_back(run, piece.mutated) if piece.mutated else run
        run = _without_autocast(run) if piece.casts else run
        return watch.following(run, frame, made) if frame is not None and frame.prefix else run

    return compile_piece


def _rewritten(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    rewrite: Rewrite,
    tell: Callable[[str], None],
    watch: Watch,
) -> _Piece:
    """Return the graph to run: ``gm`` itself if nothing changed."""
    bodies = [n for n in gm.graph.nodes if _is_call_of_body(gm, n)]
    try:
        if any(n.target.name() in _CHECKPOINTS for n in bodies):
            raise Declined("torch cannot trace through its checkpoint calls")
        if _records_gradients(inputs) and any(_own_backward(n) for n in gm.graph.nodes):
            raise Declined("torch would lose the backward of its autograd functions")
        captured, mutated = _to_aten(gm, inputs)
    except Declined as reason:
        tell(
            f"a graph of {len(gm.graph.nodes)} nodes runs as it was"
            f"{', apart from the bodies of its higher-order calls' if bodies else ''}: {reason}"
        )
        for call in bodies:
            _rewrite_body(gm, call, rewrite, tell, watch)
        return _Piece(gm, declined=str(reason))
    if not _edited(captured, rewrite):
        return _Piece(gm)  # with its switches, where it has some
    return _Piece(captured.owner, mutated, casts=switches_autocast(gm.graph))


def _edited(captured: Captured, rewrite: Rewrite) -> bool:
    """Let ``rewrite`` edit the graph; check and recompile it if it did."""
    if not rewrite(captured):
        return False
    captured.graph.lint()
    captured.owner.recompile()
    return True


def _is_call_of_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether ``node`` is a higher-order call of a sub-graph on the operands that follow it."""
    known = isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _WITH_OPERANDS  # type: ignore[no-untyped-call]
    holder = node.args[0] if known and node.args else None
    return (
        isinstance(holder, fx.Node)
        and holder.op == "get_attr"
        and isinstance(getattr(gm, str(holder.target), None), fx.GraphModule)
    )


def _rewrite_body(
    gm: fx.GraphModule, call: fx.Node, rewrite: Rewrite, tell: Callable[[str], None], watch: Watch
) -> None:
    """Rewrite the body of one higher-order call, in ``gm`` itself, whose other nodes stay at torch level."""
    holder = call.args[0]
    assert isinstance(holder, fx.Node)
    body = getattr(gm, str(holder.target))
    operands = [a.meta["example_value"] if isinstance(a, fx.Node) else a for a in call.args[1:]]
    try:
        captured, mutated = _to_aten(body, operands)
        if mutated:
            raise Declined("it writes to its inputs")
        if _records_gradients(operands) and any(_own_backward(n) for n in body.graph.nodes):
            raise Declined("torch would lose the backward of its autograd functions")
        if switches_autocast(body.graph):
            raise Declined("it switches autocast")
    except Declined as reason:
        watch.add(body, None, str(reason))
        tell(f"the body of {call.name} runs as it was: {reason}")
        return
    watch.add(body, None, "")
    if _edited(captured, rewrite):
        setattr(gm, str(holder.target), captured.owner)


def _to_aten(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Captured, tuple[int, ...]]:
    """Turn a torch-level graph into functional ATen with the same inputs, in order.

    Returns the capture and the positions of mutated inputs, whose new values are its first outputs, in that
    order.

    Raises:
        Declined: the graph cannot be had this way.
    """
    start = time.perf_counter()
    aten, signature = functional(gm, inputs)
    if switches_autocast(aten.graph):
        write_casts(aten.graph, _ambient_precision())
    given = [n for n in gm.graph.nodes if n.op == "placeholder"]
    _unlift(aten, gm, signature)
    placeholders = [n for n in aten.graph.nodes if n.op == "placeholder"]
    written = (*signature.buffers_to_mutate, *signature.user_inputs_to_mutate)
    mutated = _mutated_positions(signature, placeholders)
    _check_convention(gm, aten, len(given), len(placeholders), len(written))
    if written and _records_gradients(inputs):
        raise Declined("it writes to its inputs while gradients are recorded (batch norm in training does)")
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
        branches=branches(aten, aten.graph),
    )
    return captured, mutated


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


def _ambient_precision() -> torch.dtype | None:
    """Return the lower precision of the autocast that is on now, None if none is."""
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    if len(on) > 1:
        raise Declined("autocast is on for two devices")
    return torch.get_autocast_dtype(on[0]) if on else None


def _mutated_positions(signature: Any, placeholders: list[fx.Node]) -> tuple[int, ...]:
    """Return the positions of the inputs that are written to, in the order of their values in the outputs."""
    if signature.buffers_to_mutate:
        raise Declined("it writes to a tensor that is part of the graph")
    position = {n.name: i for i, n in enumerate(placeholders)}
    return tuple(position[name] for name in signature.user_inputs_to_mutate.values())


def _check_convention(gm: fx.GraphModule, aten: fx.GraphModule, given: int, taken: int, written: int) -> None:
    """Decline unless ``aten`` takes and returns what ``gm`` does, new values of mutated inputs apart."""
    before, after = (g.graph.output_node().args[0] for g in (gm, aten))
    if not isinstance(before, (tuple, list)) or not isinstance(after, (tuple, list)):
        raise Declined("its output is not a tuple")
    if given != taken or len(before) + written != len(after):
        raise Declined(
            f"its {given} inputs and {len(before)} outputs became {taken} and {len(after) - written}"
        )


def _weights(
    given: list[fx.Node], placeholders: list[fx.Node], inputs: Sequence[Any]
) -> tuple[dict[str, torch.Tensor | None], dict[str, str]]:
    """Find the parameters and buffers: placeholder name -> live tensor, and -> name from its module."""
    tensors: dict[str, torch.Tensor | None] = {}
    fqn: dict[str, str] = {}
    for old, new, value in zip(given, placeholders, inputs, strict=True):
        text = source_name(old)
        if isinstance(value, torch.nn.Parameter) or "_parameters[" in text or "_buffers[" in text:
            live = isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
            tensors[new.name] = value if live else None
            if name := qualified(text):
                fqn[new.name] = name
    return tensors, fqn


def _records_gradients(inputs: Sequence[Any]) -> bool:
    """Say whether autograd will record what is computed from ``inputs``."""
    tensors = (x for x in inputs if isinstance(x, torch.Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _own_backward(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == _OWN_BACKWARD  # type: ignore[no-untyped-call]


def _writing_back(run: Compiled, mutated: tuple[int, ...]) -> Compiled:
    """Wrap ``run``, whose first outputs are new values of its inputs at ``mutated``, to write these back."""

    def call(*inputs: Any) -> Any:
        outputs = run(*inputs)
        with torch.no_grad():
            for position, value in zip(mutated, outputs, strict=False):
                inputs[position].copy_(value)
        return outputs[len(mutated) :]

    return call


def _without_autocast(run: Compiled) -> Compiled:
    """Wrap ``run``, in which autocast's casts are written down, to run without autocast."""

    def call(*inputs: Any) -> Any:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return run(*inputs)

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
