"""Name calls of ``flex_attention``, and of torch's native layers: attention that is fused already.

A ``flex_attention`` has a kernel made for its own mods: its ``score_mod`` and ``mask_mod`` are sub-graphs of
the call.  ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` take native kernels in eval without
gradients.  There is nothing to gain from reading either; the site is named so that a report does not pass
over it in silence.
"""

from __future__ import annotations

import torch
from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.graph import base_name

_NATIVE = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention"})
_CALLS = frozenset({"flex_attention", "flex_attention_backward"})


def flex_calls(graph: fx.Graph) -> list[Miss]:
    """Return one ``already-fused`` per call of ``flex_attention`` in ``graph``, in node order."""
    return [_named(n) for n in graph.nodes if is_flex(n) or base_name(n) in _NATIVE]


def is_flex(node: fx.Node) -> bool:
    """Say whether ``node`` is a call of the higher-order op ``flex_attention``."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _CALLS  # type: ignore[no-untyped-call]


def _named(node: fx.Node) -> Miss:
    if not is_flex(node):
        kernel = base_name(node)
        return Miss("already-fused", node.name, f"torch runs this layer in one native kernel, {kernel}")
    why = "the model calls flex_attention here, whose score_mod and mask_mod already run in one fused kernel"
    return Miss("already-fused", node.name, why)
