"""Lower plans to FlexAttention where a compiler exists: mods and block lists written from the spec.

``can_run`` says why a spec or a machine is refused, ``lower`` makes the node ``torch.ops.attnc.flex_attend``.
"""

from attnc.codegen.flex.blocks import block_lists
from attnc.codegen.flex.lower import can_run, lower
from attnc.codegen.flex.op import flex_attend
from attnc.codegen.flex.source import source

__all__ = ["block_lists", "can_run", "flex_attend", "lower", "source"]
