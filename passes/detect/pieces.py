"""Describe a site whose keys and values come in pieces under one softmax: block-sparse attention as written.

``softmax(cat(q @ k_i.T + bias_i))`` whose parts meet ``v_i`` and are summed is attention over ``cat(k_i)``
and ``cat(v_i)`` (BigBird, arXiv:2007.14062, appendix D; PEGASUS-X, arXiv:2208.04347, section 3).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnc import expr as E
from attnc.ir import AttentionSpec, Bias, Miss, Operand
from attnc.masks import Full
from attnc.passes.detect.describe import Written, finish, write
from attnc.passes.detect.env import Env
from attnc.passes.detect.found import Found, Joined, Making
from attnc.passes.detect.layout import size_of
from attnc.passes.detect.roles import varying
from attnc.passes.detect.sites import Pieces
from attnc.sizes import show_dim


def describe_pieces(p: Pieces, env: Env, name: str) -> Found | Miss:
    """Return the site that all pieces are together; ``name`` becomes its id."""
    parts: list[Written] = []
    beside = frozenset().union(*map(varying, p.parts))
    for s in p.parts:
        written = write(s, env, beside)
        if isinstance(written, Miss):
            return written
        parts.append(written)
    differs = _differs(parts)
    if differs:
        return Miss("pieces-differ", p.anchor.weights.name, f"the keys come in pieces, and {differs}")
    return finish(parts, p.parts[0], name, _joined(parts), p.added)


def _differs(parts: list[Written]) -> str:
    """Say what keeps the pieces from being one attention, '' if nothing does."""
    first = parts[0]
    for w in parts:
        biases = [x for x in w.spec.scores if isinstance(x, Bias)]
        if w.operands["q"] != first.operands["q"] or w.spec.q != first.spec.q:
            return "the queries of one are not those of another"
        if w.result != first.result or w.spec.group_size != first.spec.group_size:
            return "their results are laid out differently"
        if not isinstance(w.spec.mask, Full):
            return f"one has a mask of its own ({w.spec.mask.describe()})"
        if w.spec.norm.operands or w.spec.norm != first.spec.norm or w.spec.dropout:
            return "their weights have a sink or dropout"
        if (
            len(biases) > 1
            or any(b.sign < 0 for b in biases)
            or w.spec.scores[-1:] != tuple(biases[-1:] or w.spec.scores[-1:])
        ):
            return "their scores are edited after a bias"
        if _plain(w.spec) != _plain(first.spec):
            return "their scores are scaled differently"
        if any(o.dtype != c.dtype for o in w.spec.captured for c in _captured(parts)):
            return "their biases differ in dtype"
    return ""


def _plain(spec: AttentionSpec) -> tuple[object, ...]:
    return tuple(x for x in spec.scores if not isinstance(x, Bias))


def _captured(parts: list[Written]) -> list[Operand]:
    return [o for w in parts for o in w.spec.captured]


def _joined(parts: list[Written]) -> Written:
    first = parts[0]
    keys = show_dim(E.add(*(size_of(w.roles.key) for w in parts)))
    k, v = (Joined(tuple(_recipe(w.operands[n]) for w in parts), 2) for n in ("k", "v"))
    operands: dict[str, Making] = {"q": first.operands["q"], "k": k, "v": v}
    spec = replace(first.spec, k=_longer(first.spec.k, 2, keys), v=_longer(first.spec.v, 2, keys))
    biases = _captured(parts)
    if not biases:
        return replace(first, spec=spec, operands=operands)
    tables = tuple(_recipe(next(iter(w.captured.values()), None)) for w in parts)
    shape = tuple(
        next((n for n in axis if n != 1), 1) for axis in zip(*(o.shape for o in biases), strict=True)
    )
    bias = Operand("c0", "bhqk", (*shape[:3], keys), biases[0].dtype)
    forms = {x.form for w in parts for x in w.spec.scores if isinstance(x, Bias)}
    form = forms.pop() if len(forms) == 1 and len(biases) == len(parts) else ""
    spec = replace(spec, scores=(*_plain(first.spec), Bias("c0", form=form)), captured=(bias,))  # type: ignore[arg-type]
    return replace(first, spec=spec, operands=operands, captured={"c0": Joined(tables, 3, k)})


def _recipe(r: Making | None) -> Any:
    assert not isinstance(r, Joined), "a piece has no pieces"
    return r


def _longer(o: Operand, axis: int, n: int | str) -> Operand:
    return replace(o, shape=tuple(n if i == axis else m for i, m in enumerate(o.shape)))
