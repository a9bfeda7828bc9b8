"""From a skeleton with roles to a Found: the spec, its mask and captured operands, and recipes for every tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attnc import expr as E
from attnc import masks as M
from attnc.expr import Expr
from attnc.ir import (
    AttentionSpec,
    Bias,
    Fill,
    Gain,
    Match,
    Miss,
    Operand,
    Scale,
    Site,
    Softcap,
    Softmax,
    Step,
)
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask, RawShift
from attnc.passes.detect.found import Computed, Found
from attnc.passes.detect.graph import argument, module_path, shape, source_line, tensor_of, users
from attnc.passes.detect.layout import Recipe, digits, from_roles, size_of, to_roles
from attnc.passes.detect.masks.lift import Positions, lift
from attnc.passes.detect.roles import Atoms, Candidate, Roles, assign, choose
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.views import At
from attnc.sizes import show_dim

HUGE = -1e30


class Refusal(Exception):
    """A condition of the description failed; carries the Miss.  Raised and caught inside this package only."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.why)
        self.miss = miss


@dataclass
class _Draft:
    """The spec while it is being written."""

    skeleton: Skeleton
    roles: Roles
    steps: list[Step] = field(default_factory=list)
    mask: RawMask | None = None
    captured: list[Operand] = field(default_factory=list)
    recipes: dict[str, Recipe | Computed] = field(default_factory=dict)

    def grid(self) -> tuple[Atoms, Atoms, Atoms, Atoms]:
        """Return the atoms of the score axes b, h, q, k."""
        r = self.roles
        return r.batch, r.heads, r.query, r.key

    def capture(self, axes: str, roles: tuple[Atoms, ...], recipe: Recipe | Computed, dtype: torch.dtype, kept: tuple[bool, ...]) -> str:
        """Add a captured operand and return its name; ``kept`` says which roles are not of size 1."""
        name = f"c{len(self.captured)}"
        dims = tuple(show_dim(size_of(r)) if k else 1 for r, k in zip(roles, kept, strict=True))
        self.captured.append(Operand(name, axes, dims, dtype))
        self.recipes[name] = recipe
        return name


def describe(s: Skeleton, env: Env, name: str) -> Found | Miss:
    """Return the finished description of a skeleton; ``name`` becomes the site's id."""
    chosen = choose(s, env)
    if isinstance(chosen, Miss):
        return chosen
    roles = assign(s, chosen)
    if isinstance(roles, Miss):
        return roles
    try:
        return _found(s, env, chosen, roles, name)
    except Refusal as r:
        return r.miss


def _found(s: Skeleton, env: Env, chosen: dict[str, Candidate], r: Roles, name: str) -> Found:
    draft = _Draft(s, r)
    factor = chosen["q"].factor * chosen["k"].factor
    if factor != 1.0:
        s.mods.insert(0, Scale(factor))
    if chosen["v"].factor != 1.0:
        raise Refusal(Miss("scaled-values", chosen["v"].at.node.name, "the values are multiplied by a constant"))
    _steps(draft, env)
    mask, fill = _mask(draft)
    norm = _norm(draft, env)
    q, k, v, recipes = _operands(s, r, chosen)
    result = from_roles(s.out, (r.batch, r.heads, r.query, r.value), shape(s.output), "")
    if result is None:
        raise Refusal(Miss("result-layout", s.output.name, "the result's axes are no product of batch, heads, queries and features"))
    spec = AttentionSpec(q, k, v, _number(size_of(r.group), s), tuple(draft.steps), mask, fill, norm, tuple(draft.captured), s.dropout)
    region, escapes = _region(s, chosen)
    path, kind = module_path(s.anchor.weights)
    line = source_line(s.anchor.weights)
    match = Match(spec, Site(name, path, f"{kind} {line}".strip()), frozenset(region), s.output.name, tuple(reversed(s.trail)), escapes)
    captured = {n: draft.recipes[n] for n in (o.name for o in draft.captured)}
    fused = s.trail == ["sdpa-call"]
    return Found(match, recipes, captured, result, s.anchor.weights.name, fused, improves=fused and _improves(s, spec, chosen))


