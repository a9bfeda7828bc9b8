"""From a skeleton with roles to a Found: the spec, and recipes for every tensor it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnc import expr as E
from attnc import masks as M
from attnc.expr import Expr
from attnc.ir import AttentionSpec, Bias, Match, Miss, Operand, Pointwise, Scale, Site, Softcap, Step
from attnc.passes.detect.draft import Draft, Refusal
from attnc.passes.detect.env import Env
from attnc.passes.detect.finite import is_total
from attnc.passes.detect.found import Found, Making
from attnc.passes.detect.graph import argument, base_name, module_path, shape, source_line, tensor_of
from attnc.passes.detect.layout import Recipe, digits, from_roles, size_of, to_roles
from attnc.passes.detect.region import region_of
from attnc.passes.detect.roles import Atoms, Candidate, Roles, assign, choose
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.steps import as_rounded, write_mask, write_norm, write_steps
from attnc.pointwise import parse_term
from attnc.sizes import show_dim


def describe(s: Skeleton, env: Env, name: str) -> Found | Miss:
    """Return the finished description of a skeleton; ``name`` becomes the site's id."""
    written = write(s, env)
    return written if isinstance(written, Miss) else finish([written], s, name)


@dataclass(frozen=True, slots=True)
class Written:
    """What a skeleton computes, and how its tensors are made; the region is not known yet."""

    skeleton: Skeleton
    spec: AttentionSpec
    roles: Roles
    operands: Mapping[str, Making]
    captured: Mapping[str, Making]
    result: Recipe
    skipped: tuple[fx.Node, ...]
    conditions: tuple[str, ...] = ()


def write(s: Skeleton, env: Env, beside: frozenset[Expr] = frozenset()) -> Written | Miss:
    """Return spec and recipes of a skeleton, or why it has none; see ``assign`` for ``beside``."""
    chosen = choose(s, env)
    if isinstance(chosen, Miss):
        return chosen
    roles = assign(s, chosen, beside)
    if isinstance(roles, Miss):
        return roles
    try:
        return _written(s, env, chosen, roles)
    except Refusal as r:
        return r.miss


def _written(s: Skeleton, env: Env, chosen: dict[str, list[Candidate]], r: Roles) -> Written:
    draft = Draft(s, r, env)
    picked = {n: _easiest(places, _LAYOUTS[n][1](r)) for n, places in chosen.items()}
    factor = picked["q"].factor * picked["k"].factor
    if factor != 1.0:
        s.mods.insert(0, Scale(factor))
    write_steps(draft, env)
    mask, fill = write_mask(draft)
    norm = write_norm(draft, env)
    q, k, v, recipes = _operands(r, picked)
    if s.anchor.rounds:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        norm = as_rounded(draft, mask, fill, norm, work)
    result = from_roles(s.out, (r.batch, r.heads, r.query, r.value), shape(s.output), "")
    if result is None:
        why = "the result's axes are no product of batch, heads, queries and features"
        raise Refusal(Miss("result-layout", s.output.name, why))
    group = _number(size_of(r.group), s)
    steps, captured = tuple(draft.steps), tuple(draft.captured)
    spec = AttentionSpec(q, k, v, group, steps, mask, fill, norm, captured, s.dropout)
    _check_empty_rows(s, spec)
    _check_nan_made_zero(s, spec)
    made = {o.name: draft.recipes[o.name] for o in captured}
    skipped = tuple(n for c in picked.values() for n in c.skipped)
    return Written(s, spec, r, recipes, made, result, skipped, tuple(draft.conditions))


def _check_empty_rows(s: Skeleton, spec: AttentionSpec) -> None:
    """Refuse a sum of bare exponentials where a row may hold nothing but a finite fill.

    Such a row is 0 / 0, or a log-sum-exp that rounding makes the fill itself; a softmax spreads its weights.
    """
    fill, sink = spec.fill.value, getattr(spec.norm, "sink", None)
    if s.anchor.bare and math.isfinite(fill) and sink is None:
        if not M.may_hide_a_whole_row(spec.mask, *spec.lengths()):
            return
        why = f"rows that see no key hold {fill:g} alone, whose exponentials vanish or are rounded off"
        raise Refusal(Miss("empty-rows-differ", s.anchor.weights.name, why))


def _check_nan_made_zero(s: Skeleton, spec: AttentionSpec) -> None:
    """Refuse ``nan_to_num`` of weights whose scores may be NaN by a step, and not by a row all -inf alone."""
    if all(base_name(n) != "nan_to_num" for n in (s.anchor.weights, *s.anchor.inner)):
        return
    hidden = False
    for step in spec.scores:
        if not _makes_no_nan(step, hidden):
            why = f"nan_to_num also makes zero what {step} makes NaN of infinite or negative scores"
            raise Refusal(Miss("nan-made-zero", s.anchor.weights.name, why))
        hidden = hidden or isinstance(step, Bias) or (isinstance(step, Pointwise) and "-inf" in step.expr)


