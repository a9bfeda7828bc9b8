"""Recipes: how a canonical tensor is made from a node of the user's graph by views.

A node's element at index ``(x0, x1, ..)``, where each ``x`` is a mixed-radix number of atoms (``h * 64 +
d``), can be unflattened into its atoms, permuted and merged into roles. The same read backwards turns the
canonical output into the user's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc import expr as E
from attnc.expr import ONE, ZERO, Expr
from attnc.passes.detect.graph import shape
from attnc.passes.detect.views import At


@dataclass(frozen=True, slots=True)
class Recipe:
    """Views to apply to node ``source``: each a (name, argument) pair.

    ``select``: (axis, position); ``slice``: (axis, start, end); ``reshape``, ``expand``: sizes; ``permute``:
    axes.
    """

    source: str
    steps: tuple[tuple[str, tuple[object, ...]], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The node it is made from."""
        return (self.source,)


def digits(x: Expr) -> tuple[list[Expr], Expr] | None:
    """Write a mixed-radix number of atoms as (atoms from the most significant, offset).

    None for any other polynomial.

    Atoms are index generators; each weight must be the product of the sizes of the atoms below it.
    """
    pairs: list[tuple[Expr, Expr]] = []
    by_atom: dict[Expr, list[tuple[tuple[Expr, ...], int]]] = {}
    offset: dict[tuple[Expr, ...], int] = {}
    for mono, c in E.terms(x):
        atoms = [g for g in mono if g.op == "index"]
        rest = tuple(g for g in mono if g.op != "index")
        if len(atoms) > 1 or any(g.op not in ("size", "opaque") for g in rest):
            return None
        if atoms:
            by_atom.setdefault(atoms[0], []).append((rest, c))
        else:
            offset[rest] = c
    for atom, coefs in by_atom.items():
        weight = E.add(*(E.mul(E.integer(c), E.product(E.generator(g) for g in rest)) for rest, c in coefs))
        pairs.append((atom, weight))
    ordered: list[Expr] = []
    below = ONE
    while pairs:
        found = next((p for p in pairs if p[1] == below), None)
        if found is None:
            return None
        pairs.remove(found)
        ordered.insert(0, found[0])
        below = E.mul(below, found[0].args[1])
    base = E.add(
        ZERO, *(E.mul(E.integer(c), E.product(E.generator(g) for g in rest)) for rest, c in offset.items())
    )
    return ordered, base


def atoms_of(at: At) -> list[Expr] | None:
    """Return all atoms of an element's index.

    None if some axis is no mixed-radix number or an atom occurs twice.
    """
    out: list[Expr] = []
    for x in at.index:
        d = digits(x)
        if d is None:
            return None
        out += d[0]
    return out if len(set(out)) == len(out) else None


def size_of(atoms: Sequence[Expr]) -> Expr:
    """Return the number of positions of a group of atoms."""
    return E.product(a.args[1] for a in atoms)


def to_roles(at: At, roles: Sequence[Sequence[Expr]], expand: bool = True) -> Recipe | None:
    """Return how to make the tensor with one axis per role from a node.

    A role is a group of atoms, the most significant first.

    Atoms that the node does not have are broadcast: expanded to their size, or left at size 1 if ``expand``
    is False (only whole roles can be missing then). None if the node cannot be brought there by views.
    """
    steps: list[tuple[str, tuple[object, ...]]] = []
    have: list[Expr] = []
    unflat: list[Expr] = []
    axis, split = 0, False
    for x, n in zip(at.index, shape(at.node), strict=True):
        d = digits(x)
        if d is None:
            return None
        atoms, base = d
        total = size_of(atoms)
        end = E.add(base, total)
        if not E.nonneg(base) or E.nonneg(E.sub(end, E.add(n, ONE))):
            return None  # outside of the tensor, as far as sizes tell
        if not atoms:
            steps.append(("select", (axis, base)))
            continue
        if base != ZERO or total != n:
            steps.append(("slice", (axis, base, end)))
        have += atoms
        unflat += [a.args[1] for a in atoms]
        split = split or len(atoms) > 1
        axis += 1
    if len(set(have)) != len(have):
        return None
    if split:
        steps.append(("reshape", tuple(unflat)))
    wanted = [a for role in roles for a in role]
    if any(a not in wanted for a in have):
        return None
    order = [have.index(a) for a in wanted if a in have]
    if order != sorted(order):
        steps.append(("permute", tuple(order)))
    return _merge(at, steps, have, roles, expand)


def _merge(
    at: At,
    steps: list[tuple[str, tuple[object, ...]]],
    have: list[Expr],
    roles: Sequence[Sequence[Expr]],
    expand: bool,
) -> Recipe | None:
    present = [a for role in roles for a in role if a in have]
    missing = [a for role in roles for a in role if a not in have]
    spread: list[Expr] = []
    final: list[Expr] = []
    target: list[Expr] = []
    for role in roles:
        inside = [a for a in role if a in have]
        if not inside and (not expand or not role):
            spread.append(ONE)
            final.append(ONE)
            target.append(ONE)
            continue
        if len(inside) < len(role) and not expand:
            return None
        for a in role:
            spread.append(a.args[1] if a in have else ONE)
            final.append(a.args[1])
        target.append(size_of(role))
    now = [a.args[1] for a in present]
    if spread != now:
        steps.append(("reshape", tuple(spread)))
    if missing and expand and final != spread:
        steps.append(("expand", tuple(final)))
    if target != final:
        steps.append(("reshape", tuple(target)))
    return Recipe(at.node.name, tuple(steps))


def from_roles(
    index: Sequence[Expr], roles: Sequence[Sequence[Expr]], sizes: Sequence[Expr], source: str
) -> Recipe | None:
    """Return how to turn the canonical output into the layout whose element index is ``index``.

    The canonical output has one axis per role.
    """
    places = [digits(x) for x in index]
    if any(p is None or p[1] != ZERO for p in places):
        return None
    target = [a for p in places if p is not None for a in p[0]]
    atoms = [a for role in roles for a in role]
    if sorted(a.key for a in target) != sorted(a.key for a in atoms):
        return None
    steps: list[tuple[str, tuple[object, ...]]] = []
    now = [size_of(role) for role in roles]
    flat = [a.args[1] for a in atoms]
    if flat != now:
        steps.append(("reshape", tuple(flat)))
    order = [atoms.index(a) for a in target]
    if order != sorted(order):
        steps.append(("permute", tuple(order)))
    if [a.args[1] for a in target] != list(sizes):
        steps.append(("reshape", tuple(sizes)))
    return Recipe(source, tuple(steps))
