"""The kinds of kernels, one file each, listed here."""

from attnc.codegen.triton.kinds import decode, forward, paged
from attnc.codegen.triton.kinds.kind import Kind, Program

KINDS = {kind.name: kind for kind in (forward.KIND, decode.KIND, paged.KIND)}
"""Every kind by its name."""

__all__ = ["KINDS", "Kind", "Program"]
