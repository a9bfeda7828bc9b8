"""Make the calls on which a written model is compared with the program it came from.

Beside the user's own: other sizes, where the program has free ones; an empty past and one new position, where
it has a past (``lengths``); masks that hide what comes first, what comes last, and everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnc.codegen.onnx.lengths import edges
from attnc.codegen.onnx.names import input_nodes
from attnc.errors import CodegenError

OTHER = (0.5, 2.0)
"""The other sizes to try, times those of the example: all of them, then each alone."""

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


def by_name(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """Return a call with those positional inputs by name that the program was captured with by name."""
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    first, keys = children[0], [k for k in children[1].context if k not in kwargs]
    count = first.num_children if hasattr(first, "num_children") else len(first.children_specs)
    left = args[:count] + args[count + len(keys) :]
    return left, {**dict(zip(keys, args[count:], strict=False)), **kwargs}


def leaves(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flatten a call as the program does; keywords may come in any order.

    Raises:
        CodegenError: another structure than the program was exported with.
    """
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    keys = list(children[1].context)
    if set(keys) != set(kwargs):
        raise CodegenError(f"ONNX export: expected the keywords {keys} in check inputs, found {list(kwargs)}")
    flat, found = pytree.tree_flatten((tuple(args), {k: kwargs[k] for k in keys}))
    if len(flat) != spec.num_leaves:
        raise CodegenError(f"ONNX export: expected check inputs of structure {spec}, found {found}")
    return flat


def other_sizes(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Inputs]:
    """Yield the same call at other sizes (``OTHER``); nothing if all are fixed.

    Values are those of the given inputs, so ids stay ids.
    """
    flat = leaves(program, args, kwargs)
    sizes = _sizes(program, flat)
    changed = {times: {s: _changed(program, s, n, times) for s, n in sizes.items()} for times in OTHER}
    if sizes:
        yield from (_call(program, flat, changed[times], args, kwargs) for times in OTHER)
    if len(sizes) > 1:
        for symbol in sizes:
            for times in OTHER:
                alone = {**sizes, symbol: changed[times][symbol]}
                yield _call(program, flat, alone, args, kwargs)


def _changed(program: ExportedProgram, symbol: Any, size: int, times: float) -> int:
    """Return about ``times`` a size, as near as the program accepts it."""
    least, most = _range(program, symbol)
    half = size // 2 + 1 if size > 2 else size + 1
    return int(min(max(half if times < 1 else int(size * times), least), most))


def masked(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Inputs]:
    """Yield the same call with other masks; nothing if no input can be one.

    A mask is an input ``[B, S]`` of bools, or of whole numbers that are all 0 or 1.  Its rows hide, in turn,
    their first third, their last third, and everything.
    """
    flat = leaves(program, args, kwargs)
    rows = {i: x for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and _may_be_mask(x)}
    if not rows:
        return
    for first in range(3 if min(x.shape[0] for x in rows.values()) < 3 else 1):
        hidden = [_hidden(x, first) if i in rows else x for i, x in enumerate(flat)]
        yield _rebuilt(program, hidden, args, kwargs)


def _may_be_mask(x: torch.Tensor) -> bool:
    if x.ndim != 2 or x.shape[1] < 3 or x.is_floating_point() or x.is_complex():
        return False
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())


def _hidden(x: torch.Tensor, first: int) -> torch.Tensor:
    """Return a mask that hides more than ``x``, beginning with the ``first`` of the three ways."""
    out, third = x.clone(), x.shape[1] // 3
    for i in range(x.shape[0]):
        out[i, (slice(third), slice(-third, None), slice(None))[(first + i) % 3]] = 0
    return out


def at_edges(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Inputs]:
    """Yield the call with an empty past, and with one new position, if there is a past."""
    flat = leaves(program, args, kwargs)
    for sizes in edges(program, _sizes(program, flat)):
        yield _call(program, flat, sizes, args, kwargs)


def _sizes(program: ExportedProgram, flat: Sequence[Any]) -> dict[Any, int]:
    """Return the size of each symbol that is an axis of an input."""
    sizes = dict[Any, int]()
    for node, x in zip(input_nodes(program), flat, strict=True):
        for symbol, size in _symbols(node, x):
            sizes.setdefault(symbol, size)
    return sizes


def _call(
    program: ExportedProgram,
    flat: Sequence[Any],
    sizes: Mapping[Any, int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Inputs:
    """Return the call with its tensors cut or repeated to ``sizes``."""
    resized = [_resized(n, x, sizes) for n, x in zip(input_nodes(program), flat, strict=True)]
    return _rebuilt(program, resized, args, kwargs)


def _rebuilt(
    program: ExportedProgram, flat: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Inputs:
    """Return a call of the structure of (args, kwargs) from its leaves."""
    order = {k: kwargs[k] for k in _program_order(program, list(kwargs))}
    _, spec = pytree.tree_flatten((tuple(args), order))
    new_args, new_kwargs = pytree.tree_unflatten(flat, spec)
    return new_args, new_kwargs


def _program_order(program: ExportedProgram, keys: Sequence[str]) -> list[str]:
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows its call"
    children = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return [k for k in children[1].context if k in keys]


def _symbols(node: fx.Node, x: Any) -> Iterator[tuple[Any, int]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and isinstance(x, torch.Tensor):
        for traced, size in zip(value.shape, x.shape, strict=True):
            if isinstance(traced, torch.SymInt) and traced.node.expr.is_symbol:
                yield traced.node.expr, size


def _range(program: ExportedProgram, symbol: Any) -> tuple[int, float]:
    """Return the least and greatest size that the program accepts for ``symbol``."""
    found = program.range_constraints.get(symbol)
    if found is None:
        return 1, math.inf
    most = math.inf if not found.upper.is_finite or found.upper > 2**31 else int(found.upper)
    return max(1, int(found.lower)), most


def _resized(node: fx.Node, x: Any, sizes: Mapping[Any, int]) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(x, torch.Tensor):
        return x
    for axis, traced in enumerate(value.shape):
        if isinstance(traced, torch.SymInt):
            size = int(traced.node.expr.subs(sizes))
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x
