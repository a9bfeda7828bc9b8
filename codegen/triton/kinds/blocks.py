"""All queries against the key blocks that a list names for them: every block-sparse form.

The list is an ``attnc.block_list.BlockList``, handed over as plain tensors.  One file serves every block size
and every list, made before the call or by it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from attnc.codegen.triton.configs import TMA, descriptor_arches
from attnc.codegen.triton.configs import choose as choose_for
from attnc.codegen.triton.holes import argument_types, fill_holes
from attnc.codegen.triton.kinds.kind import Configs, Kind, Program, Types
from attnc.codegen.triton.layout import DENSE, Layout
from attnc.ir import AttentionSpec, Elementwise, Normalized, RoundedSoftmax, SignedSoftmax, Softmax

LAYOUT = Layout(DENSE.axes, lists={"ranges": "bh", "columns": "", "order": ""})
BLOCKS = ((128, 128), (16, 32), (32, 16), (32, 64), (64, 64), (128, 32))
"""Queries and keys in a block, for each case of the self-test."""
_POINTERS = {"UPCAST": False, "DESCRIPTORS": False, "ROWS": 128, "COLUMNS": 128}


choose = partial(choose_for, lookup=True)
"""The largest tiles; the launcher halves them until they divide a block.

None spills, but for four-warp tiles of a head size of 128 on sm_100: ptxas holds these to the registers with
which more programs fit on a processor, and puts up to 16 bytes per thread on the stack.
"""


def _fill(spec: AttentionSpec, configs: Configs) -> dict[str, Any]:
    pointers = choose(spec, descriptors=False)
    return {
        **fill_holes(spec, configs, descriptors=True, layout=LAYOUT),
        "pointer_configs": [(arch, str(pointers[arch])) for arch in TMA],
        "descriptor_arches": descriptor_arches(spec),
        "grows": False,  # rows are started in the order that a call gives
        "lists": True,
        "given": ", ranges, columns, block, order",
        "blocks": BLOCKS,
    }


def _types(spec: AttentionSpec) -> Types:
    return argument_types(spec, LAYOUT)


KIND = Kind(
    "blocks",
    "blocks.py.j2",
    choose,
    _fill,
    programs=(
        Program(constants=_POINTERS, targets=("sm_80", "gfx942")),
        Program(constants={**_POINTERS, "DESCRIPTORS": True}, targets=TMA, variant="descriptors"),
        Program(configs="POINTERS", constants=_POINTERS, targets=TMA, variant="pointers"),
    ),
    norms=(Softmax, SignedSoftmax, RoundedSoftmax, Elementwise, Normalized),
    places="qkhb",
    types=_types,
)
