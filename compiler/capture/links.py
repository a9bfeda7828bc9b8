"""Link the nodes of a functional copy to the nodes of the graph it was made from.

A link ``w -> o`` promises: from ``o`` on, to the end of the run, reading ``o`` in the original gives the
value that ``w`` has in the copy.  Three facts can break that promise, and each is checked here:

1. ``o``'s storage is written after ``o``: then ``o`` reads the later value.  Storages are grouped by what the
   fake values share and by what the op schemas declare.
2. One original op became several nodes.  Its value is the last of them; for an in-place op it is the
   functional op of the same name (``mul_`` -> ``mul``), never the views that write it back into the base.
3. The copy's provenance names a higher-order call.  Its results are tuples, so shapes disagree and no link is
   made; what the caller reads from it is linked through its users instead.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import fx

from attnc.capture.alias import flat, last_writes, op_name, writes


def link_nodes(
    original: fx.Graph, work: fx.Graph, mutated_inputs: frozenset[str], source: fx.Graph | None = None
) -> dict[str, str]:
    """Return work name -> original name for every value that both graphs hold.

    ``source`` is the graph that ``work`` was made from, if it is a copy of ``original`` with the same names.
    ``mutated_inputs`` are names of placeholders that the program writes to.
    """
    nodes = {n.name: n for n in original.nodes}
    frozen = last_writes(original)
    order = {n: i for i, n in enumerate(original.nodes)}

    def holds(w: fx.Node, o: fx.Node) -> bool:
        written = frozen.get(o, -1)
        if o.op == "placeholder":
            return w.op == "placeholder" and o.name not in mutated_inputs and written < 0
        return written <= order[o] and _same_kind(w.meta.get("val"), o.meta.get("val"))

    links: dict[str, str] = {}
    for w in work.nodes:
        if w.op == "placeholder" and w.name in nodes and holds(w, nodes[w.name]):
            links[w.name] = w.name
    graph_id = id(source or original)
    groups = _copies(original, work, graph_id)
    for name, copies in groups.items():
        chosen = _value_of(nodes[name], copies)
        if chosen is not None and holds(chosen, nodes[name]):
            links[chosen.name] = name
    written = {n.name for n in original.nodes if writes(n)}
    single = {
        name
        for name, copies in groups.items()
        if len(copies) == 1 or _only_replays(copies, written, graph_id)
    }
    _link_arguments(work, {n: o for n, o in nodes.items() if n in single}, links, holds)
    return links


def link_moments(original: fx.Graph, work: fx.Graph, source: fx.Graph | None = None) -> dict[str, str]:
    """Return work name -> original name for every call that has the same value when it is made.

    The original's storage may be written later: such a call can be replaced, but not read from later on.
    Arguments are those of ``link_nodes``.
    """
    nodes = {n.name: n for n in original.nodes}
    moments: dict[str, str] = {}
    for name, copies in _copies(original, work, id(source or original)).items():
        chosen = _value_of(nodes[name], copies)
        if chosen is not None and _same_kind(chosen.meta.get("val"), nodes[name].meta.get("val")):
            moments[chosen.name] = name
    return moments


def _only_replays(copies: list[fx.Node], written: set[str], graph_id: int) -> bool:
    """Say whether all copies but the last are views of written storages, made again for the last to read.

    Functionalization makes a view of a storage again after each write, at the view's next reader, and gives
    it the reader's provenance.
    """
    inside = set(copies[:-1])

    def base(node: fx.Node) -> fx.Node:
        while node in inside and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    return all(
        isinstance(n.target, torch._ops.OpOverload)
        and any(a.alias_info is not None for a in n.target._schema.arguments)
        and not writes(n)
        and _source_name(base(n), graph_id) in written
        for n in inside
    )


def _copies(original: fx.Graph, work: fx.Graph, source_id: int) -> Mapping[str, list[fx.Node]]:
    """Group the call nodes of ``work`` by the original node they were made from, in order."""
    names = {n.name for n in original.nodes if n.op == "call_function"}
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in work.nodes:
        if node.op == "call_function":
            source = _source_name(node, source_id)
            if source is not None and source in names:
                groups[source].append(node)
    return groups


def _source_name(node: fx.Node, graph_id: int) -> str | None:
    """Return the name that ``node`` had in the graph ``graph_id``, read from its provenance."""
    chain = node.meta.get("from_node") or ()
    while chain:
        entry = chain[-1]
        if entry.graph_id == graph_id:
            return str(entry.name)
        chain = entry.from_node or ()
    return None


def _value_of(original: fx.Node, copies: list[fx.Node]) -> fx.Node | None:
    """Pick the copy that computes ``original``'s value; None when that is not certain."""
    if writes(original):
        wanted = op_name(original).rstrip("_")
        same = [n for n in copies if op_name(n) == wanted]
        return same[0] if len(same) == 1 else None
    if len(copies) == 1:
        return copies[0]
    first_outputs = [n for n in copies if n.target is operator.getitem and n.args[1] == 0]
    plain = [n for n in copies if n.target is not operator.getitem]
    if len(first_outputs) == 1 and first_outputs[0].args[0] is plain[-1]:
        return first_outputs[0]
    return plain[-1] if plain and len(plain) == len(copies) else None


def _link_arguments(
    work: fx.Graph,
    singles: Mapping[str, fx.Node],
    links: dict[str, str],
    holds: Callable[[fx.Node, fx.Node], bool],
) -> None:
    """Link the arguments of linked calls of one op: the same call on the same values.

    This reaches size nodes, which carry no provenance, and values that come out of a higher-order call.
    ``singles`` are the original nodes that became one node each, but for views that were made again.
    """
    for w in reversed(work.nodes):
        o = singles.get(links.get(w.name, ""))
        if o is None or w.target != o.target or writes(o) or w.op != "call_function":
            continue
        for a, b in zip(flat(w.args), flat(o.args), strict=False):
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.name not in links and holds(a, b):
                links[a.name] = b.name


def _same_kind(a: object, b: object) -> bool:
    """Say whether two fake values agree in shape, dtype and device, or are the same symbolic number."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        sizes = zip(a.shape, b.shape, strict=True) if a.ndim == b.ndim else None
        return bool(
            sizes is not None
            and a.dtype == b.dtype
            and a.device == b.device
            and all(_same_number(x, y) for x, y in sizes)
        )
    return isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)) and _same_number(a, b)


def _same_number(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Compare sizes by their expressions; never adds a guard."""
    ea, eb = (x.node.expr if isinstance(x, torch.SymInt) else int(x) for x in (a, b))
    return bool(ea == eb)
