"""From a skeleton with roles to a Found: the spec, and recipes for every tensor it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

import torch
from torch import fx

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
from attnc.passes.detect.arithmetic import rounded
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask
from attnc.passes.detect.found import Computed, Found
from attnc.passes.detect.graph import (
    argument,
    module_path,
    reads_size_only,
    shape,
    source_line,
    tensor_of,
    users,
)
from attnc.passes.detect.layout import Recipe, digits, from_roles, size_of, to_roles
from attnc.passes.detect.masks.lift import Positions, lift
from attnc.passes.detect.roles import Atoms, Candidate, Roles, assign, choose
from attnc.passes.detect.sites import Skeleton
from attnc.passes.detect.views import At, stepped
from attnc.sizes import show_dim

HUGE = -1e30


class Refusal(Exception):
    """A condition of the description failed; carries the Miss. Raised and caught inside this package only."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.why)
        self.miss = miss


@dataclass
class _Draft:
    """The spec while it is being written."""

    skeleton: Skeleton
    roles: Roles
    env: Env
    steps: list[Step] = field(default_factory=list)
    mask: RawMask | None = None
    shift: float = 0.0
    captured: list[Operand] = field(default_factory=list)
    recipes: dict[str, Recipe | Computed] = field(default_factory=dict)

    def refuse(self, code: str, why: str) -> NoReturn:
        """Give up on the site."""
        raise Refusal(Miss(code, self.skeleton.scores.node.name, why))

    def refuse_shift(self, why: str) -> None:
        """Give up if a constant was added to all scores, which a softmax alone does not see."""
        if self.shift != 0.0:
            self.refuse("shift-matters", why)

    def grid(self) -> tuple[Atoms, Atoms, Atoms, Atoms]:
        """Return the atoms of the score axes b, h, q, k."""
        r = self.roles
        return r.batch, r.heads, r.query, r.key

    def capture(
        self,
        axes: str,
        roles: tuple[Atoms, ...],
        recipe: Recipe | Computed,
        dtype: torch.dtype,
        kept: tuple[bool, ...],
    ) -> str:
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


def _found(s: Skeleton, env: Env, chosen: dict[str, list[Candidate]], r: Roles, name: str) -> Found:
    draft = _Draft(s, r, env)
    picked = {n: _easiest(places, _LAYOUTS[n][1](r)) for n, places in chosen.items()}
    factor = picked["q"].factor * picked["k"].factor
    if factor != 1.0:
        s.mods.insert(0, Scale(factor))
    _steps(draft, env)
    mask, fill = _mask(draft)
    norm = _norm(draft, env)
    q, k, v, recipes = _operands(r, picked)
    result = from_roles(s.out, (r.batch, r.heads, r.query, r.value), shape(s.output), "")
    if result is None:
        raise Refusal(
            Miss(
                "result-layout",
                s.output.name,
                "the result's axes are no product of batch, heads, queries and features",
            )
        )
    spec = AttentionSpec(
        q,
        k,
        v,
        _number(size_of(r.group), s),
        tuple(draft.steps),
        mask,
        fill,
        norm,
        tuple(draft.captured),
        s.dropout,
    )
    made = (*recipes.values(), *draft.recipes.values())
    region, escapes = _region(s, picked, {n for r in made for n in r.reads})
    path, kind = module_path(s.anchor.weights)
    line = source_line(s.anchor.weights)
    match = Match(
        spec,
        Site(name, path, f"{kind} {line}".strip()),
        frozenset(region),
        s.output.name,
        tuple(reversed(s.trail)),
        escapes,
    )
    captured = {n: draft.recipes[n] for n in (o.name for o in draft.captured)}
    fused = s.trail == ["sdpa-call"]
    return Found(
        match, recipes, captured, result, s.anchor.weights.name, fused, improves=fused and _improves(s, spec)
    )


def _improves(s: Skeleton, spec: AttentionSpec) -> bool:
    """Say whether the spec knows more than the fused call.

    That is a closed mask in place of a tensor, or keys that are not repeated.
    """
    closed = (
        argument(s.output, 3, "attn_mask") is not None
        and not any(isinstance(x, Bias) for x in spec.scores)
        and not _is_dense(spec.mask)
    )
    return closed or (spec.group_size > 1 and not argument(s.output, 7, "enable_gqa", False))


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


# ---------------------------------------------------------------- scores


def _steps(d: _Draft, env: Env) -> None:
    """Turn raw mods into steps and one mask, moving masks outwards where that changes nothing."""
    for mod in d.skeleton.mods:
        if isinstance(mod, Scale):
            _add_scale(d, mod)
        elif isinstance(mod, Softcap):
            if d.mask is not None:
                d.refuse(
                    "mask-inside-softcap", "the mask is applied before the soft cap, so it hides nothing"
                )
            d.refuse_shift("a constant is added to the scores before the soft cap")
            d.steps.append(mod)
        elif isinstance(mod, RawBias):
            _add_bias(d, mod.at, mod.sign)
        elif isinstance(mod, RawGain):
            if d.mask is not None or mod.inverse:
                d.refuse("gain", "a tensor divides the scores, or multiplies masked ones")
            d.refuse_shift("a constant is added to the scores before they are multiplied by a tensor")
            d.steps.append(Gain(_score_operand(d, mod.at)))
        elif isinstance(mod, RawMask):
            _add_mask(d, mod, env)
        else:
            d.shift += mod.value
    if not math.isfinite(d.shift):
        d.refuse("shift-not-finite", f"{d.shift} is added to all scores")
    if d.skeleton.sink is not None or d.skeleton.anchor.norm.sink is not None:
        d.refuse_shift("a constant is added to the scores but not to the sink")


