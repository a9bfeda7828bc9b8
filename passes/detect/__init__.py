"""Find attention sites: anchors, contractions, score programs, masks.  ``detect`` is the door."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from attnc.ir import Miss
from attnc.passes.detect.calls import fused_calls
from attnc.passes.detect.combined import Combination, combinations
from attnc.passes.detect.describe import describe
from attnc.passes.detect.env import Env
from attnc.passes.detect.flex import flex_calls
from attnc.passes.detect.found import Computed, Found
from attnc.passes.detect.graph import module_path
from attnc.passes.detect.layout import Recipe
from attnc.passes.detect.norms import NORM_FINDERS
from attnc.passes.detect.others import unnormalized
from attnc.passes.detect.pieces import describe_pieces
from attnc.passes.detect.sites import Pieces, Skeleton, skeletons
from attnc.passes.detect.terms import describe_combination
from attnc.passes.detect.unrolled import copy_of, loops

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
    items: list[_Item] = []
    for site in skeletons(work, env):
        anchor = site.node if isinstance(site, Miss) else site.anchor.weights.name
        items.append((order[anchor], site, anchor))
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
    items = _with_combinations(work, env, items, order)
    for other in unnormalized(work, env, taken):
        anchor = other.node if isinstance(other, Miss) else other.anchor.weights.name
        items.append((order[anchor], other, anchor))
    for call in (*fused_calls(work, env), *flex_calls(work)):
        anchor = call.node if isinstance(call, Miss) else call.anchor.weights.name
        items.append((order[anchor], call, anchor))
    items, turns = _with_loops(work, env, items)
    for _, item, anchor in sorted(items, key=lambda t: t[0]):
        path = module_path(nodes[anchor])[0] or "model"
        names[path] += 1
        name = path if names[path] == 1 else f"{path}#{names[path]}"
        result = _described(item, env, name)
        if isinstance(result, Miss):
            missed.append((result, name))
            log.info("%s: missed %s at %s: %s", name, result.code, result.node, result.why)
        else:
            others = [s.anchor.weights.name for s in item.parts] if isinstance(item, Combination) else []
            others += [a for merged, anchors in turns if merged is item for a in anchors]
            found.append(replace(result, others=tuple(a for a in others if a != result.anchor)))
            log.info("%s: %s", name, result.match.spec)
    return found, missed


_Item = tuple[int, Skeleton | Pieces | Combination | Miss, str]


def _with_combinations(work: fx.Graph, env: Env, items: list[_Item], order: Mapping[str, int]) -> list[_Item]:
    """Replace misses of weights that meet no values themselves by what their sums are."""
    lost = {i.node for _, i, _ in items if isinstance(i, Miss) and i.code == "no-value-contraction"}
    if not lost:
        return items
    anchors = [a for finder in NORM_FINDERS for a in finder(work) if a.weights.name in lost]
    out = list(items)
    for item in combinations(anchors, env):
        solved = {item.node} if isinstance(item, Miss) else {s.anchor.weights.name for s in item.parts}
        out = [x for x in out if not (isinstance(x[1], Miss) and x[1].node in solved)]
        name = item.node if isinstance(item, Miss) else item.anchor.weights.name
        out.append((order[name], item, name))
    return out


def _with_loops(
    work: fx.Graph, env: Env, items: list[_Item]
) -> tuple[list[_Item], list[tuple[Skeleton, list[str]]]]:
    """Replace the sites of a loop that was unrolled by the one that they are together, if that is a site.

    Returns the items, and for each such site the anchors of its turns.
    """
    out, merges = list(items), list[tuple[Skeleton, list[str]]]()
    for merged, parts in loops(work, [i for _, i, _ in items if isinstance(i, Skeleton)], env):
        turns = [x for x in out if any(x[1] is p for p in parts)]
        found = _described(copy_of(merged), env, "") if len(turns) == len(parts) else None
        if isinstance(found, Found) and not found.match.escapes:  # what one turn shows keeps no other back
            out = [x for x in out if x not in turns] + [(turns[0][0], merged, turns[0][2])]
            merges.append((merged, [x[2] for x in turns]))
    return out, merges


def _described(item: Skeleton | Pieces | Combination | Miss, env: Env, name: str) -> Found | Miss:
    """Describe one site; one on which a rule raises is a miss, so that it costs no other site."""
    if isinstance(item, Miss):
        return item
    try:
        if isinstance(item, Combination):
            return describe_combination(item, env, name)
        return describe_pieces(item, env, name) if isinstance(item, Pieces) else describe(item, env, name)
    except Exception as error:  # a mistake of ours must not take the user's model down
        log.warning("%s: a rule raised", name, exc_info=error)
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Miss("internal-error", item.anchor.weights.name, f"a rule raised {said}")
