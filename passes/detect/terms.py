"""Describe a site that is a sum of attentions over the same values; see ``combined``."""

from __future__ import annotations

from dataclasses import replace

from attnc.ir import Miss
from attnc.passes.detect.combined import Combination
from attnc.passes.detect.describe import Written, finish, write
from attnc.passes.detect.env import Env
from attnc.passes.detect.found import Flat, Found, Term
from attnc.passes.detect.layout import Recipe, to_roles
from attnc.passes.detect.views import At, stepped


def describe_combination(c: Combination, env: Env, name: str) -> Found | Miss:
    """Return the site that all terms are together; ``name`` becomes its id."""
    written: list[Written] = []
    terms: list[Term] = []
    for s, number in zip(c.parts, c.factors, strict=True):
        w = write(s, env)
        if isinstance(w, Miss):
            return w
        gates = [_gate(at, w, env) for at in s.gates]
        if any(isinstance(g, Miss) for g in gates):
            return next(g for g in gates if isinstance(g, Miss))
        kept = tuple(g for g in gates if isinstance(g, Recipe))
        terms.append(Term(w.spec, w.operands, w.captured, number, kept))
        written.append(w)
    first = written[0]
    if any(w.result != first.result or w.spec.v != first.spec.v for w in written):
        why = "the weights that are added before the values are laid out differently"
        return Miss("terms-differ", c.anchor.weights.name, why)
    flats: list[Flat] = []
    for f in c.flats:
        gates = [_gate(at, first, env) for at in f.places]
        if any(isinstance(g, Miss) for g in gates):
            return next(g for g in gates if isinstance(g, Miss))
        flats.append(Flat(first.operands["v"], f.number, tuple(g for g in gates if isinstance(g, Recipe))))
    factors = [*(t.gates for t in terms), *(f.gates for f in flats)]
    reads = {n for kept in factors for g in kept for n in g.reads}
    found = finish(written, c.parts[0], name, reads=reads)
    return replace(found, terms=tuple(terms), flats=tuple(flats))


def _gate(at: At, w: Written, env: Env) -> Recipe | Miss:
    """Return how the tensor that multiplies one attention is made, as ``[B, H, Sq, 1]`` or smaller."""
    while not env.usable(at.node) and (step := stepped(at)) is not None:
        at = step[0]
    roles = (w.roles.batch, w.roles.heads, w.roles.query, ())
    recipe = to_roles(at, roles, expand=False) or to_roles(at, roles)
    if recipe is None:
        why = f"a tensor that multiplies weights is read at {list(at.index)}"
        return Miss("side-operand-layout", at.node.name, why)
    return recipe
