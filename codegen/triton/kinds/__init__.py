"""The kinds of kernels, one file each, listed here."""

from attnc.codegen.triton.kinds import (
    backward,
    blocks,
    decode,
    forward,
    paged,
    tangent,
    varlen,
    varlen_backward,
)
from attnc.codegen.triton.kinds.kind import TARGETS, Kind, Program

_ALL = (forward, backward, tangent, decode, paged, blocks, varlen, varlen_backward)
KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in _ALL}
"""Every kind by its name."""

__all__ = ["KINDS", "TARGETS", "Kind", "Program"]
