"""Write what stands between the scores and the weights: steps, one mask, the normalizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch

from attnc import expr as E
from attnc import masks as M
from attnc.expr import Expr
from attnc.ir import (
    Bias,
    Fill,
    Gain,
    Miss,
    Normalizer,
    Pointwise,
    RoundedSoftmax,
    Scale,
    SignedSoftmax,
    Softcap,
    Softmax,
)
from attnc.passes.detect.arithmetic import rounded
from attnc.passes.detect.draft import Draft, Refusal
from attnc.passes.detect.env import Env, RawBias, RawGain, RawMask, RawPointwise
from attnc.passes.detect.found import Computed
from attnc.passes.detect.graph import tensor_of
from attnc.passes.detect.layout import Recipe, size_of, to_roles
from attnc.passes.detect.masks.lift import Positions, lift
from attnc.passes.detect.roles import Atoms, cuts, ordered, refine
from attnc.passes.detect.scores.additive import HIDES
from attnc.passes.detect.scores.bias_forms import form_of
from attnc.passes.detect.views import At, stepped
from attnc.pointwise import SCORE, Call, evaluate, rename, text

HUGE = -1e30
LARGEST = 2000
"""Distinct terms of a condition from which on the model's own tensor is read instead."""


def write_steps(d: Draft, env: Env) -> None:
    """Turn raw mods into steps and one mask, moving masks outwards where that changes nothing."""
    for mod in d.skeleton.mods:
        if isinstance(mod, Scale):
            _add_scale(d, mod)
        elif isinstance(mod, Softcap):
            _settle(d)
            d.steps.append(mod)
        elif isinstance(mod, RawBias):
            _add_bias(d, mod.at, mod.sign)
        elif isinstance(mod, RawGain):
            _settle(d)
            d.steps.append(Gain(_score_operand(d, mod.at)))
        elif isinstance(mod, RawPointwise):
            _add_pointwise(d, mod)
        elif isinstance(mod, RawMask):
            _add_mask(d, mod, env)
        else:
            d.shift += mod.value
    if not math.isfinite(d.shift):
        d.refuse("shift-not-finite", f"{d.shift} is added to all scores")
    norm = d.skeleton.anchor.norm
    if d.skeleton.sink is not None or norm.sink is not None or not isinstance(norm, Softmax):
        _settle_shift(d)
    if d.skeleton.zeroed is not None:
        _zero_hidden(d, d.skeleton.zeroed)


def _zero_hidden(d: Draft, zeroed: RawMask) -> None:
    """Read a mask after the softmax, equal to that before it: it acts on queries that see no key.

    Hidden weights of other queries are zero already. What the softmax gave the rest, NaN or a spread over all
    keys, becomes zeros (CPM-Ant).
    """
    mask = d.mask
    if mask is None or mask.keep != zeroed.keep or mask.value > HUGE:
        d.refuse(
            "weights-masked", "weights are set to zero after the softmax, and not where scores are hidden"
        )
    d.mask = replace(mask, value=-math.inf, how="replace", at=mask.at if mask.how == "replace" else None)
    d.zeroes = True


def _settle(d: Draft) -> None:
    """Write what is pending as steps: one follows that sees shifts and fills.

    Where no tensor of the graph holds the mask, its condition becomes an operand.
    """
    _settle_shift(d)
    mask, d.mask = d.mask, None
    if mask is None:
        return
    _check_rows(d, mask)
    if mask.how == "add" and mask.at is not None:
        d.steps.append(_bias(d, mask.at, mask.sense))
        return
    hidden: Call | float = mask.value if mask.how == "replace" else Call("add", (SCORE, mask.value))
    kept, sense = (
        (_predicate(d, mask.keep), 1) if mask.at is None else (_score_operand(d, mask.at), mask.sense)
    )
    arms = (SCORE, hidden) if sense > 0 else (hidden, SCORE)
    d.steps.append(Pointwise(text(Call("where", (kept, *arms)))))


def _check_rows(d: Draft, mask: RawMask) -> None:
    """Refuse a mask that is not the last step and may leave a row whose exponentials sum to nothing."""
    anchor = d.skeleton.anchor
    sunk = anchor.norm.operands or getattr(anchor.norm, "sink", None) is not None or d.skeleton.sink
    if math.isfinite(mask.value) and (anchor.rounds or (anchor.bare and not sunk)):
        why = (
            f"the normalizer takes no maximum off, and a row may hold {mask.value:g} alone before other steps"
        )
        d.refuse("empty-rows-differ", why)


