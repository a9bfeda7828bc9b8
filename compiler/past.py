"""Open the key/value cache of a decoder: the past goes in, and the present comes out, as plain tensors.

A forward that is given a cache object writes to it, which no captured program can do.  ``with_past`` returns
the same model with a forward that takes ``past_key_values`` as one (key, value) pair per layer, ``[B, Hkv, P,
D]`` with P positions, and returns ``present``: the same pairs with the new positions at their end.  P may be
0, so one program serves the prompt and every later step.

Every layer holds all positions.  A layer with a sliding window may forget those that its window has passed
(transformers' DynamicSlidingWindowLayer does); its mask hides them, so holding them changes nothing but
memory.  A step with an open cache is compared with one call over all tokens before it is used.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnc import past_encoder
from attnc.errors import CaptureError
from attnc.examples import SEED, Sizes, is_encoder, odd_length
from attnc.forwards import bound_arguments
from attnc.past_cache import PAST, PRESENT, Pairs, check_steps, closed, equal, outputs, pairs, subclassed

NEW_TOKENS = 5
"""Tokens of the example step: more than one, since torch.export fixes a size of 1."""


def holds_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Say whether a call passes a cache of transformers."""
    return any(map(_is_cache, (*args, *(kwargs or {}).values())))


def with_past(
    model: nn.Module | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sizes: Sizes | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a decoder of transformers with an open cache, and the keywords of an example step.

    The result is of a subclass of the model's class, shares its tensors and has its module paths.  The
    example step is the call given, with its cache opened; without a cache in it, or without a call, one is
    made from the config: a prompt with padding on the left, and ``NEW_TOKENS`` more tokens.

    Raises:
        CaptureError: no decoder of transformers; a cache of another kind, or an empty one; fewer than two new
            tokens; or steps with an open cache do not compute what one call over all tokens does.
    """
    if isinstance(model, str | os.PathLike):
        from attnc.opening import open_model

        model = open_model(os.fspath(model)).model
    assert isinstance(model, nn.Module), "a model is a module or the path of one"
    given = bound_arguments(model, args, kwargs) if holds_cache(args, kwargs) else {}
    if not given:
        _check_decoder(model)
        config: Any = model.config
        made = past_encoder.made if config.is_encoder_decoder else _made
        return made(model, sizes or Sizes())
    name = next(n for n, value in given.items() if _is_cache(value))
    inputs = {n: v for n, v in given.items() if n != name and _has_tensor(v)}
    fixed = {n: v for n, v in given.items() if n != name and n not in inputs}
    opened = _opened(model, tuple(inputs), name, fixed)
    past = pairs(given[name])
    step = inputs | {name: past}
    _check_sizes(model, step, past)
    return opened, step


def _made(model: Any, sizes: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    """Return the opened model and a step that continues a prompt of its own making."""
    accepted = inspect.signature(type(model).forward).parameters
    tokens = _prompt(model, sizes)
    tokens = {n: x for n, x in tokens.items() if n in accepted}
    opened = _opened(model, tuple(tokens), PAST, {})
    start = tokens["input_ids"].shape[1] - NEW_TOKENS
    with torch.no_grad():
        past = opened(**_first(tokens, start), past_key_values=_empty(model, tokens))[PRESENT]
    check_steps(_Whole(model, start), _Steps(opened, start, _empty(model, tokens)), tokens, model)
    return opened, _rest(tokens, start) | {PAST: past}


def _prompt(model: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return ids, mask and positions of a whole text; the first row is padded on the left.

    In half precision its first token is not: a query that sees nothing would get what the order of sums makes
    of a fill that swallows some scores and not others, and no two programs agree on that.
    """
    config = model.config.get_text_config(decoder=True)
    length = odd_length(config, sizes.length) + NEW_TOKENS
    vocabulary = int(config.vocab_size)
    g = torch.Generator().manual_seed(sizes.seed or SEED)
    ids = torch.randint(1, vocabulary, (sizes.batch, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, int(model.dtype.itemsize < 4) : (length - NEW_TOKENS) // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return the position of each token ``[B, S]`` under a mask ``[B, S]`` of 0 and 1; padding has 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _first(tokens: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {n: x[:, :count] for n, x in tokens.items()}


def _rest(tokens: Mapping[str, torch.Tensor], start: int) -> dict[str, torch.Tensor]:
    """Return the inputs of a step after ``start`` positions; the mask covers those as well."""
    return {n: x if n == "attention_mask" else x[:, start:] for n, x in tokens.items()}


def _empty(model: Any, tokens: Mapping[str, torch.Tensor]) -> Pairs:
    """Return a past of no positions, with the heads that the model's own cache has."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(**_first(tokens, 1), past_key_values=cache, use_cache=True)
    return [(k[:, :, :0], v[:, :, :0]) for k, v in pairs(cache)]


def _opened(model: nn.Module, names: tuple[str, ...], cache: str, fixed: Mapping[str, Any]) -> nn.Module:
    """Return a clone of ``model`` whose forward takes ``names`` and the opened argument ``cache``."""
    always = {**fixed, "use_cache": True, "return_dict": True}

    def call(base: Any, module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        past = inputs.pop(cache)
        _tie(inputs, past)
        held = closed(past)
        out = base.forward(module, **always, **inputs, **{cache: held})
        kept = {n: x for n, x in out.items() if n != cache and x is not None}
        layers: list[Any] = held.layers
        return kept | {PRESENT: [(x.keys, x.values) for x in layers]}

    return subclassed(model, (*names, cache), call)


def _tie(inputs: Mapping[str, Any], past: Pairs) -> None:
    """Say which sizes are equal, so that the program has one name for each and the file says so."""
    batch, _, length, _ = past[0][0].shape
    for x in (t for pair in past for t in pair):
        equal(x.shape[0], batch, f"the batch of {PAST}")
        equal(x.shape[2], length, f"the positions of {PAST}")
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(tokens, torch.Tensor):
        return
    equal(tokens.shape[0], batch, f"the batch of {PAST} and input_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        equal(mask.shape[0], batch, f"the batch of {PAST} and attention_mask")
        equal(mask.shape[1], length + tokens.shape[1], "attention_mask and past and new tokens")


def _is_cache(value: object) -> bool:
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(value))


def _check_decoder(model: Any) -> None:
    accepted = inspect.signature(type(model).forward).parameters
    modeling = sys.modules.get("transformers.modeling_utils")
    ours = modeling is not None and isinstance(model, modeling.PreTrainedModel) and PAST in accepted
    if not ours or (is_encoder(model.config) and not model.config.is_encoder_decoder):
        raise CaptureError(
            f"{type(model).__name__}: expected a decoder of transformers, whose forward takes {PAST}\n"
            "  try: for a module of your own that takes and returns its past as tensors, export it as it is, "
            "with an example of at least two positions in the past and two new tokens"
        )


def _check_sizes(model: nn.Module, step: Mapping[str, Any], past: Pairs) -> None:
    """Refuse an example whose sizes torch.export would fix."""
    tokens = step.get("input_ids", step.get("inputs_embeds"))
    found = past[0][0].shape[2], tokens.shape[1] if isinstance(tokens, torch.Tensor) else 2
    if min(found) < 2:
        raise CaptureError(
            f"{type(model).__name__}: expected an example step with at least 2 positions in the past and 2 "
            f"new tokens, found {found[0]} and {found[1]}; torch.export fixes sizes of 0 and 1, and what is "
            "made from more serves those too"
        )


class _Whole(nn.Module):
    """One call over all tokens, without a cache; the outputs after the first ``start`` positions."""

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, **tokens: torch.Tensor) -> Any:
        """Return the first output for the tokens from ``start`` on."""
        return next(outputs(self.model(**tokens, use_cache=False)))[:, self.start :]


class _Steps(nn.Module):
    """The same in three steps: the prompt, several tokens, the last token."""

    def __init__(self, opened: nn.Module, start: int, empty: Pairs) -> None:
        super().__init__()
        self.opened, self.start, self.empty = opened, start, empty

    def forward(self, **tokens: torch.Tensor) -> Any:
        """Return the first output for the tokens from ``start`` on."""
        length = tokens["input_ids"].shape[1]
        past, outs, before = self.empty, [], 0
        for end in (self.start, length - 1, length):
            done = self.opened(**_rest(_first(tokens, end), before), past_key_values=past)
            past, before = done[PRESENT], end
            outs.append(next(outputs(done)))
        return torch.cat(outs[1:], 1)
