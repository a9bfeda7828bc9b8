"""The kinds of kernels, one file each, listed here."""

from attnc.codegen.triton.kinds import blocks, forward
from attnc.codegen.triton.kinds.kind import TARGETS, Kind, Program

KINDS = {kind.name: kind for kind in (forward.KIND, blocks.KIND)}
"""Every kind by its name."""

__all__ = ["KINDS", "TARGETS", "Kind", "Program"]