def _improves(s: Skeleton, spec: AttentionSpec, chosen: dict[str, Candidate]) -> bool:
    """Say whether the spec knows more than the fused call: a closed mask in place of a tensor, or keys that are not repeated."""
    closed = argument(s.output, 3, "attn_mask") is not None and not any(isinstance(x, Bias) for x in spec.scores) and not _is_dense(spec.mask)
    return closed or (spec.group_size > 1 and not argument(s.output, 7, "enable_gqa", False))


def _is_dense(mask: M.Mask) -> bool:
    return isinstance(mask, M.Dense) or any(_is_dense(p) for p in getattr(mask, "parts", ()))


def _number(size: Expr, s: Skeleton) -> int:
    n = E.as_int(size)
    if n is None:
        raise Refusal(Miss("size-not-decided", s.scores.node.name, f"the number of query heads per key head is {size}, expected a number"))
    return n


def _operands(s: Skeleton, r: Roles, chosen: dict[str, Candidate]) -> tuple[Operand, Operand, Operand, dict[str, Recipe]]:
    layouts = {
        "q": ("bhqd", (r.batch, r.heads, r.query, r.feature)),
        "k": ("bhkd", (r.batch, r.head, r.key, r.feature)),
        "v": ("bhke", (r.batch, r.head, r.key, r.value)),
    }
    operands, recipes = [], {}
    for name, (axes, roles) in layouts.items():
        at = chosen[name].at
        recipe = to_roles(at, roles)
        t = tensor_of(at.node)
        if recipe is None or t is None:
            raise Refusal(Miss("operand-layout", at.node.name, f"{name} cannot be brought to {axes} by views"))
        recipes[name] = recipe
        operands.append(Operand(name, axes, tuple(show_dim(size_of(x)) for x in roles), t.dtype))
    return operands[0], operands[1], operands[2], recipes


# ---------------------------------------------------------------- scores


def _steps(d: _Draft, env: Env) -> None:
    """Turn raw mods into steps and one mask, moving masks outwards where that changes nothing."""
    for mod in d.skeleton.mods:
        if isinstance(mod, Scale):
            _add_scale(d, mod)
        elif isinstance(mod, Softcap):
            if d.mask is not None:
                raise Refusal(Miss("mask-inside-softcap", d.skeleton.scores.node.name, "the mask is applied before the soft cap, so it hides nothing"))
            d.steps.append(mod)
        elif isinstance(mod, RawBias):
            if d.mask is not None and d.mask.how == "replace" and d.mask.value > HUGE:
                raise Refusal(Miss("bias-after-mask", mod.at.node.name, f"a bias is added after hidden scores became {d.mask.value:g}"))
            d.steps.append(Bias(_score_operand(d, mod.at), 1 if mod.sign > 0 else -1))
        elif isinstance(mod, RawGain):
            if d.mask is not None or mod.inverse:
                raise Refusal(Miss("gain", mod.at.node.name, "a tensor divides the scores, or multiplies masked ones"))
            d.steps.append(Gain(_score_operand(d, mod.at)))
        elif isinstance(mod, RawMask):
            _add_mask(d, mod, env)
        elif isinstance(mod, RawShift) and (d.skeleton.sink is not None or d.skeleton.anchor.norm.sink is not None):
            raise Refusal(Miss("shift-with-sink", d.skeleton.scores.node.name, "a constant is added to the scores but not to the sink"))


def _add_scale(d: _Draft, mod: Scale) -> None:
    if d.mask is not None:
        if mod.factor <= 0:
            raise Refusal(Miss("mask-times-negative", d.skeleton.scores.node.name, "masked scores are multiplied by a negative number"))
        d.mask = RawMask(d.mask.keep, d.mask.value * mod.factor, d.mask.how, d.mask.at if math.isinf(d.mask.value) else None)
    if d.steps and isinstance(d.steps[-1], Scale):
        mod = Scale(d.steps.pop().factor * mod.factor)  # type: ignore[union-attr]
    if mod.factor != 1.0:
        d.steps.append(mod)