def _predicate(d: Draft, keep: Expr) -> str:
    """Capture a condition as a bool tensor, of size 1 along roles that it does not vary along."""
    roles, used = d.grid(), set(E.indices(keep))
    kept = tuple(bool(set(r) & used) for r in roles)
    return d.capture("bhqk", roles, Computed(keep, roles), torch.bool, kept)


def _settle_shift(d: Draft) -> None:
    """Add the pending constant as a step of its own; a mask's fill no longer counts from it."""
    if d.shift == 0.0:
        return
    d.steps.append(Pointwise(text(Call("add", (SCORE, d.shift)))))
    if d.mask is not None and d.mask.how == "replace" and math.isfinite(d.mask.value):
        d.mask = replace(d.mask, value=d.mask.value + d.shift)
    d.shift = 0.0


def _add_pointwise(d: Draft, mod: RawPointwise) -> None:
    """Append an expression; a mask before it moves behind it where hidden scores stay hidden."""
    dtype = _dtype_of_scores(d)
    loose = _bounds_nothing(d, mod.term, dtype)
    if loose and (d.mask is None or _rounds_away(d.mask, dtype)):
        return
    if not loose:
        _settle_shift(d)
    if d.mask is not None and not mod.sides and (d.mask.how == "replace" or math.isinf(d.mask.value)):
        fill = torch.tensor(d.mask.value, dtype=torch.float64)
        value = rounded(float(evaluate(mod.term, {SCORE: fill})), dtype)
        if value <= HIDES:
            at = d.mask.at if d.mask.how == "replace" else None
            d.mask = replace(d.mask, value=value, how="replace", at=at)
            d.steps += [] if loose else [Pointwise(text(mod.term))]
            return
    _settle(d)
    by = {f"t{i}": _score_operand(d, at) for i, at in enumerate(mod.sides)}
    d.steps.append(Pointwise(text(rename(mod.term, by))))


def _bounds_nothing(d: Draft, term: Call | str | float, dtype: torch.dtype) -> bool:
    """Say whether the step bounds scores from below by the least number of their type.

    Every finite score passes; -inf does not.
    """
    match term:
        case Call("maximum", ("s", float(low))):
            return low <= torch.finfo(dtype).min and not _may_hide(d) and d.shift == 0.0
    return False


def _may_hide(d: Draft) -> bool:
    """Say whether the steps so far may give -inf or huge negative numbers: by a tensor, or by a fill."""
    return any(
        isinstance(step, Bias) or (isinstance(step, Pointwise) and _may_give_huge(step.term))
        for step in d.steps
    )


def _may_give_huge(term: Call | str | float) -> bool:
    match term:
        case Call(op, args):
            return any(map(_may_give_huge, args[1:] if op == "where" else args))
        case str():
            return term != SCORE
    return term <= HIDES


def _rounds_away(mask: RawMask, dtype: torch.dtype) -> bool:
    """Say whether a score plus the finite fill is the fill itself, so that a bound below changes nothing.

    In fp16 the sum with the least number is -inf or a third number.
    """
    return mask.how == "add" and math.isfinite(mask.value) and mask.value <= HUGE and dtype != torch.float16


def _dtype_of_scores(d: Draft) -> torch.dtype:
    t = tensor_of(d.skeleton.scores.node)
    assert t is not None, "scores are a tensor"
    return t.dtype


def _add_scale(d: Draft, mod: Scale) -> None:
    dtype = _dtype_of_scores(d)
    if d.mask is not None and (mod.factor <= 0 or (mod.factor < 1 and _may_overflow(d, d.mask, dtype))):
        _settle(d)
    if d.mask is not None:
        at = d.mask.at if math.isinf(d.mask.value) else None
        d.mask = replace(d.mask, value=rounded(d.mask.value * mod.factor, dtype), at=at)
    d.shift *= mod.factor
    if d.steps and isinstance(d.steps[-1], Scale):
        mod = Scale(d.steps.pop().factor * mod.factor)  # type: ignore[union-attr]
    if mod.factor != 1.0:
        d.steps.append(mod)


def _may_overflow(d: Draft, mask: RawMask, dtype: torch.dtype) -> bool:
    """Say whether a score plus the finite fill may be -inf, which a factor below 1 does not bring back."""
    finfo = torch.finfo(dtype)
    if mask.how != "add" or math.isinf(mask.value) or not _may_hide(d):
        return False
    return mask.value <= finfo.min * finfo.eps / 4


