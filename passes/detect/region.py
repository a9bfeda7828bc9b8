"""Which nodes a site consists of: what dies with it, and what of it is read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from attnc.passes.detect.graph import reads_size_only, users
from attnc.passes.detect.roles import Candidate
from attnc.passes.detect.sites import Skeleton


def region_of(s: Skeleton, chosen: dict[str, Candidate], read: set[str]) -> tuple[set[str], tuple[str, ...]]:
    """Return the nodes that die with the site, and interior nodes whose values are used outside.

    A node outside whose value only goes into the site dies too, unless it is in ``read``: what operands are
    made from.
    """
    inside = {n.name: n for n in s.interior}
    for c in chosen.values():
        for n in c.skipped:
            inside.setdefault(n.name, n)
    core = sorted({n.name for n in s.interior} - {s.output.name})
    outside = [u for name in core for u in _readers(inside[name]) if u.name not in inside]
    while absorbed := [u for u in outside if u.name not in read and _only_feeds(u, inside)]:
        inside |= {u.name: u for u in absorbed}
        outside = [u for u in outside if u.name not in inside]
    escapes = [name for name in core if any(u.name not in inside for u in _readers(inside[name]))]
    return set(inside), tuple(escapes)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of the elements of a node; its sizes can be had from elsewhere."""
    return [u for u in users(node) if not reads_size_only(u)]


def _only_feeds(node: fx.Node, inside: Mapping[str, fx.Node]) -> bool:
    return bool(users(node)) and all(u.name in inside for u in users(node))
