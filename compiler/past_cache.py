"""A cache of transformers as pairs of tensors, and models whose forward takes and returns such pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnc.errors import CaptureError
from attnc.forwards import with_forward
from attnc.verify.model import check_model

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

PAST, PRESENT = "past_key_values", "present"
FAR = 8.0
"""How many tolerances a step may be off, as for whole models in ``optimize``."""

_MARK = "_attnc_open_cache"

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def is_opened(model: nn.Module) -> bool:
    """Say whether ``with_past`` made ``model``, or ``optimize`` made it from such a one."""
    return hasattr(type(model), _MARK)


def subclassed(
    model: nn.Module,
    names: tuple[str, ...],
    call: Callable[[type, nn.Module, dict[str, Any]], dict[str, Any]],
) -> nn.Module:
    """Return ``model`` with the forward ``call`` (``attnc.forwards``), known as one with an open cache."""
    return with_forward(model, names, call, **{_MARK: True})


def equal(a: int, b: int, what: str) -> None:
    """Tell torch.export that two sizes are equal; outside of it, refuse unequal ones."""
    torch._check(a == b, lambda: f"expected one size for {what}, found {a} and {b}")  # type: ignore[no-untyped-call]


def closed(past: Pairs) -> Cache:
    """Return a cache of transformers that holds these tensors and keeps every position."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def pairs(cache: Cache) -> Pairs:
    """Return key and value of each layer; positions that a window has passed are filled with zeros."""
    return [_pair(i, layer) for i, layer in enumerate(cache.layers)]


def _pair(index: int, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CaptureError(
            f"opening a cache: expected layers that grow token by token (DynamicLayer), found "
            f"{type(layer).__name__} in layer {index}"
        )
    if not layer.is_initialized:
        raise CaptureError(
            f"opening a cache: expected a past of at least 2 positions, found none in layer {index}; pass a "
            "cache that a call has filled, or none at all, and one is made"
        )
    passed = int(layer.get_seq_length()) - layer.keys.shape[-2]
    return tuple(nn.functional.pad(x, (0, 0, passed, 0)) for x in (layer.keys, layer.values))  # type: ignore[return-value]


def outputs(made: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among a model's outputs, in order; a past is none of them."""
    yield from (x for x in made.values() if isinstance(x, torch.Tensor))


def check_steps(whole: nn.Module, steps: nn.Module, inputs: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a model whose ``steps`` with an open cache differ from the ``whole``, one call over all tokens.

    Errors are held against a run in fp64 (``check_model``), ``FAR`` tolerances of one run, since a step has
    other shapes and so another order of sums; where there is no such run, half of the digits must agree.

    Raises:
        CaptureError: they differ.
    """
    found = check_model(whole, steps, (), inputs, bounded=False)
    error, tolerance = found.get("error"), found.get("tolerance")
    if error is not None and tolerance is not None:
        ok = error <= FAR * tolerance
    else:
        ok = bool(found["ok"]) and found["relative"] ** 2 <= _unit(model)
    if not ok:
        why = found["reason"] or f"they differ by {found['relative']:.1e} of the largest"
        raise CaptureError(
            f"{type(model).__name__}: expected steps with a cache of all positions to compute what one call "
            f"over all tokens does; found outputs that do not: {why}"
        )


def _unit(model: nn.Module) -> float:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return torch.finfo(dtypes[0] if dtypes else torch.float32).eps
