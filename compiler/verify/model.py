"""Compare the outputs of a rewritten model with the original's, and crop inputs to other sizes."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnc.capture.trial import unchanged
from attnc.verify.record import own_randomness
from attnc.verify.rule import line

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

LARGEST_ORACLE = 2**30
"""Bytes of weights from which on no fp64 copy of a model is made."""


def check_model(
    reference: Callable[..., Any],
    fast: Callable[..., Any],
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    bounded: bool,
) -> dict[str, Any]:
    """Run both models on the same inputs and random numbers, without gradients, and compare what they return.

    Returns: ``ok``; ``reason`` if it is not; ``outputs`` compared; ``max_error``, ``relative`` (to the
    largest value) and ``cosine`` (smallest over batch rows) between the two models; ``unequal``, the number
    of integer outputs that differ; and, where an fp64 copy of the reference could run, ``error`` of the
    fast model and ``own_error`` of the reference against it, with ``tolerance``: twice the latter plus one
    rounding unit at the largest value.  ``tolerance`` is None where there is no such copy, and ``note``
    says why.  ``ok`` asks for equal shapes, values that are NaN or infinite at the same places, and, unless
    ``bounded``, an error within tolerance. Errors that the models raise pass through.
    """
    kwargs = dict(kwargs or {})
    first, second = (_outputs(model, args, kwargs) for model in (reference, fast))
    shapes = [[list(t.shape) for t in side] for side in (first, second)]
    if shapes[0] != shapes[1]:
        return {"ok": False, "reason": f"expected outputs of shapes {shapes[0]}, found {shapes[1]}"}
    unequal = sum(
        not t.is_floating_point() and not torch.equal(t, u) for t, u in zip(first, second, strict=True)
    )
    pairs = [(t, u) for t, u in zip(first, second, strict=True) if t.is_floating_point()]
    out: dict[str, Any] = {"ok": True, "reason": "", "outputs": len(pairs), "unequal": unequal}
    out |= {"max_error": _error(pairs), "relative": _relative(pairs)}
    out["cosine"] = min((_cosine(t, u) for t, u in pairs), default=1.0)
    astray = sum(int((_kinds(t) != _kinds(u)).sum()) for t, u in pairs)
    if astray:
        return out | {"ok": False, "reason": f"{astray} values are NaN or infinite in one model only"}
    return out if bounded else out | _against_fp64(reference, args, kwargs, pairs)


def _against_fp64(
    reference: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, Any]:
    """Return the errors of both models against fp64 and the verdict, or a note that there is no fp64."""
    exact, note = _oracle(reference, args, kwargs)
    if exact is None or [t.shape for t in exact] != [t.shape for t, _ in pairs]:
        return {"tolerance": None, "note": f"no fp64 run: {note or 'it gives other outputs'}"}
    own = _error([(e, t) for e, (t, _) in zip(exact, pairs, strict=True)])
    error = _error([(e, u) for e, (_, u) in zip(exact, pairs, strict=True)])
    unit = max(
        (torch.finfo(t.dtype).eps * _magnitude(e) for e, (t, _) in zip(exact, pairs, strict=True)),
        default=0.0,
    )
    tolerance = 2 * own + unit
    out = {"error": error, "own_error": own, "tolerance": tolerance, "note": ""}
    return (
        out if error <= tolerance else out | {"ok": False, "reason": f"error {error:.1e} > {tolerance:.1e}"}
    )


def _oracle(
    reference: Callable[..., Any], args: Args, kwargs: Kwargs
) -> tuple[list[torch.Tensor] | None, str]:
    """Return the floating outputs of an fp64 copy of ``reference``, or None and why there are none."""
    if not isinstance(reference, nn.Module):
        return None, "the reference is no nn.Module"
    held = sum(t.numel() * t.element_size() for t in (*reference.parameters(), *reference.buffers()))
    if held >= LARGEST_ORACLE:
        return None, f"the weights take {held / 2**30:.1f} GiB"
    try:
        model = copy.deepcopy(reference).double()
        inputs = pytree.tree_map_only(torch.Tensor, _double, (args, dict(kwargs)))
        return [t for t in _outputs(model, *inputs) if t.is_floating_point()], ""
    except (
        Exception
    ) as error:  # many models name a dtype somewhere; then there is no oracle, and the note says so
        return None, line(error)


def _outputs(model: Callable[..., Any], args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """Return all tensors that a model returns for copies of these inputs."""
    args, kwargs = pytree.tree_map(_copied, (args, dict(kwargs)))
    kept = unchanged(model) if isinstance(model, nn.Module) else nullcontext()
    with kept, own_randomness(0), torch.no_grad():
        return list(_tensors(model(*args, **kwargs)))


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def _double(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an output, through containers, what pytree knows, and dataclasses."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, f.name) for f in fields(leaf)])


def _kinds(x: torch.Tensor) -> torch.Tensor:
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def _error(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest absolute difference where both are finite."""
    gaps = [(t.double() - u.double())[t.isfinite() & u.isfinite()].abs() for t, u in pairs]
    return max((float(g.max()) for g in gaps if g.numel()), default=0.0)


