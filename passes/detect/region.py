"""Which nodes a site consists of: what dies with it, and what of it is read elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from torch import fx

from attnc.passes.detect.graph import reads_size_only, users


def region_of(
    interior: Sequence[fx.Node], output: fx.Node, skipped: Iterable[fx.Node], read: Set[str]
) -> tuple[set[str], tuple[str, ...]]:
    """Return the nodes that die with the site, and interior nodes whose values are used outside.

    ``skipped`` are nodes between an operand's source and the site.  A node outside whose value only goes into
    the site dies too, unless it is in ``read``: what operands are made from.
    """
    inside = {n.name: n for n in (*interior, *skipped)}
    core = sorted({n.name for n in interior} - {output.name})
    outside = [u for name in core for u in _readers(inside[name]) if u.name not in inside]
    while absorbed := [u for u in outside if u.name not in read and _only_feeds(u, inside)]:
        inside |= {u.name: u for u in absorbed}
        outside = [u for u in outside if u.name not in inside]
    escapes = [name for name in core if any(u.name not in inside for u in _readers(inside[name]))]
    return set(inside), tuple(escapes)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of the elements of a node; its sizes can be had from elsewhere."""
    return [u for u in users(node) if not reads_size_only(u, node)]


def _only_feeds(node: fx.Node, inside: Mapping[str, fx.Node]) -> bool:
    return bool(users(node)) and all(u.name in inside for u in users(node))
