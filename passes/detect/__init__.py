"""Find attention sites: anchors, contractions, score programs, masks.  ``detect`` is the door."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.calls import fused_calls
from attnc.passes.detect.describe import describe
from attnc.passes.detect.env import Env
from attnc.passes.detect.flex import flex_calls
from attnc.passes.detect.found import Computed, Found
from attnc.passes.detect.graph import module_path
from attnc.passes.detect.layout import Recipe
from attnc.passes.detect.others import unnormalized
from attnc.passes.detect.pieces import describe_pieces
from attnc.passes.detect.sites import Pieces, Skeleton, skeletons

log = logging.getLogger("attnc.detect")

__all__ = ["Computed", "Env", "Found", "Recipe", "detect"]


def detect(
    work: fx.Graph, tensors: Mapping[str, torch.Tensor | None], linked: Collection[str] | None = None
) -> tuple[list[Found], list[tuple[Miss, str]]]:
    """Return the sites of a functional graph and what looked like one, in node order.

    ``tensors`` names the placeholders (or get_attr nodes) that are parameters, buffers or lifted constants,
    with their values where known. ``linked`` names the nodes whose values exist in the graph that will be
    edited; None means all. A miss comes with the module path of its anchor.
    """
    env = Env(tensors, frozenset(tensors), None if linked is None else frozenset(linked))
    order = {n.name: i for i, n in enumerate(work.nodes)}
    nodes = {n.name: n for n in work.nodes}
    names: Counter[str] = Counter()
    found: list[Found] = []
    missed: list[tuple[Miss, str]] = []
    items: list[tuple[int, Skeleton | Pieces | Miss, str]] = []
    for item in skeletons(work, env):
        anchor = item.node if isinstance(item, Miss) else item.anchor.weights.name
        items.append((order[anchor], item, anchor))
    taken = frozenset(
        n
        for _, i, _ in items
        for n in (
            [i.node]
            if isinstance(i, Miss)
            else [x.name for x in i.interior]
            if isinstance(i, Skeleton | Pieces)
            else []
        )
    )
    for item in unnormalized(work, env, taken):
        anchor = item.node if isinstance(item, Miss) else item.anchor.weights.name
        items.append((order[anchor], item, anchor))
    for call in (*fused_calls(work, env), *flex_calls(work)):
        anchor = call.node if isinstance(call, Miss) else call.anchor.weights.name
        items.append((order[anchor], call, anchor))
    for _, item, anchor in sorted(items, key=lambda t: t[0]):
        path = module_path(nodes[anchor])[0] or "model"
        names[path] += 1
        name = path if names[path] == 1 else f"{path}#{names[path]}"
        site = _described(item, env, name)
        if isinstance(site, Miss):
            missed.append((site, name))
            log.info("%s: missed %s at %s: %s", name, site.code, site.node, site.why)
        else:
            found.append(site)
            log.info("%s: %s", name, site.match.spec)
    return found, missed


def _described(item: Skeleton | Pieces | Miss, env: Env, name: str) -> Found | Miss:
    """Describe one site; one on which a rule raises is a miss, so that it costs no other site."""
    if isinstance(item, Miss):
        return item
    try:
        return describe_pieces(item, env, name) if isinstance(item, Pieces) else describe(item, env, name)
    except Exception as error:  # a mistake of ours must not take the user's model down
        log.warning("%s: a rule raised", name, exc_info=error)
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Miss("internal-error", item.anchor.weights.name, f"a rule raised {said}")
