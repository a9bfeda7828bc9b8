"""Write complex numbers as pairs of real ones, since ONNX operators take none.

Rotary positions are the usual reason: a pair of features times a unit complex number (RoFormer,
arXiv:2104.09864, section 3.4.2).  Every complex value becomes its real and its imaginary part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attnc.editing import Builder
from attnc.errors import CodegenError
from attnc.programs import copy_program

aten = torch.ops.aten

Pair = tuple[fx.Node, fx.Node]
Pairs = dict[fx.Node, Pair]


def without_complex(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` without complex values, or itself if it has none.

    Raises:
        CodegenError: a complex input or output, or an operation on complex values that is not known.
    """
    if not any(map(_is_complex, program.graph.nodes)):
        return program
    copied = copy_program(program)
    graph = copied.graph
    builder, pairs = Builder(graph), Pairs()
    given = list(graph.nodes)
    _split_stored(copied, builder, pairs)
    for node in given:
        if node.op == "call_function" and _touches(node, pairs):
            builder.before(node)
            _write(builder, node, pairs)
        elif (_is_complex(node) and node not in pairs) or (
            node.op == "output" and any(map(_is_complex, node.all_input_nodes))
        ):
            raise CodegenError(f"ONNX export: expected real inputs and outputs, found {node.name}")
    for node in reversed(given):
        if node.op == "call_function" and _touches(node, pairs) and not node.users:
            graph.erase_node(node)
    copied.graph_module.recompile()
    return copied


def _split_stored(program: ExportedProgram, b: Builder, pairs: Pairs) -> None:
    """Store complex weights, buffers and constants as pairs of numbers along a last axis of 2."""
    signature, first = program.graph_signature, next(n for n in b.graph.nodes if n.op != "placeholder")
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored |= signature.inputs_to_lifted_tensor_constants
    for node in b.graph.find_nodes(op="placeholder"):
        target = stored.get(node.name)
        if target is None or not _is_complex(node):
            continue
        held = program.state_dict if target in program.state_dict else program.constants
        held[target] = torch.view_as_real(held[target].detach().resolve_conj()).clone()
        with b.mode:
            node.meta["val"] = torch.view_as_real(node.meta["val"])
        b.before(first)
        pairs[node] = b.call(aten.select.int, node, -1, 0), b.call(aten.select.int, node, -1, 1)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _touches(node: fx.Node, pairs: Pairs) -> bool:
    return _is_complex(node) or any(_is_complex(x) or x in pairs for x in node.all_input_nodes)


def _write(b: Builder, node: fx.Node, pairs: Pairs) -> None:
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)
    if name == "_assert_tensor_metadata":
        return
    make = _MAKERS.get(name, _PARTWISE.get(name))
    if make is None:
        raise CodegenError(f"ONNX export: {node.target} of complex values is not known ({node.name})")
    made = make(b, node, pairs)
    if isinstance(made, tuple):
        pairs[node] = made
    else:
        node.replace_all_uses_with(made)


def _parts(b: Builder, x: Any, pairs: Pairs) -> tuple[Any, Any]:
    """Return the parts of an operand; a real one has the imaginary part 0."""
    if isinstance(x, fx.Node):
        return pairs[x] if x in pairs else (x, b.call(aten.zeros_like.default, x))
    return (x.real, x.imag) if isinstance(x, complex) else (x, 0)


def _is_real(x: Any, pairs: Pairs) -> bool:
    return x not in pairs if isinstance(x, fx.Node) else not isinstance(x, complex)


def _from_pairs(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    x = node.args[0]
    return b.call(aten.select.int, x, -1, 0), b.call(aten.select.int, x, -1, 1)


def _to_pairs(b: Builder, node: fx.Node, pairs: Pairs) -> fx.Node:
    return b.call(aten.stack.default, list(pairs[node.all_input_nodes[0]]), -1)


def _polar(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    size, angle = node.args
    cos, sin = b.call(aten.cos.default, angle), b.call(aten.sin.default, angle)
    return b.call(aten.mul.Tensor, size, cos), b.call(aten.mul.Tensor, size, sin)


def _complex(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    real, imaginary = node.args
    assert isinstance(real, fx.Node), "aten.complex takes two tensors"
    assert isinstance(imaginary, fx.Node), "aten.complex takes two tensors"
    return real, imaginary


def _conjugate(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    real, imaginary = pairs[node.all_input_nodes[0]]
    return real, b.call(aten.neg.default, imaginary)


def _part(which: int) -> Callable[[Builder, fx.Node, Pairs], fx.Node]:
    return lambda b, node, pairs: pairs[node.all_input_nodes[0]][which]


def _absolute(b: Builder, node: fx.Node, pairs: Pairs) -> fx.Node:
    squares = [b.call(aten.mul.Tensor, p, p) for p in pairs[node.all_input_nodes[0]]]
    return b.call(aten.sqrt.default, b.call(aten.add.Tensor, *squares))


def _product(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    x, y = node.args[:2]
    times = aten.mul.Tensor
    if _is_real(x, pairs):
        x, y = y, x
    real, imaginary = _parts(b, x, pairs)
    if _is_real(y, pairs):
        return b.call(times, real, y), b.call(times, imaginary, y)
    c, d = _parts(b, y, pairs)
    return (
        b.call(aten.sub.Tensor, b.call(times, real, c), b.call(times, imaginary, d)),
        b.call(aten.add.Tensor, b.call(times, real, d), b.call(times, imaginary, c)),
    )


def _sum(b: Builder, node: fx.Node, pairs: Pairs) -> Pair:
    x, y = (_parts(b, a, pairs) for a in node.args[:2])
    real, imaginary = (b.call(_target(node), *p, **node.kwargs) for p in zip(x, y, strict=True))
    return real, imaginary


def _partwise(b: Builder, node: fx.Node, pairs: Pairs) -> Pair | fx.Node:
    """Do the same with each part: the operation moves elements, adds them up, or changes their type."""

    def part(which: int) -> fx.Node:
        def one(x: Any) -> Any:
            if isinstance(x, torch.dtype):
                return x.to_real()
            if not isinstance(x, fx.Node):
                return x
            value = x.meta.get("val")
            if isinstance(value, torch.Tensor) and (value.is_complex() or value.is_floating_point()):
                return _parts(b, x, pairs)[which]
            return x  # an index, or a size

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), one)
        return b.call(_target(node), *args, **kwargs)

    return (part(0), part(1)) if _is_complex(node) else part(0)


def _target(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target), "a call_function node has a function"
    return node.target


_Maker = Callable[[Builder, fx.Node, Pairs], Pair | fx.Node]
_MAKERS: dict[str, _Maker] = {
    "view_as_complex": _from_pairs,
    "view_as_real": _to_pairs,
    "polar": _polar,
    "complex": _complex,
    "conj": _conjugate,
    "_conj": _conjugate,
    "real": _part(0),
    "imag": _part(1),
    "abs": _absolute,
    "mul": _product,
    "add": _sum,
    "sub": _sum,
}
_PARTWISE: dict[str, _Maker] = dict.fromkeys(
    (
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
        *("slice", "select", "narrow", "index_select", "index", "permute", "transpose", "movedim", "cat"),
        *(
            "stack",
            "repeat",
            "clone",
            "contiguous",
            "detach",
            "detach_",
            "alias",
            "lift_fresh_copy",
            "resolve_conj",
        ),
        *("to", "_to_copy", "neg", "sum", "mean"),
    ),
    _partwise,
)
