"""Lower a plan to compiled FlexAttention: what it can run, and the one node it becomes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from attnc.codegen.flex import probe
from attnc.codegen.flex.runtime import DTYPES
from attnc.codegen.flex.source import source
from attnc.editing import Builder
from attnc.errors import UnsupportedError
from attnc.ir import AttentionSpec, Miss, Pointwise, Softmax
from attnc.masks import integers


def can_run(spec: AttentionSpec, device: str) -> Miss | None:
    """Say why FlexAttention cannot run ``spec`` on ``device`` (``cpu`` or ``cuda``), None if it can.

    The first call on a machine compiles a tiny kernel (seconds), later ones read the answer from a file.
    """
    miss = _lacks(spec, device)
    if miss is not None:
        return miss
    why = probe.why_not(device)
    return Miss("flex-no-compiler", "", why) if why else None


def _lacks(spec: AttentionSpec, device: str) -> Miss | None:
    """Say what of the spec flex does not have."""
    if not isinstance(spec.norm, Softmax):
        return Miss("flex-norm", "", f"FlexAttention weighs by a softmax, the model by {spec.norm}")
    if spec.dropout:
        return Miss("flex-dropout", "", "FlexAttention has no dropout")
    if spec.q.dtype not in DTYPES or len({spec.q.dtype, spec.k.dtype, spec.v.dtype}) != 1:
        found = ", ".join(str(o.dtype).removeprefix("torch.") for o in (spec.q, spec.k, spec.v))
        return Miss(
            "flex-dtype", "", f"FlexAttention needs q, k, v in one of fp32, bf16, fp16, found {found}"
        )
    d, dv = spec.q.shape[3], spec.v.shape[3]
    if isinstance(d, str) or isinstance(dv, str):
        return Miss("flex-head-dim", "", f"FlexAttention needs head dims that are known, found {d} and {dv}")
    if device == "cuda" and min(d, dv) < 16:
        return Miss(
            "flex-head-dim", "", f"FlexAttention on CUDA needs head dims from 16 on, found {d} and {dv}"
        )
    return _wrong_operand(spec)


def _wrong_operand(spec: AttentionSpec) -> Miss | None:
    """Say which captured tensor cannot be read element by element."""
    dtypes = {o.name: o.dtype for o in spec.captured}
    whole = (torch.int64, torch.int32)  # rows of ids and lengths, which formulas read
    for name in spec.mask.operands:
        if dtypes[name] != torch.bool and not (dtypes[name] in whole and name in integers(spec.mask)):
            return Miss("flex-mask-dtype", "", f"a mask must be bool, found {dtypes[name]} for {name}")
    for step in spec.scores:
        allowed = (torch.bool,) if isinstance(step, Pointwise) else ()
        wrong = [n for n in step.operands if not (dtypes[n].is_floating_point or dtypes[n] in allowed)]
        if wrong:
            found = f"{dtypes[wrong[0]]} for {wrong[0]}"
            return Miss("flex-score-dtype", "", f"a score edit must be floating point, found {found}")
    try:
        source(spec)
    except UnsupportedError as error:
        return Miss("flex-unknown-part", "", str(error))
    return None


def lower(
    spec: AttentionSpec, build: Builder, q: fx.Node, k: fx.Node, v: fx.Node, captured: Sequence[fx.Node]
) -> fx.Node:
    """Insert the node that computes ``spec`` and return it, ``[B, H, Sq, Dv]``; ``can_run`` must hold."""
    return build.call(torch.ops.attnc.flex_attend.default, q, k, v, list(captured), str(spec))
