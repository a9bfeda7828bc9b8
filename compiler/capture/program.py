"""Run an exported program on the live weights of a module, and decide which inputs it is valid for.

The program's graph takes weights and inputs as one flat list.  Weights are looked up on the module at each
call, so training, loading a state dict and device moves act on the program as they do on the module.

A program is valid where its capture's assumptions hold: sizes that became fixed, sizes that were found equal,
ranges, and every other relation that tracing relied on (``n % 2 == 0``).  A size of 0 or 1 never stands in
for a free size: tracing takes free sizes to be 2 or more, and the model may branch on 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from attnc.capture.key import being_traced
from attnc.errors import UnsupportedError

OWN_BACKWARD = "attnc_own_backward"
"""Key in a graph module's meta: autograd functions of the model, whose backward a capture does not keep."""
ATTEND_FORM = "attnc_attend_form"
"""Key in a graph module's meta: a function that makes this program with ``attend`` nodes, not yet lowered."""
Shapes = Sequence[Sequence[int]]


class Program:
    """One captured program bound to a module; called with flat inputs, it returns what the forward does."""

    def __init__(self, exported: ExportedProgram, model: nn.Module) -> None:
        """Bind ``exported`` to ``model``, whose parameters and buffers it will read.

        Raises:
            UnsupportedError: the program has inputs or outputs of a kind that cannot be run this way.
        """
        exported.graph_module.recompile()
        self.exported = exported
        self._model = model
        self._differentiable: Program | None = None
        self._run = exported.graph_module.forward
        self._weights = tuple(_source(exported, model, s) for s in _weight_specs(exported))
        self._out_spec = exported.call_spec.out_spec
        self._effects = _effects(exported)
        self._loses_gradients = bool(exported.graph_module.meta.get(OWN_BACKWARD))
        self.valid_shapes = compile_validity(exported)

    def valid(self, leaves: Sequence[Any]) -> bool:
        """Say whether the program may run on these flat inputs, whose dtypes and numbers already agree."""
        return self.valid_shapes([leaf.shape if isinstance(leaf, torch.Tensor) else () for leaf in leaves])

    def loses_gradients(self, leaves: Sequence[Any]) -> bool:
        """Say whether a backward pass through this run would be another than the model's own."""
        if not (self._loses_gradients and torch.is_grad_enabled()):
            return False
        tensors = [*leaves, *(holder[name] for holder, name in self._weights)]
        return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)

    def in_forward_mode(self) -> Program | None:
        """Return the program that tangents may flow through; None if it is not made yet and a trace asks.

        ``attend`` has tangents, SDPA and others that it is lowered to have not.
        """
        if self._differentiable is None and not being_traced():
            make = self.exported.graph_module.meta.get(ATTEND_FORM)
            self._differentiable = self if make is None else Program(make(), self._model)
        return self._differentiable

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run on flat inputs, in the order of ``tree_leaves((args, kwargs))`` at capture."""
        outputs = self._run(*[holder[name] for holder, name in self._weights], *leaves)
        if self._effects:
            outputs = self._apply_effects(outputs, leaves)
        return pytree.tree_unflatten(outputs, self._out_spec)

    def _apply_effects(self, outputs: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        """Write back the new values of weights and inputs that a program returns; keep the rest."""
        signature = self.exported.graph_signature
        weights = {
            s.target: source for s, source in zip(_weight_specs(self.exported), self._weights, strict=True)
        }
        inputs = {s.arg.name: leaf for s, leaf in zip(_input_specs(self.exported), leaves, strict=True)}
        with torch.no_grad():
            for spec, value in zip(signature.output_specs, outputs, strict=True):
                if spec.kind is OutputKind.USER_INPUT_MUTATION:
                    inputs[spec.target].copy_(value)
                elif spec.kind is not OutputKind.USER_OUTPUT:
                    holder, name = weights[spec.target]
                    holder[name].copy_(value)
        pairs = zip(signature.output_specs, outputs, strict=True)
        return [value for spec, value in pairs if spec.kind is OutputKind.USER_OUTPUT]


def _weight_specs(exported: ExportedProgram) -> list[Any]:
    return [s for s in exported.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT]


def _input_specs(exported: ExportedProgram) -> list[Any]:
    return [s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def _source(exported: ExportedProgram, model: nn.Module, spec: Any) -> tuple[dict[str, Any], str]:
    """Return the dict and the key under which the live value of one weight is found."""
    if spec.kind not in (
        InputKind.PARAMETER,
        InputKind.BUFFER,
        InputKind.CONSTANT_TENSOR,
        InputKind.CUSTOM_OBJ,
    ):
        raise UnsupportedError(
            f"program input {spec.arg.name}: expected a weight or an input, found {spec.kind}"
        )
    path, _, name = spec.target.rpartition(".")
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        try:
            owner = model.get_submodule(path)
        except AttributeError:  # a weight that a rewrite added; it lives in the program
            owner = nn.Module()
        for table in (owner._parameters, owner._buffers):
            if table.get(name) is not None:
                return table, name
    return (exported.state_dict if spec.target in exported.state_dict else exported.constants), spec.target


def _effects(exported: ExportedProgram) -> bool:
    """Say whether the program returns new values for weights or inputs beside the user's outputs."""
    known = (
        OutputKind.USER_OUTPUT,
        OutputKind.BUFFER_MUTATION,
        OutputKind.PARAMETER_MUTATION,
        OutputKind.USER_INPUT_MUTATION,
    )
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in known:
            raise UnsupportedError(f"program output {spec.arg.name}: expected a value, found {spec.kind}")
    return any(s.kind is not OutputKind.USER_OUTPUT for s in exported.graph_signature.output_specs)


