"""Tell whether an exported graph can be read as it is, without a functional copy.

``run_decompositions({})`` traces the whole program again, which costs about twice the export.  What detection
needs from it is that nothing is written in place, that bodies of higher-order calls are inlined, and that
views are spelled by few operations.  Most models have all that from the start; the rest are traced again.
"""

from __future__ import annotations

import torch
from torch import fx

from attnc.capture.alias import op_name, writes
from attnc.programs import copy_graph

_KNOWN_VIEW_NAMES = """
reshape contiguous to flatten unflatten expand_as chunk split movedim moveaxis swapaxes swapdims narrow
type_as view_as reshape_as broadcast_to ravel mT numpy_T
"""
_KNOWN_VIEWS = frozenset(_KNOWN_VIEW_NAMES.split())
"""Composite views that the index maps of detection know by name; functionalization spells them otherwise."""
_METADATA = "_assert_tensor_metadata"


MOST = 700
"""Operations from which making a program functional with free sizes takes longer than anybody waits."""


def is_costly(graph: fx.Graph) -> bool:
    """Say whether the graph must be traced again, is long, and has free sizes that each step reasons on."""
    inputs = (n.meta.get("val") for n in graph.nodes if n.op == "placeholder")
    sizes = [n for v in inputs if isinstance(v, torch.Tensor) for n in v.shape]
    free = any(isinstance(n, torch.SymInt) for n in sizes)
    return free and len(graph.nodes) > MOST and not all(map(_is_plain, graph.nodes))


def plain_copy(graph: fx.Graph) -> fx.Graph | None:
    """Return a copy of a graph without dead code, with the same names; None if it is not functional."""
    if not all(map(_is_plain, graph.nodes)):
        return None
    work = copy_graph(graph)
    work.owning_module = graph.owning_module
    for node in list(work.nodes):
        if node.target is torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default
        if op_name(node) == _METADATA:
            work.erase_node(node)
    work.eliminate_dead_code()
    return work


def _is_plain(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output", "get_attr")
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return not writes(node)
    if target is torch.ops.aten.detach_.default:  # a mark for autograd: values and shapes stay
        return True
    name = op_name(node)
    if writes(node) or name.startswith(("_set_grad", "_add_batch", "_remove_batch", "_vmap")):
        return False
    if name in ("batch_norm", "instance_norm", "rrelu"):
        return name == "batch_norm" and node.args[5] is False
    if name in ("view", "reshape", "_unsafe_view", "expand") and _is_loose(node):
        return False
    aliases = any(r.alias_info is not None for r in target._schema.returns)
    return not aliases or name in _KNOWN_VIEWS or not _is_composite(target)


def _is_loose(node: fx.Node) -> bool:
    """Say whether a view to a size given as a number has a symbol for it, which tracing again settles."""
    val, sizes = node.meta.get("val"), node.args[1] if len(node.args) > 1 else ()
    if not isinstance(val, torch.Tensor) or not isinstance(sizes, list | tuple) or len(sizes) != val.ndim:
        return False
    given = zip(sizes, val.shape, strict=True)
    return any(isinstance(n, int) and n >= 0 and isinstance(m, torch.SymInt) for n, m in given)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target._name, "CompositeImplicitAutograd"))
