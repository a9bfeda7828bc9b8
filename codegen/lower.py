"""Lower ``attend`` nodes of a graph to what their backend runs.

Or to plain ATen for artefacts that leave us.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from attnc.codegen import flex, sdpa
from attnc.editing import Builder, SharedMemory, erase
from attnc.ir import AttentionSpec
from attnc.printer import parse

aten = torch.ops.aten
_PURE_STRIDES = frozenset(
    {"permute", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select", "alias", "detach", "t"}
)


def attends(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``attend`` nodes in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.attnc.attend.default]


def lower(graph: fx.Graph, portable: bool = False) -> tuple[dict[str, int], dict[str, str]]:
    """Replace each ``attend`` node by nodes of the backend in its stamp, in place.

    Returns how many went to each backend, and the new names of nodes that held outputs of ``attend``.

    A node whose log-sum-exp is used, or that has dropout, stays.  ``portable`` uses plain ATen wherever a
    plain form exists.
    """
    build, shared = Builder(graph), SharedMemory(graph)
    counts: dict[str, int] = {}
    renamed: dict[str, str] = {}
    for node in attends(graph):
        spec = parse(str(node.args[4]))
        stamp = node.meta.get("attnc") or {}
        backend = str(stamp.get("backend", "sdpa"))
        if portable and sdpa.can_run(spec) is None:
            backend = "sdpa"
        made = _lowered(node, spec, backend, build, shared, portable, renamed)
        counts[backend if made else "attend"] = counts.get(backend if made else "attend", 0) + 1
    graph.eliminate_dead_code()
    return counts, renamed


def _lowered(
    node: fx.Node,
    spec: AttentionSpec,
    backend: str,
    build: Builder,
    shared: SharedMemory,
    portable: bool,
    renamed: dict[str, str],
) -> bool:
    reads = list(node.users)
    if (
        spec.dropout
        or backend not in ("sdpa", "flex")
        or any(u.target is not operator.getitem or u.args[1] != 0 for u in reads)
    ):
        return False
    q, k, v, captured, *_ = node.args
    build.before(node, node.meta.get("attnc"), node)
    if backend == "sdpa":
        out = sdpa.lower(spec, build, q, k, v, captured, portable)  # type: ignore[arg-type]
    else:
        out = flex.lower(spec, build, q, k, v, captured)  # type: ignore[arg-type]
    for read in reads:
        value = _with_strides(out, read, build)
        read.replace_all_uses_with(value, propagate_meta=False)
        renamed[read.name] = value.name
        erase(build.graph, [read], shared=shared)
    erase(build.graph, [node], shared=shared)
    return True


def _with_strides(out: fx.Node, read: fx.Node, build: Builder) -> fx.Node:
    """Return a contiguous copy of ``out`` if its strides are new and some user makes a ``view`` of it."""
    if out.meta["val"].stride() == read.meta["val"].stride() or not _viewed(read, lambda n: n.users):
        return out
    return build.call(aten.clone.default, out, memory_format=torch.contiguous_format)


def _viewed(node: fx.Node, users: Callable[[fx.Node], dict[fx.Node, None]]) -> bool:
    stack = [node]
    while stack:
        for u in users(stack.pop()):
            name = getattr(u.target, "__name__", str(u.target)).partition(".")[0]
            if name in ("view", "as_strided", "view_as_complex", "_unsafe_view"):
                return True
            if name in _PURE_STRIDES:
                stack.append(u)
    return False
