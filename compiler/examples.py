"""Make example inputs: from a transformers config, or again from a recipe that holds shapes but no data.

Values are the same at each call.  Batch 2 and a length that equals no size of the config, so that capture
does not take one for another; one row of the mask is short, so that padding is seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnc.errors import CheckpointError

BATCH = 2
LENGTHS = (23, 29, 31, 37, 41, 43, 47, 53, 59, 61)
SEED = 0
LEAVES = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of examples: sequences, tokens (None: a length unlike any size of the config), and the seed."""

    batch: int = BATCH
    length: int | None = None
    seed: int = SEED


def example_inputs(model: nn.Module, sizes: Sizes | None = None) -> dict[str, Any]:
    """Return keyword arguments for a transformers model, built from ``main_input_name`` and its config.

    Raises:
        CheckpointError: the model's main input is of a kind not known here.
    """
    sizes = sizes or Sizes()
    config, name = model.config, str(getattr(model, "main_input_name", "input_ids"))
    accepted = inspect.signature(type(model).forward).parameters
    makers: dict[str, Callable[[Any, Sizes], dict[str, torch.Tensor]]] = {
        "input_ids": _tokens, "pixel_values": _pixels, "input_features": _features, "input_values": _waves
    }  # fmt: skip
    if name not in makers:
        raise CheckpointError(
            f"{type(model).__name__}: expected a main input among {', '.join(makers)}, found {name!r}; "
            "pass a file.py:callable that returns (module, args, kwargs)"
        )
    kwargs: dict[str, Any] = dict(makers[name](config, sizes))
    if name == "input_ids" and "pixel_values" in accepted and hasattr(config, "vision_config"):
        kwargs.update(_pixels(config.vision_config, sizes))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        kwargs["decoder_input_ids"] = _ids(config, sizes, odd_length(config, sizes.length, 1), 1)
    if "use_cache" in accepted and _returns_cache(config):
        kwargs["use_cache"] = False
    return {k: v for k, v in kwargs.items() if k in accepted}


def odd_length(config: Any, asked: int | None = None, skip: int = 0) -> int:
    """Return a length in tokens that equals no size in the config, or the one asked for."""
    if asked is not None:
        return asked
    taken = set(_ints(config.to_dict()))
    return [n for n in LENGTHS if n not in taken and 2 * n not in taken][skip]


def recipe(value: Any) -> Any:
    """Describe inputs as JSON: containers as they are, tensors by shape, dtype and range; never their data.

    Raises:
        CheckpointError: a value that is neither a tensor, a plain value, nor a list, tuple or dict of such.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": _describe(value)}
    if isinstance(value, LEAVES):
        return {"value": value}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return {"list" if isinstance(value, list) else "tuple": [recipe(v) for v in value]}
    if isinstance(value, Mapping):
        return {
            "dict": [[str(k), recipe(v)] for k, v in value.items()]
        }  # pairs: their order is part of a call
    raise CheckpointError(f"expected inputs of tensors and plain values, found {type(value).__name__}")


def from_recipe(made: Any, generator: torch.Generator | None = None) -> Any:
    """Build what ``recipe`` described: the same shapes and dtypes, other values, the same at each call.

    Raises:
        CheckpointError: not a recipe.
    """
    generator = generator or torch.Generator().manual_seed(SEED)
    match made:
        case {"tensor": dict(t)}:
            return _build(t, generator)
        case {"value": value}:
            return value
        case {"list": list(items)}:
            return [from_recipe(i, generator) for i in items]
        case {"tuple": list(items)}:
            return tuple(from_recipe(i, generator) for i in items)
        case {"dict": list(items)}:
            return {k: from_recipe(v, generator) for k, v in items}
    raise CheckpointError(f"expected a recipe of example inputs, found {str(made)[:80]}")


def _returns_cache(config: Any) -> bool:
    """Whether the forward returns a cache unless told not to."""
    return bool(getattr(config, "use_cache", False)) and (config.is_encoder_decoder or not is_encoder(config))


def is_encoder(config: Any) -> bool:
    """Whether the model is an encoder, though its class could be a decoder too, as BERT's can."""
    return getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")


def _describe(x: torch.Tensor) -> dict[str, Any]:
    out: dict[str, Any] = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
    if x.numel() and not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool:
        rises = x.ndim > 0 and x.shape[-1] > 1 and bool((x.diff(dim=-1) >= 0).all())
        out |= {"low": int(x.min()), "high": int(x.max()), "rises": rises}
    return out


def _build(t: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Make one tensor: noise for floats, a mask with a short last row for 0/1, else integers in range."""
    shape, dtype = t["shape"], getattr(torch, str(t["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"expected a dtype, found {t['dtype']!r}")
    low, high = (0, 1) if dtype == torch.bool else (t.get("low", 0), t.get("high", 0))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if (low, high) in ((0, 1), (1, 1)):
        return _short_row(torch.ones(shape, dtype=dtype)) if low == 0 else torch.ones(shape, dtype=dtype)
    if t.get("rises"):
        return torch.linspace(low, high, shape[-1], dtype=torch.float64).to(dtype).expand(shape).clone()
    return torch.randint(low, high + 1, shape, generator=generator, dtype=dtype)


def _short_row(mask: torch.Tensor) -> torch.Tensor:
    if mask.ndim and mask.shape[-1] > 1:
        mask.view(-1, mask.shape[-1])[-1, mask.shape[-1] // 2 + 1 :] = 0
    return mask


def _ids(config: Any, sizes: Sizes, length: int, shift: int = 0) -> torch.Tensor:
    vocab = int(
        getattr(config, "vocab_size", 0) or getattr(getattr(config, "text_config", None), "vocab_size", 0)
    )
    if vocab < 2:
        raise CheckpointError(f"config: expected a vocab_size of at least 2, found {vocab}")
    generator = torch.Generator().manual_seed(sizes.seed + shift)
    return torch.randint(1, vocab, (sizes.batch, length), generator=generator)


def _tokens(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    ids = _ids(config, sizes, odd_length(config, sizes.length))
    return {"input_ids": ids, "attention_mask": _short_row(torch.ones_like(ids))}


def _pixels(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    side = config.image_size
    high, wide = side if isinstance(side, (list, tuple)) else (side, side)
    return {"pixel_values": _noise(sizes, sizes.batch, int(getattr(config, "num_channels", 3)), high, wide)}


def _features(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    length = (
        2 * config.max_source_positions
        if hasattr(config, "max_source_positions")
        else odd_length(config, sizes.length)
    )
    mels = getattr(config, "num_mel_bins", 0) or getattr(config, "feature_size", 80)
    return {"input_features": _noise(sizes, sizes.batch, int(mels), length)}


def _waves(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    return {"input_values": _noise(sizes, sizes.batch, 320 * (odd_length(config, sizes.length) + 2))}


def _noise(sizes: Sizes, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sizes.seed))


def _ints(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _ints(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