def _makes_no_nan(step: Step, hidden: bool) -> bool:
    """Say whether finite scores stay finite or become -inf; ``hidden`` says that some may be -inf already."""
    match step:
        case Bias() | Softcap():
            return True
        case Scale(factor):
            return factor > 0 or not hidden
        case Pointwise(expr):
            return is_total(parse_term(expr), hidden)
    return not hidden


def finish(
    parts: Sequence[Written],
    s: Skeleton,
    name: str,
    whole: Written | None = None,
    added: Sequence[fx.Node] = (),
    reads: Collection[str] = (),
) -> Found:
    """Return the site that one or several written skeletons make up.

    ``s`` says where; ``whole`` is what the parts compute together, and ``added`` are the nodes that put them
    together, the site's output last.  ``reads`` names what is read besides operands.
    """
    written = whole or parts[0]
    output = added[-1] if added else s.output
    made = [r for w in (*parts, written) for r in (*w.operands.values(), *w.captured.values())]
    interior = [n for w in parts for n in w.skeleton.interior] + list(added)
    skipped = [n for w in parts for n in w.skipped]
    region, escapes = region_of(interior, output, skipped, {n for r in made for n in r.reads} | set(reads))
    path, kind = module_path(s.anchor.weights)
    site = Site(name, path, f"{kind} {source_line(s.anchor.weights)}".strip())
    trail = tuple(reversed(s.trail))
    conditions = tuple(dict.fromkeys(c for w in parts for c in w.conditions))
    match = Match(written.spec, site, frozenset(region), output.name, trail, escapes, conditions)
    fused = s.trail[:1] == ["sdpa-call"]
    return Found(
        match,
        written.operands,
        written.captured,
        written.result,
        s.anchor.weights.name,
        fused,
        improves=fused and _improves(s, written.spec),
    )


def _improves(s: Skeleton, spec: AttentionSpec) -> bool:
    """Say whether the spec knows more than the fused call.

    That is a closed mask in place of a tensor, keys that are not repeated, or one call in place of many.
    """
    call = s.anchor.weights
    closed = (
        argument(call, 3, "attn_mask") is not None
        and not any(isinstance(x, Bias) for x in spec.scores)
        and not _is_dense(spec.mask)
    )
    grouped = spec.group_size > 1 and not argument(call, 7, "enable_gqa", False)
    return closed or grouped or s.output is not call


def _is_dense(mask: M.Mask) -> bool:
    return isinstance(mask, M.Dense) or any(_is_dense(p) for p in getattr(mask, "parts", ()))


def _number(size: Expr, s: Skeleton) -> int:
    n = E.as_int(size)
    if n is None:
        raise Refusal(
            Miss(
                "size-not-decided",
                s.scores.node.name,
                f"the number of query heads per key head is {size}, expected a number",
            )
        )
    return n


_LAYOUTS: dict[str, tuple[str, Callable[[Roles], tuple[Atoms, ...]]]] = {
    "q": ("bhqd", lambda r: (r.batch, r.heads, r.query, r.feature)),
    "k": ("bhkd", lambda r: (r.batch, r.head, r.key, r.feature)),
    "v": ("bhke", lambda r: (r.batch, r.head, r.key, r.value)),
}


def _easiest(places: list[Candidate], roles: tuple[Atoms, ...]) -> Candidate:
    """Return the place from which the fewest views lead to the roles, the nearest among equals."""
    best, fewest = places[0], 1 << 30
    for c in places:
        if any(digits(x) is None for x in c.at.index):
            continue
        recipe = to_roles(c.at, roles)
        if recipe is not None and len(recipe.steps) < fewest:
            best, fewest = c, len(recipe.steps)
        if not fewest:
            break
    return best


def _operands(r: Roles, chosen: dict[str, Candidate]) -> tuple[Operand, Operand, Operand, dict[str, Recipe]]:
    operands, recipes = {}, {}
    for name, (axes, layout) in _LAYOUTS.items():
        at, roles = chosen[name].at, layout(r)
        recipe = to_roles(at, roles)
        t = tensor_of(at.node)
        if recipe is None or t is None:
            raise Refusal(
                Miss("operand-layout", at.node.name, f"{name} cannot be brought to {axes} by views")
            )
        recipes[name] = recipe
        operands[name] = Operand(name, axes, tuple(show_dim(size_of(x)) for x in roles), t.dtype)
    return operands["q"], operands["k"], operands["v"], recipes
