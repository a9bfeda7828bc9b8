"""Open the caches of an encoder-decoder: keys and values of the decoder's tokens and of the encoder's states.

The decoder takes ``decoder_input_ids [B, N]``, ``encoder_hidden_states [B, E, d]``, ``encoder_attention_mask
[B, C + E]`` and, per layer, the past of its own tokens (P positions) and of the encoder's states (C).  Both
grow by what is new, so one program serves every step: the first has P = C = 0 and all encoder states; in
later ones all encoder states are in the past and E is 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attnc.examples import SEED, Sizes, odd_length
from attnc.past_cache import PAST, PRESENT, Pairs, check_steps, closed, equal, outputs, pairs, subclassed

NEW = 5
"""Decoder tokens and encoder states that are new in the example step; torch.export fixes a size of 1."""

STATES, MASK, IDS = "encoder_hidden_states", "encoder_attention_mask", "decoder_input_ids"

Layers = list[dict[str, tuple[torch.Tensor, torch.Tensor]]]


def made(model: Any, sizes: Sizes) -> tuple[nn.Module, dict[str, Any]]:
    """Return the opened decoder and an example step, whose encoder states come in two parts.

    Raises:
        CaptureError: steps with open caches do not compute what one call over all tokens does.
    """
    inputs = _example(model, sizes)
    opened = subclassed(model, (*inputs, PAST), _call(model))
    tokens, states = (inputs[n].shape[1] - NEW for n in (IDS, STATES))
    with torch.no_grad():
        first = {n: x[:, : tokens if n == IDS else states] for n, x in inputs.items()}
        past = opened(**first, past_key_values=_empty(model, inputs))[PRESENT]
    check_steps(_Whole(model), _Steps(opened, tokens, _empty(model, inputs)), inputs, model)
    rest = {IDS: inputs[IDS][:, tokens:], STATES: inputs[STATES][:, states:]}
    return opened, {n: rest.get(n, x) for n, x in inputs.items()} | {PAST: past}


def _example(model: Any, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Return ids, encoder states and their mask; the second row's source is shorter."""
    config = model.config.get_text_config(decoder=True)
    g = torch.Generator().manual_seed(sizes.seed or SEED)
    length, source = (odd_length(config, sizes.length, skip) + NEW for skip in (0, 1))
    ids = torch.randint(1, int(config.vocab_size), (sizes.batch, length), generator=g)
    states = torch.randn(sizes.batch, source, int(config.hidden_size), generator=g).to(model.dtype)
    mask = torch.ones(sizes.batch, source, dtype=torch.long)
    mask[-1, source - source // 4 :] = 0
    inputs = {IDS: ids, STATES: states}
    accepted = inspect.signature(type(model).forward).parameters
    return inputs | ({MASK: mask} if "input_ids" in accepted else {})


def _call(model: Any) -> Any:
    def call(base: Any, module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        from transformers.cache_utils import EncoderDecoderCache

        past = inputs[PAST]
        _tie(inputs, past)
        own, cross = closed([x["decoder"] for x in past]), closed([x["encoder"] for x in past])
        cache = EncoderDecoderCache(own, cross)
        # Not yet updated, a layer puts the keys of the states given after those it has.
        nothing_new = inputs[STATES].shape[1] == 0
        cache.is_updated = dict.fromkeys(range(len(past)), nothing_new)
        given = {IDS: inputs[IDS], "encoder_outputs": (inputs[STATES],), PAST: cache}
        if MASK in inputs:
            given["attention_mask"] = inputs[MASK]
        out = base.forward(module, **given, use_cache=True, return_dict=True)
        return {"logits": out.logits, PRESENT: _layers(own, cross)}

    return call


def _layers(own: Any, cross: Any) -> Layers:
    both = zip(own.layers, cross.layers, strict=True)
    return [{"decoder": (a.keys, a.values), "encoder": (b.keys, b.values)} for a, b in both]


def _tie(inputs: Mapping[str, Any], past: Layers) -> None:
    """Say which sizes are equal, so that the program has one name for each and the file says so."""
    batch = inputs[IDS].shape[0]
    equal(inputs[STATES].shape[0], batch, f"the batch of {STATES} and {IDS}")
    for part in ("decoder", "encoder"):
        length = past[0][part][0].shape[2]
        for x in (t for layer in past for t in layer[part]):
            equal(x.shape[0], batch, f"the batch of {PAST} and {IDS}")
            equal(x.shape[2], length, f"the positions of {PAST}, {part}")
    if MASK in inputs:
        whole = past[0]["encoder"][0].shape[2] + inputs[STATES].shape[1]
        equal(inputs[MASK].shape[0], batch, f"the batch of {MASK} and {IDS}")
        equal(inputs[MASK].shape[1], whole, f"{MASK} and past and new states")


def _empty(model: Any, inputs: Mapping[str, torch.Tensor]) -> Layers:
    """Return a past of no positions, with the heads that the model's own caches have."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(
            decoder_input_ids=inputs[IDS][:, :1],
            encoder_outputs=(inputs[STATES][:, :2],),
            past_key_values=cache,
            use_cache=True,
        )

    def none(held: Any) -> Pairs:
        return [(k[:, :, :0], v[:, :, :0]) for k, v in pairs(held)]

    both = zip(none(cache.self_attention_cache), none(cache.cross_attention_cache), strict=True)
    return [{"decoder": a, "encoder": b} for a, b in both]


class _Whole(nn.Module):
    """One call over all tokens and states, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Return the logits of all tokens."""
        given = {"attention_mask": inputs[MASK]} if MASK in inputs else {}
        states = (inputs[STATES],)
        return self.model(
            decoder_input_ids=inputs[IDS], encoder_outputs=states, use_cache=False, **given
        ).logits


class _Steps(nn.Module):
    """The same in three steps: some tokens with all states, then tokens alone, then the last token."""

    def __init__(self, opened: nn.Module, start: int, empty: Layers) -> None:
        super().__init__()
        self.opened, self.start, self.empty = opened, start, empty

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Return the logits of all tokens."""
        length, past, outs, before = inputs[IDS].shape[1], self.empty, [], 0
        for end in (self.start, length - 1, length):
            states = inputs[STATES][:, : None if before == 0 else 0]
            step = inputs | {IDS: inputs[IDS][:, before:end], STATES: states}
            done = self.opened(**step, past_key_values=past)
            past, before = done[PRESENT], end
            outs.append(next(outputs(done)))
        return torch.cat(outs, 1)
