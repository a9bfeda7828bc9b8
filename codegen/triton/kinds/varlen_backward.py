"""The gradients over packed sequences, from those of the output and of the log-sum-exp.

The kernels are those of ``backward``, and so is the rule that one program owns each number; a program looks
up its sequence, and ends at once past the end of a short one.  The gradient of a tensor that sequences share
is added up in their order: by the program of a tile for pairs, by torch for one number per query or per key.
Source: forms/dense_variants, section 3.5 of the project's design notes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from attnc.codegen.triton.backward import fill_holes
from attnc.codegen.triton.configs import choose_backward, choose_keys
from attnc.codegen.triton.kinds import backward
from attnc.codegen.triton.kinds.kind import Configs, Kind
from attnc.codegen.triton.kinds.varlen import packed_holes
from attnc.codegen.triton.layout import PACKED_BACKWARD
from attnc.ir import AttentionSpec


def _fill(spec: AttentionSpec, configs: Configs) -> dict[str, Any]:
    return {
        **fill_holes(spec, configs, PACKED_BACKWARD),
        **packed_holes(spec),
        "keys_configs": [(arch, str(x)) for arch, x in choose_keys(spec, lookup=True).items()],
        "captured": "".join(f"{o.name}, " for o in spec.captured).rstrip(),
        "dense": "_dense",
    }


KIND = Kind(
    "varlen_backward",
    "varlen_bwd.py.j2",
    choose_backward,
    _fill,
    programs=backward.KIND.programs,
    norms=backward.KIND.norms,
    places=backward.KIND.places,
    more=backward.KIND.more,
    types=partial(backward.types_of, layout=PACKED_BACKWARD),
)