def _magnitude(t: torch.Tensor) -> float:
    finite = t[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _relative(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest error of an output divided by its largest value, over all outputs."""
    ratios = [(_error([(t, u)]), _magnitude(t)) for t, u in pairs]
    return max((e / m if m else (math.inf if e else 0.0) for e, m in ratios), default=0.0)


def _cosine(t: torch.Tensor, u: torch.Tensor) -> float:
    """Return the smallest cosine between rows of the first axis; rows that are equal agree."""
    if not t.numel():
        return 1.0
    x, y = (v.double().nan_to_num(0.0, 0.0, 0.0).reshape(v.shape[0] if v.ndim > 1 else 1, -1) for v in (t, u))
    cosines = nn.functional.cosine_similarity(x, y, dim=-1)
    return float(torch.where((x == y).all(-1), 1.0, cosines).min())


def cropped_inputs(
    args: Args, kwargs: Kwargs | None, dims: Mapping[int, Mapping[int, str]]
) -> Iterator[tuple[str, Args, dict[str, Any]]]:
    """Yield the inputs at other sizes: each free size at 1 and at the next smaller odd number.

    ``dims`` says which axes are free: leaf index (of ``tree_leaves((args, kwargs))``) -> axis -> symbol; axes
    of one symbol are cropped together.  Symbols of equal size may be one in truth (tracing keeps sizes apart
    that it need not unify), so they are also cropped together; where the model does not accept a cropping, it
    says nothing.

    Yields: what was done, as ``"s0=1"``, with the new positional and keyword inputs, views of the old ones.

    Raises:
        ValueError: a leaf or an axis does not exist, or two axes of one symbol differ.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs or {})))
    sizes = _sizes(leaves, dims)
    equal: dict[int, list[str]] = defaultdict(list)
    for symbol, size in sizes.items():
        equal[size].append(symbol)
    together = [tuple(symbols) for symbols in equal.values() if len(symbols) > 1]
    for group in [(s,) for s in sizes] + together:
        size = sizes[group[0]]
        odd = size - 1 if size % 2 == 0 else size - 2
        for new in sorted({1, odd}):
            if 1 <= new < size:
                cropped = _crop(leaves, dims, group, new)
                new_args, new_kwargs = pytree.tree_unflatten(cropped, spec)
                yield ",".join(f"{s}={new}" for s in group), new_args, new_kwargs


def _sizes(leaves: Sequence[Any], dims: Mapping[int, Mapping[int, str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for i, axes in dims.items():
        for axis, symbol in axes.items():
            leaf = leaves[i] if 0 <= i < len(leaves) else None
            if not isinstance(leaf, torch.Tensor) or not 0 <= axis < leaf.ndim:
                raise ValueError(
                    f"cropped_inputs: expected a tensor with axis {axis} as leaf {i}, found {type(leaf)}"
                )
            if sizes.setdefault(symbol, leaf.shape[axis]) != leaf.shape[axis]:
                raise ValueError(f"cropped_inputs: {symbol} is {sizes[symbol]} and {leaf.shape[axis]}")
    return sizes


def _crop(
    leaves: Sequence[Any], dims: Mapping[int, Mapping[int, str]], group: Sequence[str], size: int
) -> list[Any]:
    out = list(leaves)
    for i, axes in dims.items():
        for axis, symbol in axes.items():
            if symbol in group:
                out[i] = out[i].narrow(axis, 0, size)
    return out
