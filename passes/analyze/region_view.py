"""Describe the nodes around a site as a small graph to be drawn: before, after, or around what stopped it.

A description is plain data: ``nodes``, each with ``name``, ``op``, ``shape``, ``source`` and ``role``, and
``edges``, pairs of positions in ``nodes``, producer first.  Roles: ``operand`` (read by the site),
``interior``, ``output``, ``escape`` (of the site, and read outside of it), ``blocking`` (what stopped it) and
``outside``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import fx

from attnc.passes.analyze.source import blocking_op
from attnc.passes.detect import Found
from attnc.passes.detect.contraction import contraction
from attnc.passes.detect.graph import source_line, tensor_of

View = dict[str, Any]
MOST = 120
"""Nodes of one drawing; the ones furthest from the output are left out."""
AROUND = 40


def view_of_site(found: Found, nodes: Mapping[str, fx.Node], blocking: str = "") -> View:
    """Return the region of a found site: what it reads, what may be erased, its output."""
    m = found.match
    region = [nodes[n] for n in m.region if n in nodes]
    read = [r for recipe in found.makings for r in recipe.reads]
    inside = set(region)
    operands = {nodes[n] for n in read if n in nodes}
    operands |= {i for n in region for i in n.all_input_nodes if i not in inside and tensor_of(i) is not None}

    def role(node: fx.Node) -> str:
        if node.name == blocking:
            return "blocking"
        if node.name in m.escapes:
            return "escape"
        if node.name == m.output:
            return "output"
        return "interior" if node in inside else "operand"

    # What a derived mask is made from may have no way to the output through the region; it is drawn apart.
    return _view(_nearest(nodes[m.output], inside | operands), role)


def view_of_miss(node: fx.Node) -> View:
    """Return what lies around a blocking node, up to the contractions on both sides."""
    near = {node, *_walk(node, lambda n: n.all_input_nodes), *_walk(node, lambda n: tuple(n.users))}
    return _view(near, lambda n: "blocking" if n is node else "interior")


def view_of_rewrite(output: fx.Node, others: Collection[str]) -> View:
    """Return the nodes that were put in for a site; ``others`` are the outputs of other sites."""
    made: set[fx.Node] = set()
    stack = [output]
    while stack:
        n = stack.pop()
        if n not in made and "attnc" in n.meta and (n is output or n.name not in others):
            made.add(n)
            stack += n.all_input_nodes
    read = {i for n in made for i in n.all_input_nodes if i not in made and tensor_of(i) is not None}

    def role(node: fx.Node) -> str:
        return "output" if node is output else "interior" if node in made else "operand"

    return _view(_nearest(output, made | read), role)


def _walk(start: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    """Return nodes reached from one, nearest first; a contraction or an input ends the way."""
    out: list[fx.Node] = []
    queue = deque(following(start))
    while queue and len(out) < AROUND:
        n = queue.popleft()
        if n in out or n.op == "output" or tensor_of(n) is None:
            continue
        out.append(n)
        if contraction(n) is None and n.op == "call_function":
            queue.extend(following(n))
    return out


def _nearest(output: fx.Node, members: set[fx.Node]) -> list[fx.Node]:
    """Return at most ``MOST`` members, those nearest to the output first."""
    order: dict[fx.Node, None] = {output: None}
    queue = deque([output])
    while queue:
        for i in queue.popleft().all_input_nodes:
            if i in members and i not in order:
                order[i] = None
                queue.append(i)
    rest = sorted(members - set(order), key=lambda n: n.name)
    return [*order, *rest][:MOST]


def _view(members: Iterable[fx.Node], role: Callable[[fx.Node], str]) -> View:
    wanted = set(members)
    graph = next(iter(wanted)).graph
    ordered = [n for n in graph.nodes if n in wanted]
    place = {n: i for i, n in enumerate(ordered)}
    edges = [[place[i], place[n]] for n in ordered for i in n.all_input_nodes if i in place]
    return {
        "nodes": [
            {
                "name": n.name,
                "op": blocking_op(n) if n.op == "call_function" else n.op,
                "shape": shape_text(n),
                "source": source_line(n),
                "role": role(n),
            }
            for n in ordered
        ],
        "edges": edges,
    }


def shape_text(node: fx.Node) -> str:
    """Return sizes and dtype of a node's value, ``2 x 12 x s77 x 64 float32``; '' if it is no tensor."""
    t = tensor_of(node)
    if t is None:
        return ""
    return f"{' x '.join(map(str, t.shape)) or 'scalar'} {str(t.dtype).removeprefix('torch.')}"
