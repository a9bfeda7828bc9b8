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
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnc.errors import CaptureError
from attnc.examples import SEED, Sizes, is_encoder, odd_length
from attnc.result import clone_module
from attnc.verify_model import check_model

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

PAST, PRESENT = "past_key_values", "present"
NEW_TOKENS = 5
"""Tokens of the example step: more than one, since torch.export fixes a size of 1."""

FAR = 8.0
"""How many tolerances a step may be off, as for whole models in ``optimize``."""

_MARK = "_attnc_open_cache"

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def holds_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Say whether a call passes a cache of transformers."""
    return any(map(_is_cache, (*args, *(kwargs or {}).values())))


def is_opened(model: nn.Module) -> bool:
    """Say whether ``with_past`` made ``model``, or ``optimize`` made it from such a one."""
    return hasattr(type(model), _MARK)


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
    given = _bound(model, args, kwargs) if holds_cache(args, kwargs) else {}
    if not given:
        _check_decoder(model)
        return _made(model, sizes or Sizes())
    name = next(n for n, value in given.items() if _is_cache(value))
    inputs = {n: v for n, v in given.items() if n != name and _has_tensor(v)}
    fixed = {n: v for n, v in given.items() if n != name and n not in inputs}
    opened = _subclassed(model, (*inputs, name), name, fixed)
    past = _pairs(given[name])
    step = inputs | {name: past}
    _check_sizes(model, step, past)
    return opened, step


def _made(model: Any, sizes: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    """Return the opened model and a step that continues a prompt of its own making."""
    accepted = inspect.signature(type(model).forward).parameters
    tokens = _prompt(model.config, sizes)
    tokens = {n: x for n, x in tokens.items() if n in accepted}
    opened = _subclassed(model, (*tokens, PAST), PAST, {})
    start = tokens["input_ids"].shape[1] - NEW_TOKENS
    with torch.no_grad():
        past = opened(**_first(tokens, start), past_key_values=_empty(model, tokens))[PRESENT]
    _check_steps(model, opened, tokens, start)
    return opened, _rest(tokens, start) | {PAST: past}


def _prompt(config: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return ids, mask and positions of a whole text; the first row is padded on the left."""
    length = odd_length(config.get_text_config(decoder=True), sizes.length) + NEW_TOKENS
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    g = torch.Generator().manual_seed(sizes.seed or SEED)
    ids = torch.randint(1, vocabulary, (sizes.batch, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, : (length - NEW_TOKENS) // 3] = 0
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
    return [(k[:, :, :0], v[:, :, :0]) for k, v in _pairs(cache)]


def _subclassed(model: nn.Module, names: tuple[str, ...], cache: str, fixed: Mapping[str, Any]) -> nn.Module:
    """Return a clone of ``model`` whose forward takes ``names`` alone, with the argument ``cache`` opened."""
    base = type(model)

    def forward(self: nn.Module, **inputs: Any) -> dict[str, Any]:
        past = inputs.pop(cache)
        _tie(inputs, past)
        held = _closed(past)
        out = base.forward(self, **fixed, **inputs, **{cache: held, "use_cache": True, "return_dict": True})
        kept = {n: x for n, x in out.items() if n != cache and x is not None}
        layers: list[Any] = held.layers
        return kept | {PRESENT: [(x.keys, x.values) for x in layers]}

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = inspect.Signature([inspect.Parameter(n, kind) for n in ("self", *names)])
    forward.__signature__ = shown  # type: ignore[attr-defined]
    fixed = {n: v for n, v in fixed.items() if n not in ("use_cache", "return_dict")}
    clone = clone_module(model)
    body = {"forward": forward, "__module__": base.__module__, _MARK: cache}
    clone.__class__ = type(base.__name__, (base,), body)
    return clone


def _tie(inputs: Mapping[str, Any], past: Pairs) -> None:
    """Say which sizes are equal, so that the program has one name for each and the file says so."""
    batch, _, length, _ = past[0][0].shape
    for x in (t for pair in past for t in pair):
        _equal(x.shape[0], batch, f"the batch of {PAST}")
        _equal(x.shape[2], length, f"the positions of {PAST}")
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(tokens, torch.Tensor):
        return
    _equal(tokens.shape[0], batch, f"the batch of {PAST} and input_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        _equal(mask.shape[0], batch, f"the batch of {PAST} and attention_mask")
        _equal(mask.shape[1], length + tokens.shape[1], "attention_mask and past and new tokens")


def _equal(a: int, b: int, what: str) -> None:
    """Tell torch.export that two sizes are equal; outside of it, refuse unequal ones."""
    torch._check(a == b, lambda: f"expected one size for {what}, found {a} and {b}")  # type: ignore[no-untyped-call]


def _closed(past: Pairs) -> Cache:
    """Return a cache of transformers that holds these tensors and keeps every position."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in past:
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _pairs(cache: Cache) -> Pairs:
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


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}: these inputs do not fit its forward: {error}") from error
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _is_cache(value: object) -> bool:
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(value))


def _check_decoder(model: Any) -> None:
    accepted = inspect.signature(type(model).forward).parameters
    modeling = sys.modules.get("transformers.modeling_utils")
    ours = modeling is not None and isinstance(model, modeling.PreTrainedModel) and PAST in accepted
    if not ours or is_encoder(model.config) or model.config.is_encoder_decoder:
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
        return next(_tensors(self.model(**tokens, use_cache=False)))[:, self.start :]


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
            outs.append(next(_tensors(done)))
        return torch.cat(outs[1:], 1)


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    yield from (x for x in out.values() if isinstance(x, torch.Tensor))


def _check_steps(model: nn.Module, opened: nn.Module, tokens: Mapping[str, Any], start: int) -> None:
    """Refuse a model whose steps with an open cache differ from one call over all tokens.

    Errors are held against a run in fp64 (``check_model``), ``FAR`` tolerances of one run, since a step has
    other shapes and so another order of sums; where there is no such run, half of the digits must agree.
    """
    whole, steps = _Whole(model, start), _Steps(opened, start, _empty(model, tokens))
    found = check_model(whole, steps, (), tokens, bounded=False)
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
