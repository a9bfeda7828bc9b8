"""Capture models as graphs: ahead of time through ``torch.export``, or piece by piece as a Dynamo backend.

Ahead of time, ``graph`` is the exported program's own graph: before autograd, with ``linear``, ``layer_norm``
and ``softmax`` whole, almost functional.  ``work`` is the same program with an empty decomposition table,
which makes it functional, and links lead back.  The Dynamo door is in ``capture.dynamo``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from attnc import logs
from attnc.capture.alias import name_settled_operands, op_name
from attnc.capture.bodies import branches, inline_bodies
from attnc.capture.dynamo import make_backend
from attnc.capture.links import link_moments, link_nodes
from attnc.capture.plain import is_costly, plain_copy
from attnc.capture.program import OWN_BACKWARD
from attnc.capture.sizes import Slides, free_shapes
from attnc.capture.trial import describe, noted_functions, trial, unchanged
from attnc.capture.types import Captured, Door
from attnc.errors import CaptureError
from attnc.programs import copy_program, quiet, safe_to_functionalize

__all__ = [
    "Captured",
    "capture_export",
    "capture_exported",
    "capture_graph_module",
    "make_backend",
]

log = logs.get("capture")

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION)


def capture_export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
) -> Captured:
    """Capture ``model`` ahead of time with these example inputs; neither it nor the random state is changed.

    ``dynamic_shapes``: "auto" lets every size of every tensor input vary that can, except the height and the
    width of images, and falls back to fixed sizes; both with a warning. None fixes all sizes; anything else
    goes to ``torch.export`` as it is.

    Raises:
        CaptureError: the forward fails on these inputs (with the model's own error and where it arose), or it
            runs but cannot be captured as one graph.
    """
    _check_inputs(model, args, kwargs)
    kwargs = dict(kwargs or {})
    with Slides() as slides:
        trial(model, args, kwargs)
    _register_caches(model)
    notes: list[str] = []
    start = time.perf_counter()
    autocast = not any(torch.is_autocast_enabled(d) for d in ("cpu", "cuda"))
    with noted_functions() as functions:
        exported = _export(model, args, kwargs, dynamic_shapes, slides, notes)
    try:
        exported = inline_bodies(_without_vmap(exported), autocast=autocast)
        if dynamic_shapes == "auto" and is_costly(exported.graph):
            notes.append(
                f"capture: all sizes are fixed, because the program is long ({len(exported.graph.nodes)} "
                "operations) and writes in place; dynamic_shapes says which sizes to keep free at any cost"
            )
            exported = _export(model, args, kwargs, None, slides, notes)
            exported = inline_bodies(_without_vmap(exported), autocast=autocast)
        if functions:
            exported.graph_module.meta[OWN_BACKWARD] = tuple(sorted(functions))
            notes.append(_about_gradients(functions))
        return _captured(exported, "export", time.perf_counter() - start, notes)
    except CaptureError:
        raise
    except Exception as error:  # a graph that torch cannot make functional, or a mistake of ours
        raise CaptureError(
            f"{type(model).__name__}: its forward was exported, but the graph could not be prepared\n"
            f"  expected: a graph that torch can make functional\n"
            f"  found: {_said(error)}"
        ) from error


def capture_exported(program: ExportedProgram) -> Captured:
    """Capture an ExportedProgram; it stays as it was, since a copy of its graph is edited."""
    return _captured(inline_bodies(copy_program(program), autocast=False), "export", 0.0, [])


def capture_graph_module(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """Capture an ``fx.GraphModule`` by exporting it, which leaves it as it was.  Raises as capture_export."""
    captured = capture_export(module, args, kwargs)
    captured.door = "graph"
    return captured


def _check_inputs(model: object, args: object, kwargs: object) -> None:
    """Raise a CaptureError that names what was expected, unless these can be a model and its inputs."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture: expected a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(args, tuple):
        raise CaptureError(
            f"capture: expected args as a tuple, found {type(args).__name__}; for one input, (x,)"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(f"capture: expected kwargs as a dict, found {type(kwargs).__name__}")


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    slides: Slides,
    notes: list[str],
) -> ExportedProgram:
    """Export with the shapes asked for; "auto" tries free sizes first, and notes it when they cannot be."""
    if isinstance(dynamic_shapes, torch.export.ShapesCollection):  # it knows the user's tensors by identity
        return _export_once(model, args, kwargs, dynamic_shapes)
    args, kwargs = _unmarked(args, kwargs)
    if dynamic_shapes != "auto":
        return _export_once(model, args, kwargs, dynamic_shapes)
    free_args, free_kwargs = _unmarked(args, kwargs)
    shapes, fixed = free_shapes(model, free_args, free_kwargs, slides)
    try:
        exported = _export_once(model, free_args, free_kwargs, shapes)
        notes += fixed
        return exported
    except CaptureError as error:
        reason = str(error.__cause__).strip().splitlines()
        exported = _export_once(model, args, kwargs, None)
        notes.append(
            f"capture: all sizes are fixed, because free sizes failed: {reason[0] if reason else error}"
        )
        return exported


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Export as under training, so that the graph marks the parts that the model runs without gradients."""
    with unchanged(model), quiet(), torch.inference_mode(False), torch.enable_grad():
        try:
            return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=dynamic_shapes)
        except Exception as error:  # export raises nearly every type there is
            raise CaptureError(
                f"{type(model).__name__}: its forward runs, but could not be captured as one graph\n"
                f"  expected: a forward that torch.export can follow for {describe(args, kwargs)}\n"
                f"  found: {_said(error)}\n"
                "  try: attnc.optimize(model) with no inputs, which captures piece by piece at the first call"
            ) from error


def _unmarked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs as new tensor objects, since torch.export leaves marks on those it is given.

    Tensors made in inference mode are copied, since the capture is made as under training.
    """
    seen: dict[int, torch.Tensor] = {}

    def one(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in seen:
            seen[id(t)] = t.clone() if t.is_inference() else t.detach().requires_grad_(t.requires_grad)
        return seen[id(t)]

    with torch.inference_mode(False):
        new: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, one, (args, kwargs))
    return new


def _register_caches(model: nn.Module) -> None:
    """Let transformers teach torch.export its cache classes, which a prefill returns."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    try:
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
    except ImportError:  # before transformers 5.20 or so; a prefill that returns a cache is then not captured
        log.info("this transformers has no exporters; caches are not registered")
        return
    register_cache_pytrees_for_model(model)


def _said(error: BaseException) -> str:
    """Return the type and the first line of an error; torch's own go on for pages, and stay as its cause."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _about_gradients(functions: set[str]) -> str:
    return (
        f"the backward of {', '.join(sorted(functions))} is not part of a captured program: where gradients "
        "are recorded, the forward is compiled piece by piece instead"
    )


def _without_vmap(exported: ExportedProgram) -> ExportedProgram:
    """Return the program, or a functional one where vmap left its own calls in it, which cannot be run."""
    if not any(op_name(n) == "_add_batch_dim" for n in exported.graph.nodes):
        return exported
    with quiet():
        functional: ExportedProgram = exported.run_decompositions({})
    return functional


def _captured(exported: ExportedProgram, door: Door, export_seconds: float, notes: list[str]) -> Captured:
    """Make the functional copy and gather what the passes need to know about the inputs."""
    start = time.perf_counter()
    if name_settled_operands(exported.graph):
        exported.graph_module.recompile()
    functional, work = exported, plain_copy(exported.graph)
    if work is None:
        source = safe_to_functionalize(exported)
        with quiet():
            functional = source.run_decompositions({})
        work = functional.graph
    seconds = {"export": export_seconds, "functionalize": time.perf_counter() - start}
    mutated = _mutated_inputs(functional)
    tensors, fqn = _live_tensors(functional, exported, mutated)
    inputs = tuple(
        s.arg.name for s in functional.graph_signature.input_specs if s.kind is InputKind.USER_INPUT
    )
    if functional is exported:
        links = moments = {n.name: n.name for n in work.nodes if n.op != "output"}
    else:
        links = link_nodes(exported.graph, work, mutated, source.graph)
        moments = link_moments(exported.graph, work, source.graph)
    log.info(
        "%d nodes captured in %.2f s, functional copy in %.2f s", len(exported.graph.nodes), *seconds.values()
    )
    return Captured(
        door=door,
        owner=exported.graph_module,
        graph=exported.graph,
        work=work,
        links=links,
        moments=moments,
        tensors=tensors,
        fqn=fqn,
        user_inputs=inputs,
        exported=exported,
        static=fixed_sizes(work, inputs),
        warnings=notes,
        seconds=seconds,
        branches=branches(exported.graph_module, exported.graph),
    )


def _mutated_inputs(functional: ExportedProgram) -> frozenset[str]:
    """Return the placeholder names of ``functional`` that the program writes to."""
    signature = functional.graph_signature
    targets = {s.target for s in signature.output_specs if s.kind in _MUTATIONS}
    return frozenset(
        s.arg.name
        for s in signature.input_specs
        if s.target in targets or (s.kind is InputKind.USER_INPUT and s.arg.name in targets)
    )


def _live_tensors(
    functional: ExportedProgram, exported: ExportedProgram, mutated: frozenset[str]
) -> tuple[dict[str, torch.Tensor | None], dict[str, str]]:
    """Return placeholder name -> live tensor, and placeholder name -> qualified name."""
    tensors: dict[str, torch.Tensor | None] = {}
    fqn: dict[str, str] = {}
    for spec in functional.graph_signature.input_specs:
        if spec.kind not in _WEIGHTS or spec.target is None:
            continue
        value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        known = isinstance(value, torch.Tensor) and spec.arg.name not in mutated
        tensors[spec.arg.name] = value if known else None
        if spec.kind is not InputKind.CONSTANT_TENSOR:
            fqn[spec.arg.name] = spec.target
    return tensors, fqn


def fixed_sizes(graph: fx.Graph, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sizes of the named placeholders that are plain numbers, as ``"name dim i == n"``."""
    texts = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in inputs and isinstance(value, torch.Tensor):
            sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in value.shape]
            texts += [f"{node.name} dim {i} == {n}" for i, n in enumerate(sizes) if str(n).isdigit()]
    return tuple(texts)
