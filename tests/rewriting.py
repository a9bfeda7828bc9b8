"""Trace a function, find its sites, rewrite them, and say how exact the result has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.capture.links import link_moments, link_nodes
from attnc.codegen import ops as _ops  # noqa: F401  (registers attnc::attend)
from attnc.ir import AttentionSpec, Miss
from attnc.passes.detect import Found, detect
from attnc.passes.rewrite.apply import Rewriter


@dataclass
class Traced:
    """A graph to detect on, the graph to edit, how names of the first lead to the second.

    And how to run it.
    """

    work: fx.Graph
    graph: fx.Graph
    links: Mapping[str, str]
    tensors: Mapping[str, Tensor | None]
    run: Callable[..., Any]
    moments: Mapping[str, str] | None = None

    def detect(self) -> tuple[list[Found], list[tuple[Miss, str]]]:
        return detect(self.work, self.tensors, self.links)

    def rewrite(self, found: list[Found]) -> None:
        """Apply the sites that nothing blocks, after checking that the old softmaxes are gone."""
        editor = Rewriter(self.graph, self.work, self.links, self.moments)
        for site in found:
            blocked = editor.blocked(site)
            assert blocked is None, blocked
            editor.apply(site)
        self.graph.lint()
        self.graph.owning_module.recompile()


class Forward(nn.Module):
    """A function as a module."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Tensor) -> Any:
        return self.f(*args)


def traced(f: Callable[..., Any], args: tuple[Tensor, ...], symbolic: bool = False) -> Traced:
    """Trace a function of tensors into one functional graph, which is detected on and edited."""
    mode = "symbolic" if symbolic else "fake"
    with torch.no_grad():
        module = make_fx(f, tracing_mode=mode, pre_dispatch=True)(*args)
    links = {n.name: n.name for n in module.graph.nodes}
    return Traced(module.graph, module.graph, links, {}, module)


def exported(model: nn.Module, args: tuple[Any, ...], dynamic: bool = False, **kwargs: Any) -> Traced:
    """Export a module; detect on the functional copy, edit the program as it was exported."""
    free = {i: {j: Dim.AUTO for j in range(a.dim())} for i, a in enumerate(args)}
    shapes: Any = tuple(free.values()) if dynamic else None
    if isinstance(model, Forward) and dynamic:
        shapes = (shapes,)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
    return of_program(program)


def of_program(program: ExportedProgram) -> Traced:
    """Return a program with its functional copy."""
    functional = program.run_decompositions({})
    signature = functional.graph_signature
    tensors: dict[str, Tensor | None] = dict.fromkeys(
        (*signature.inputs_to_parameters, *signature.inputs_to_buffers)
    )
    tensors |= {k: functional.constants[v] for k, v in signature.inputs_to_lifted_tensor_constants.items()}
    links = link_nodes(program.graph, functional.graph, frozenset())

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = next(n for n in program.graph.nodes if n.op == "output").args[0]
        for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
            spec.arg.name = node.name
        return program.module(check_guards=False)(*args, **kwargs)

    moments = link_moments(program.graph, functional.graph)
    return Traced(functional.graph, program.graph, links, tensors, run, moments)


def only_spec(t: Traced) -> AttentionSpec:
    """Return the one spec that is found, or say what was missed."""
    found, missed = t.detect()
    assert len(found) == 1, missed
    return found[0].match.spec


def rounding(args: tuple[Tensor, ...], terms: int) -> float:
    """Bound the difference of two ways to compute one attention in fp64.

    A score is a sum of ``terms`` products, off by at most ``terms`` roundings of their size; softmax turns
    that into a relative error of the weights, and the values add theirs.
    """
    largest = max(float(x.abs().max()) for x in args if x.is_floating_point())
    score = terms * max(largest, 1.0) ** 2
    return 4 * torch.finfo(torch.float64).eps * terms * (score + 2) * max(largest, 1.0)