def _add_bias(d: Draft, at: At, sign: Literal[1, -1]) -> None:
    """Add a tensor; a mask before it moves behind it.

    Scores replaced by a huge negative number and then added to are that number plus the tensor, which is what
    adding both to the score gives: the score is lost in rounding either way.  The sum matters to a query that
    sees no key, where the tensor holds huge negative numbers too.  A step before might have given such
    numbers as well, and they are not lost.
    """
    if d.mask is not None and d.mask.how == "replace" and math.isfinite(d.mask.value):
        if d.mask.value > HUGE or _may_hide(d):
            _settle(d)
        else:
            d.mask = replace(d.mask, how="add", at=None)
    d.steps.append(_bias(d, at, sign))


def _bias(d: Draft, at: At, sign: Literal[1, -1]) -> Bias:
    return Bias(_score_operand(d, at), sign, form_of(at, d.grid(), d.env))


def _add_mask(d: Draft, mod: RawMask, env: Env) -> None:
    filled = mod.value
    if mod.how == "replace" and math.isfinite(mod.value):
        mod = replace(mod, value=mod.value - d.shift)
    if not _emittable(mod.keep, d):
        if mod.at is None:
            d.refuse("mask-not-readable", "a scaled additive mask has no closed form")
        elif mod.how == "add":
            _check_rows(d, mod)
            _add_bias(d, mod.at, mod.sense)
            return
        else:
            mod = replace(mod, keep=_condition(d, mod.at, mod.sense))
    elif mod.at is not None:
        d.conditions += env.fitted_under(mod.at.node)
    first = d.mask
    same = first is not None and first.value == mod.value
    if first is None:
        d.mask = mod
    elif same and (first.how == mod.how == "replace" or math.isinf(mod.value)):
        d.mask = RawMask(E.and_(first.keep, mod.keep), mod.value, mod.how, None)
    elif first.how == "add" and first.at is not None:
        _check_rows(d, first)
        d.steps.append(_bias(d, first.at, first.sense))
        d.mask = mod
    elif mod.how == "add" and mod.at is not None:
        _check_rows(d, mod)
        _add_bias(d, mod.at, mod.sense)
    else:
        _settle(d)
        d.mask = replace(mod, value=filled)


def _condition(d: Draft, at: At, sense: int) -> Expr:
    """Return the condition of a mask that has no closed form, read from the tensor that holds it."""
    cond = E.load(at.node.name, at.index, "bool")
    if not _emittable(cond, d):
        d.refuse("side-operand-layout", f"a mask is read at {list(at.index)}")
    return cond if sense > 0 else E.not_(cond)


def _emittable(keep: Expr, d: Draft) -> bool:
    """Say whether the condition is made of integers, comparisons, connectives and loads, and is not large."""
    for size, e in enumerate(E.walk(keep)):
        if size > LARGEST or e.op in ("call", "opaque", "const"):
            return False
        if e.op in ("floordiv", "mod") and (E.as_int(e.args[1]) or 0) <= 0:
            return False
        if e.op == "where" and not (E.is_int(e.args[1]) and E.is_int(e.args[2])):
            return False
        if e.op == "load" and not _readable(e, d):
            return False
        if e.op in ("le0", "eq0") and not any(g.op in ("index", "load") for g in E.walk(e)):
            return False
    return True


def _readable(load: Expr, d: Draft) -> bool:
    """Say whether views of the loaded tensor give its elements, and a rewritten graph can read it."""
    node = d.env.node(load.args[0], d.skeleton.scores.node.graph)
    return d.env.usable(node) and to_roles(At(node, load.args[1]), d.grid()) is not None


def _score_operand(d: Draft, at: At) -> str:
    """Capture a tensor that is added to or multiplied with the scores.

    It has size 1 along roles it does not vary along.
    """
    roles = d.grid()
    while not d.env.usable(at.node) and (step := stepped(at)) is not None:
        at = step[0]
    used = set(E.indices(E.Expr("t", at.index)))
    kept = tuple(bool(set(r) & used) for r in roles)
    recipe = to_roles(at, roles, expand=False) or _spread(at, roles, kept)
    t = tensor_of(at.node)
    if recipe is None or t is None:
        raise Refusal(
            Miss(
                "side-operand-layout", at.node.name, f"a tensor beside the scores is read at {list(at.index)}"
            )
        )
    return d.capture("bhqk", roles, recipe, t.dtype, kept)