def _add_mask(d: _Draft, mod: RawMask, env: Env) -> None:
    if not _emittable(mod.keep):
        if mod.at is None:
            raise Refusal(Miss("mask-not-readable", d.skeleton.scores.node.name, "a scaled additive mask has no closed form"))
        if mod.how == "add":
            d.steps.append(Bias(_score_operand(d, mod.at)))
            return
        cond = E.load(mod.at.node.name, mod.at.index, "bool")
        derived = env.derive(mod.at)
        keeps = derived is not None and derived == mod.keep
        mod = RawMask(cond if keeps else E.not_(cond), mod.value, mod.how, mod.at)
    first = d.mask
    if first is None:
        d.mask = mod
    elif first.how == "add" and first.at is not None and not math.isinf(first.value):
        d.steps.append(Bias(_score_operand(d, first.at)))
        d.mask = mod
    elif first.value == mod.value and (first.how == mod.how == "replace" or math.isinf(mod.value)):
        d.mask = RawMask(E.and_(first.keep, mod.keep), mod.value, mod.how, None)
    else:
        raise Refusal(Miss("two-masks", d.skeleton.scores.node.name, f"two masks with different fills ({first.value:g}, {mod.value:g}) cannot be joined exactly"))


def _emittable(keep: Expr) -> bool:
    """Say whether the condition is made of comparisons of integers, connectives and loads of views of tensors."""
    for e in E.walk(keep):
        if e.op in ("call", "where", "opaque", "floordiv", "mod", "const"):
            return False
        if e.op == "load" and any(digits(i) is None for i in e.args[1]):
            return False
    return True


def _score_operand(d: _Draft, at: At) -> str:
    """Capture a tensor that is added to or multiplied with the scores, at size 1 along roles it does not vary along."""
    roles = d.grid()
    recipe = to_roles(at, roles, expand=False)
    kept = tuple(bool(set(r) & set(E.indices(E.Expr("t", at.index)))) for r in roles)
    if recipe is None:
        recipe, kept = to_roles(at, roles), (True,) * 4
    t = tensor_of(at.node)
    if recipe is None or t is None:
        raise Refusal(Miss("side-operand-layout", at.node.name, f"a tensor beside the scores is read at {list(at.index)}"))
    return d.capture("bhqk", roles, recipe, t.dtype, kept)


def _mask(d: _Draft) -> tuple[M.Mask, Fill]:
    if d.mask is None:
        return M.Full(), Fill()
    r = d.roles
    b, h, q, k = d.grid()
    where = Positions(_position(q), _position(k), size_of(q), size_of(k), (b, h, q, k))
    lifted = lift(d.mask.keep, where, len(d.captured))
    for name, axes, value in lifted.operands:
        roles = {"bk": (r.batch, r.key), "bq": (r.batch, r.query), "bhqk": d.grid()}[axes]
        used = set(E.indices(value))
        kept = tuple(bool(set(x) & used) for x in roles) if axes == "bhqk" else (True, True)
        made = d.capture(axes, roles, Computed(value, roles), torch.bool, kept)
        assert made == name, f"operand {name} was captured as {made}"
    how = "add" if d.mask.how == "add" else "replace"
    return lifted.mask, Fill(d.mask.value, how) if not isinstance(lifted.mask, M.Full) else Fill()  # type: ignore[arg-type]


def _position(atoms: Atoms) -> Expr:
    out = E.ZERO
    for a in atoms:
        out = E.add(E.mul(out, a.args[1]), E.generator(a))
    return out


def _norm(d: _Draft, env: Env) -> Softmax:
    norm = d.skeleton.anchor.norm
    at = d.skeleton.sink
    if at is None:
        return norm
    value = env.derive(at)
    number = E.as_number(value) if value is not None else None
    if number is not None:
        return Softmax(float(number), norm.upcast, norm.safe)
    recipe = to_roles(at, (d.roles.heads,))
    t = tensor_of(at.node)
    if recipe is None or t is None:
        raise Refusal(Miss("sink-layout", at.node.name, f"the sink logit is read at {list(at.index)}, expected one per head"))
    return Softmax(d.capture("h", (d.roles.heads,), recipe, t.dtype, (True,)), norm.upcast, norm.safe)


# ---------------------------------------------------------------- region


def _region(s: Skeleton, chosen: dict[str, Candidate]) -> tuple[set[str], tuple[str, ...]]:
    """Return the nodes that die with the site, and interior nodes whose values are used outside."""
    inside = {n.name: n for n in s.interior}
    for c in chosen.values():
        for n in c.skipped:
            inside.setdefault(n.name, n)
    core = {n.name for n in s.interior}
    escapes = []
    for name in sorted(core):
        node = inside[name]
        if node is not s.output and any(u.name not in inside for u in users(node)):
            escapes.append(name)
    return set(inside), tuple(escapes)
