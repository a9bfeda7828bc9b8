"""All queries against all keys that they may see, in one pass: prefill, encoders, training's forward."""

from __future__ import annotations

from typing import Any

from attnc.codegen.triton import tiles
from attnc.codegen.triton.bench import TOKENS
from attnc.codegen.triton.configs import TMA, choose, descriptor_arches
from attnc.codegen.triton.holes import fill_holes
from attnc.codegen.triton.kinds.kind import Configs, Kind, Program
from attnc.ir import AttentionSpec, Elementwise, Normalized, RoundedSoftmax, SignedSoftmax, Softmax

_POINTERS = {"UPCAST": False, "DESCRIPTORS": False}


def _fill(spec: AttentionSpec, configs: Configs) -> dict[str, Any]:
    pointers = choose(spec, descriptors=False)
    return {
        **fill_holes(spec, configs, descriptors=True, view=tiles.bounded(spec.mask)),
        "pointer_configs": [(arch, str(pointers[arch])) for arch in TMA],
        "descriptor_arches": descriptor_arches(spec),
    }


KIND = Kind(
    "forward",
    "fwd.py.j2",
    choose,
    _fill,
    programs=(
        Program(constants=_POINTERS, targets=("sm_80", "gfx942")),
        Program(constants={**_POINTERS, "DESCRIPTORS": True}, targets=TMA, variant="descriptors"),
        Program(configs="POINTERS", constants=_POINTERS, targets=TMA, variant="pointers"),
    ),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    mixed=True,
    dropout=True,
    bench=(TOKENS, TOKENS),
)