def _add_scale(d: _Draft, mod: Scale) -> None:
    if d.mask is not None:
        if mod.factor <= 0:
            d.refuse("mask-times-negative", "masked scores are multiplied by a negative number")
        t = tensor_of(d.skeleton.scores.node)
        assert t is not None, "scores are a tensor"
        at = d.mask.at if math.isinf(d.mask.value) else None
        d.mask = replace(d.mask, value=rounded(d.mask.value * mod.factor, t.dtype), at=at)
    d.shift *= mod.factor
    if d.steps and isinstance(d.steps[-1], Scale):
        mod = Scale(d.steps.pop().factor * mod.factor)  # type: ignore[union-attr]
    if mod.factor != 1.0:
        d.steps.append(mod)


def _add_bias(d: _Draft, at: At, sign: Literal[1, -1]) -> None:
    """Add a tensor; a mask before it moves behind it.

    Scores replaced by a huge negative number and then added to are that number plus the tensor, which is what
    adding both to the score gives: the score is lost in rounding either way.  The sum matters to a query that
    sees no key, where the tensor holds huge negative numbers too.  A tensor that was added before might hold
    such numbers as well, and they are not lost.
    """
    if d.mask is not None and d.mask.how == "replace" and math.isfinite(d.mask.value):
        if d.mask.value > HUGE or any(isinstance(step, Bias) for step in d.steps):
            d.refuse("bias-after-mask", f"a tensor is added after hidden scores became {d.mask.value:g}")
        d.mask = replace(d.mask, how="add", at=None)
    d.steps.append(Bias(_score_operand(d, at), sign))


def _add_mask(d: _Draft, mod: RawMask, env: Env) -> None:
    if mod.how == "replace" and math.isfinite(mod.value):
        mod = replace(mod, value=mod.value - d.shift)
    if not _emittable(mod.keep, d):
        if mod.at is None:
            d.refuse("mask-not-readable", "a scaled additive mask has no closed form")
        elif mod.how == "add":
            _add_bias(d, mod.at, mod.sense)
            return
        else:
            mod = replace(mod, keep=_condition(d, mod.at, mod.sense))
    first = d.mask
    same = first is not None and first.value == mod.value
    if first is None:
        d.mask = mod
    elif same and (first.how == mod.how == "replace" or math.isinf(mod.value)):
        d.mask = RawMask(E.and_(first.keep, mod.keep), mod.value, mod.how, None)
    elif first.how == "add" and first.at is not None:
        d.steps.append(Bias(_score_operand(d, first.at), first.sense))
        d.mask = mod
    elif mod.how == "add" and mod.at is not None:
        _add_bias(d, mod.at, mod.sense)
    else:
        both = f"({first.value:g}, {mod.value:g})"
        d.refuse("two-masks", f"two masks with different fills {both} cannot be joined exactly")


def _condition(d: _Draft, at: At, sense: int) -> Expr:
    """Return the condition of a mask that has no closed form, read from the tensor that holds it."""
    cond = E.load(at.node.name, at.index, "bool")
    if not _emittable(cond, d):
        d.refuse("side-operand-layout", f"a mask is read at {list(at.index)}")
    return cond if sense > 0 else E.not_(cond)


def _emittable(keep: Expr, d: _Draft) -> bool:
    """Say whether the condition is made of comparisons of integers, connectives and loads."""
    for e in E.walk(keep):
        if e.op in ("call", "where", "opaque", "floordiv", "mod", "const"):
            return False
        if e.op == "load" and not _readable(e, d):
            return False
        if e.op in ("le0", "eq0") and not any(g.op in ("index", "load") for g in E.walk(e)):
            return False
    return True


def _readable(load: Expr, d: _Draft) -> bool:
    """Say whether views of the loaded tensor give its elements, and a rewritten graph can read it."""
    node = d.env.node(load.args[0], d.skeleton.scores.node.graph)
    return d.env.usable(node) and to_roles(At(node, load.args[1]), d.grid()) is not None


def _score_operand(d: _Draft, at: At) -> str:
    """Capture a tensor that is added to or multiplied with the scores.

    It has size 1 along roles it does not vary along.
    """
    roles = d.grid()
    while not d.env.usable(at.node) and (step := stepped(at)) is not None:
        at = step[0]
    recipe = to_roles(at, roles, expand=False)
    kept = tuple(bool(set(r) & set(E.indices(E.Expr("t", at.index)))) for r in roles)
    if recipe is None:
        recipe, kept = to_roles(at, roles), (True,) * 4
    t = tensor_of(at.node)
    if recipe is None or t is None:
        raise Refusal(
            Miss(
                "side-operand-layout", at.node.name, f"a tensor beside the scores is read at {list(at.index)}"
            )
        )
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
        raise Refusal(
            Miss(
                "sink-layout",
                at.node.name,
                f"the sink logit is read at {list(at.index)}, expected one per head",
            )
        )
    return Softmax(d.capture("h", (d.roles.heads,), recipe, t.dtype, (True,)), norm.upcast, norm.safe)


# ---------------------------------------------------------------- region


def _region(s: Skeleton, chosen: dict[str, Candidate], read: set[str]) -> tuple[set[str], tuple[str, ...]]:
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