def _spread(at: At, roles: tuple[Atoms, ...], kept: tuple[bool, ...]) -> Recipe | None:
    """Return how to make a tensor that has a part of an axis only, such as rows of a grid of keys.

    It is repeated along the rest of that axis, as decomposed relative positions are (MViTv2,
    arXiv:2112.01526, section 4.1).
    """
    by = cuts(at.index)
    parts = [tuple(a for x in r for a in ordered(E.substitute(E.generator(x), by))) for r in roles]
    return to_roles(refine(at, by), [r if k else () for r, k in zip(parts, kept, strict=True)])


def write_mask(d: Draft) -> tuple[M.Mask, Fill]:
    """Return the site's mask as a predicate, and what stands at the positions that it hides."""
    if d.mask is None:
        return M.Full(), Fill()
    r = d.roles
    b, h, q, k = d.grid()
    where = Positions(_position(q), _position(k), size_of(q), size_of(k), (b, h, q, k))
    lifted = lift(d.mask.keep, where, len(d.captured))
    d.conditions += lifted.conditions
    for name, axes, value in lifted.operands:
        roles = {"bk": (r.batch, r.key), "bq": (r.batch, r.query), "b": (r.batch,), "bhqk": d.grid()}[axes]
        used = set(E.indices(value))
        kept = tuple(bool(set(x) & used) for x in roles) if axes == "bhqk" else (True,) * len(roles)
        dtype = torch.int64 if E.is_int(value) else torch.bool
        made = d.capture(axes, roles, Computed(value, roles), dtype, kept)
        assert made == name, f"operand {name} was captured as {made}"
    how = "add" if d.mask.how == "add" else "replace"
    return lifted.mask, Fill(d.mask.value, how) if not isinstance(lifted.mask, M.Full) else Fill()  # type: ignore[arg-type]


def _position(atoms: Atoms) -> Expr:
    out = E.ZERO
    for a in atoms:
        out = E.add(E.mul(out, a.args[1]), E.generator(a))
    return out


def write_norm(d: Draft, env: Env) -> Normalizer:
    """Return the site's normalizer, with the sink logits as a captured tensor or a number."""
    norm = d.skeleton.anchor.norm
    at = d.skeleton.sink
    if not isinstance(norm, Softmax):
        if isinstance(norm, SignedSoftmax):
            _drop_magnitude(d)
        return norm
    if d.zeroes:
        norm = replace(norm, safe=True)
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


def _drop_magnitude(d: Draft) -> None:
    """Take off the last step ``abs(s)``, which a signed softmax does itself; a positive factor may follow."""
    last = d.steps.pop() if d.steps else None
    scale = last if isinstance(last, Scale) and last.factor > 0 else None
    if scale is not None:
        last = d.steps.pop() if d.steps else None
    if last != Pointwise("abs(s)") or (d.mask is not None and d.mask.value != -math.inf):
        d.refuse(
            "signed-softmax", "expected |scores|, hidden by -inf, between the scores and a signed softmax"
        )
    if scale is not None:
        d.steps.append(scale)


def as_rounded(d: Draft, mask: M.Mask, fill: Fill, norm: Normalizer, dtype: torch.dtype) -> Normalizer:
    """Return the normalizer of ``exp(s - logsumexp(s))``: a softmax, but where rows of huge scores may be.

    A finite fill makes them, or a tensor of the user's.  What the log-sum-exp is rounded to is then part
    of the meaning: the scores must have the ``dtype`` that the spec computes in.
    """
    finite = math.isfinite(fill.value) and not isinstance(mask, M.Full)
    lengths = [E.as_int(size_of(r)) for r in (d.roles.query, d.roles.key)]
    emptied = finite and M.may_hide_a_whole_row(mask, *lengths)
    if not emptied and all(_is_fixed(d, x.operand) for x in d.steps if isinstance(x, Bias)):
        return norm
    t = tensor_of(d.skeleton.anchor.scores)
    assert t is not None, "scores are a tensor"
    if norm != Softmax() or t.dtype != dtype or d.shift:
        d.refuse("rounded-logsumexp", "exp(s - logsumexp(s)) of a row of huge scores is 1 for every key")
    return RoundedSoftmax()


def _is_fixed(d: Draft, operand: str) -> bool:
    graph = d.skeleton.scores.node.graph
    return all(d.env.pure(d.env.node(n, graph)) for n in d.recipes[operand].reads)