def compile_validity(exported: ExportedProgram) -> Callable[[Shapes], bool]:
    """Compile what the capture assumed about sizes into one function of the shapes of the flat inputs."""
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    printer = PythonPrinter()
    bound: dict[sympy.Symbol, str] = {}
    checks: list[tuple[str, sympy.Expr | int]] = []
    for i, spec in enumerate(_input_specs(exported)):
        value = None if isinstance(spec.arg, ConstantArgument) else values.get(spec.arg.name)
        for j, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            expr = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(expr, sympy.Symbol) and expr not in bound:
                bound[expr] = f"s[{i}][{j}]"
            else:
                checks.append((f"s[{i}][{j}]", expr))
    terms = [
        f"{at} == ({printer.doprint(sympy.sympify(expr))})"
        for at, expr in checks
        if sympy.sympify(expr).free_symbols <= bound.keys()
    ]
    terms += _range_terms(exported, bound) + _guard_terms(values.values(), bound, printer)
    lets = "".join(f"    {symbol} = {at}\n" for symbol, at in bound.items())
    source = f"def valid(s):\n{lets}    return {' and '.join(dict.fromkeys(terms)) or 'True'}\n"
    scope: dict[str, Any] = {"math": math, "torch": torch}
    exec(source, scope)  # our own text, made of sizes and symbols only
    valid: Callable[[Shapes], bool] = scope["valid"]
    return valid


def _range_terms(exported: ExportedProgram, bound: dict[sympy.Symbol, str]) -> list[str]:
    """Return the bounds of each free size, as Python text."""
    terms = []
    for symbol, interval in exported.range_constraints.items():
        if symbol in bound:
            terms += [f"{symbol} >= {interval.lower}"] if isinstance(interval.lower, sympy.Integer) else []
            terms += [f"{symbol} <= {interval.upper}"] if isinstance(interval.upper, sympy.Integer) else []
    return terms


def _guard_terms(values: Any, bound: dict[sympy.Symbol, str], printer: PythonPrinter) -> list[str]:
    """Return every relation between sizes that tracing relied on, as Python text."""
    for value in values:
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                relations = [env.replace(guard.expr) for guard in env.guards]
                return [
                    f"({printer.doprint(r)})"
                    for r in relations
                    if r is not sympy.true and r.free_symbols <= bound.keys()
                ]
    return []
