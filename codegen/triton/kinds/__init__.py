"""The kinds of kernels, one file each, listed here."""

from attnc.codegen.triton.kinds import backward, blocks, forward, varlen
from attnc.codegen.triton.kinds.kind import TARGETS, Kind, Program

KINDS = {kind.name: kind for kind in (forward.KIND, backward.KIND, blocks.KIND, varlen.KIND)}
"""Every kind by its name."""

__all__ = ["KINDS", "TARGETS", "Kind", "Program"]
