"""Draw the region of a site as SVG: boxes in layers from operands down to the output, no script, no links.

Layers come from networkx (the longest way from an input), places within a layer from those of the producers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 190, 46
GAP_X, GAP_Y = 14, 26
LETTERS = 27
FILLS = {
    "operand": "#dce9f7",
    "interior": "#fff",
    "output": "#d9f0d9",
    "escape": "#fde3b8",
    "blocking": "#f8c9c4",
    "outside": "#eee",
}
MEANINGS = {
    "operand": "read by the site",
    "interior": "of the site",
    "output": "its result",
    "escape": "of the site, and read outside of it",
    "blocking": "what stopped it",
    "outside": "of neither",
}

Place = tuple[float, float]


def drawing(view: Mapping[str, Any], title: str) -> str:
    """Return one region as an SVG; ``view`` has ``nodes`` and ``edges`` as described in ``region_view``."""
    nodes, edges = view["nodes"], [(int(a), int(b)) for a, b in view["edges"]]
    places = layout(len(nodes), edges)
    wide = max((x for x, _ in places), default=0.0) + WIDTH
    high = max((y for _, y in places), default=0.0) + HEIGHT
    lines = "".join(_line(places[a], places[b]) for a, b in edges)
    boxes = "".join(_box(node, place) for node, place in zip(nodes, places, strict=True))
    return (
        f'<svg class=region viewBox="-6 -6 {wide + 12:.0f} {high + 12:.0f}" width="{wide + 12:.0f}" '
        f'height="{high + 12:.0f}" role=img aria-label="{escape(title, quote=True)}">{lines}{boxes}</svg>'
    )


def legend(views: Sequence[Mapping[str, Any]]) -> str:
    """Return what the colors mean, for the roles that occur."""
    roles = [r for r in FILLS if any(n["role"] == r for v in views for n in v["nodes"])]
    return "".join(
        f'<span class=key><i style="background:{FILLS[r]}"></i>{r}: {MEANINGS[r]}</span> ' for r in roles
    )


def layout(count: int, edges: Sequence[tuple[int, int]]) -> list[Place]:
    """Return the upper left corner of each box: centered layers downwards, each in the order of producers."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edges)
    layers = _pulled_down(graph, [sorted(layer) for layer in nx.topological_generations(graph)])
    widest = max((len(layer) for layer in layers), default=0)
    places: dict[int, Place] = {}
    for depth, layer in enumerate(layers):
        start = (widest - len(layer)) * (WIDTH + GAP_X) / 2
        for i, node in enumerate(sorted(layer, key=lambda n: _wanted(graph, n, places))):
            places[node] = (start + i * (WIDTH + GAP_X), depth * (HEIGHT + GAP_Y))
    return [places[i] for i in range(count)]


def _pulled_down(graph: Any, layers: list[list[int]]) -> list[list[int]]:
    """Move every node down to just above its first reader, so that lines stay short."""
    depth: dict[int, int] = {}
    for d, layer in reversed(list(enumerate(layers))):
        for n in layer:
            depth[n] = min((depth[r] for r in graph.successors(n)), default=d + 1) - 1
    out: list[list[int]] = [[] for _ in layers]
    for n in sorted(depth):
        out[depth[n]].append(n)
    return [layer for layer in out if layer]


def _wanted(graph: Any, node: int, places: Mapping[int, Place]) -> tuple[float, int]:
    xs = [places[p][0] for p in graph.predecessors(node) if p in places]
    return (sum(xs) / len(xs) if xs else float("inf"), node)


def _line(a: Place, b: Place) -> str:
    x1, y1, x2, y2 = a[0] + WIDTH / 2, a[1] + HEIGHT, b[0] + WIDTH / 2, b[1]
    middle = (y1 + y2) / 2
    tip = f"M{x2 - 4:.0f} {y2 - 6:.0f} L{x2:.0f} {y2:.0f} L{x2 + 4:.0f} {y2 - 6:.0f}"
    curve = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{curve} {tip}" fill="none" stroke="#888"/>'


def _box(node: Mapping[str, str], place: Place) -> str:
    x, y = place
    whole = "\n".join(filter(None, (node["name"], node["op"], node["shape"], node["source"], node["role"])))
    texts = (node["op"], node["shape"] or node["name"], node["source"])
    rows = "".join(
        f'<text x="{x + 6:.0f}" y="{y + 14 + 13 * i:.0f}">{escape(_short(text))}</text>'
        for i, text in enumerate(texts)
        if text
    )
    return (
        f'<g data-node="{escape(node["name"], quote=True)}" class={node["role"]}>'
        f"<title>{escape(whole)}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="4" stroke="#555" '
        f'fill="{FILLS[node["role"]]}"/>{rows}</g>'
    )


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 2]}.."
