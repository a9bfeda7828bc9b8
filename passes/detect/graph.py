"""Facts about nodes of the working graph: sizes as polynomials, what an op is, where it came from."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnc.expr import Expr, product
from attnc.sizes import dim

aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent) + "/"

METADATA_ONLY = frozenset(
    {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async"}
)


def op_name(node: fx.Node) -> str:
    """Return ``name.overload`` of an ATen call, such as ``mul.Tensor``.

    A Python operator is ``py.add``; other nodes give ''.
    """
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._overloadname
        return f"{name}.{overload}" if namespace == "aten" else f"{namespace}::{name}.{overload}"
    return f"py.{getattr(target, '__name__', target)}"


def base_name(node: fx.Node) -> str:
    """Return the op's name without its overload."""
    return op_name(node).partition(".")[0] if not op_name(node).startswith("py.") else op_name(node)


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """Return the fake tensor that stands for the node's value, or None if it is no tensor."""
    val = node.meta.get("val")
    return val if isinstance(val, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Expr, ...]:
    """Return the sizes of a tensor node."""
    t = tensor_of(node)
    assert t is not None, f"{node} is no tensor"
    cached: tuple[Expr, ...] | None = node.meta.get("attnc_shape")
    if cached is None:
        node.meta["attnc_shape"] = cached = tuple(dim(n) for n in t.shape)
    return cached


_CARRIER_NAMES = """
view _unsafe_view reshape permute transpose t unsqueeze squeeze expand clone contiguous alias detach
_to_copy to dropout slice type_as
"""
CARRIERS = frozenset(_CARRIER_NAMES.split())
"""Operations that hand on a tensor's elements, each once or not at all."""
_LIKE_THE_SECOND = frozenset({"reshape_as", "view_as", "expand_as", "type_as", "to.other"})
"""Operations that read of their second argument its size or type, and no element."""


def inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the tensors whose elements a node reads, in argument order, with repeats."""
    out: list[fx.Node] = []
    like = {op_name(node), base_name(node)} & _LIKE_THE_SECOND
    fx.node.map_arg((node.args[:1] if like else node.args, node.kwargs), out.append)
    return tuple(n for n in out if tensor_of(n) is not None)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def is_float_cast(node: fx.Node) -> bool:
    """Say whether the node changes a floating tensor's type or device, and nothing else."""
    if base_name(node) not in ("_to_copy", "to", "type_as") or not isinstance(node.args[0], fx.Node):
        return False
    here, there = tensor_of(node), tensor_of(node.args[0])
    if here is None or there is None:
        return False
    return here.dtype.is_floating_point and there.dtype.is_floating_point


def reads_size_only(node: fx.Node, of: fx.Node) -> bool:
    """Say whether ``node`` reads a size or the type of ``of``, and no element."""
    if base_name(node) == "sym_size":
        return True
    return of not in inputs(node) and bool({op_name(node), base_name(node)} & _LIKE_THE_SECOND)


def users(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the users of a node's value; metadata asserts and pure calls that nobody reads do not count."""
    return tuple(u for u in node.users if base_name(u) not in METADATA_ONLY and not _dead(u))


def _dead(node: fx.Node) -> bool:
    if node.op != "call_function" or node.users:
        return False
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (schema is not None and not schema.is_mutable)


def normal_dims(dims: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Return dimensions as non-negative numbers."""
    return tuple(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def strides(sizes: Sequence[Expr]) -> Iterator[Expr]:
    """Yield the row-major stride of each axis, in elements."""
    for i in range(len(sizes)):
        yield product(sizes[i + 1 :])


def module_path(node: fx.Node) -> tuple[str, str]:
    """Return the dotted path of the innermost module that ran the node, and its class name.

    The root's path is ''.  Dynamo writes ``L['self']._modules['layers'][0]`` where export
    writes ``layers.0``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, cls = list(stack.values())[-1]
    name = re.sub(r"^(?:[LG]\['\w+'\]|self)(?=[.\[]|$)", "", str(path))
    name = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", name).replace("_modules.", "").strip(".")
    kind = cls if isinstance(cls, str) else getattr(cls, "__name__", str(cls))
    return name, kind.rpartition(".")[2]


def source_line(node: fx.Node) -> str:
    """Return ``file.py:line`` of the user's code that called the op, '' if unknown.

    Only the file's name is kept.  Frames inside torch count only where there are no others.
    """
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"<][^"]*)", line (\d+)', trace)  # "<eval_with_key>.3" is no file
    own = [f for f in found if not f[0].startswith(_TORCH)] or found
    return f"{own[-1][0].rpartition('/')[2]}:{own[-1][1]}" if own else ""


def ratio_of_numbers(x: Any) -> float | None:
    """Return a Python number as a float, None for anything else (symbols, nodes, bools)."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return None
    return float(x) if not (isinstance(x, float) and math.isnan(x)) else None
