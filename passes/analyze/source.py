"""Where in the user's own code a node comes from, and what it does there."""

from __future__ import annotations

from collections import deque

from torch import fx

from attnc.passes.detect.graph import op_name, source_line

FAR = 200
"""How many nodes around one without a trace are asked for theirs."""


def blocking_op(node: fx.Node) -> str:
    """Return the operation of a node, ``aten.tanh`` or ``aten.add.Tensor``; what kind of node else."""
    name = op_name(node)
    if not name:
        return node.op
    return name if "::" in name or name.startswith("py.") else f"aten.{name.removesuffix('.default')}"


def blocking_source(node: fx.Node) -> str:
    """Return ``file.py:line`` of the user's code that made a node, '' if unknown.

    A node without a trace of its own takes that of the nearest node that has one: ``near file.py:line``.
    """
    own = source_line(node)
    if own:
        return own
    queue, seen = deque([node]), {node}
    while queue and len(seen) < FAR:
        n = queue.popleft()
        line = source_line(n)
        if line:
            return f"near {line}"
        for other in (*n.all_input_nodes, *n.users):
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return ""
