"""The one node type of symbolic values: an immutable term with a digest that is the same in every process.

Equality, order and hashing go by the digest, so terms sort, compare and serve as keys in constant time, and a
shared sub-term costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any


class Expr:
    """An immutable term ``op(args)``.  Compare with ``==``; ``key`` is its digest."""

    __slots__ = ("args", "key", "op")

    def __init__(self, op: str, *args: Any) -> None:
        self.op, self.args = op, args
        text = "\0".join(_keys(args))
        self.key = hashlib.blake2b(f"{op}\1{text}".encode(), digest_size=12).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return show(self)


def _keys(args: Iterable[Any]) -> Iterator[str]:
    for a in args:
        if isinstance(a, Expr):
            yield a.key
        elif isinstance(a, tuple):
            yield "(" + "\0".join(_keys(a)) + ")"
        else:
            yield f"{type(a).__name__}:{a!r}"


def walk(e: Any, seen: set[str] | None = None) -> Iterator[Expr]:
    """Visit every distinct sub-expression once, generators and index tuples included."""
    seen = set() if seen is None else seen
    if isinstance(e, tuple):
        for x in e:
            yield from walk(x, seen)
    elif isinstance(e, Expr) and e.key not in seen:
        seen.add(e.key)
        yield e
        yield from walk(e.args if e.op != "index" else (), seen)


def indices(e: Expr) -> tuple[Expr, ...]:
    """Return the index generators that ``e`` depends on, in order of their keys."""
    return tuple(sorted((x for x in walk(e) if x.op == "index"), key=lambda g: g.key))


def loads(e: Expr) -> tuple[Expr, ...]:
    """Return the loads inside ``e``."""
    return tuple(x for x in walk(e) if x.op == "load")


def _scaled(body: str, c: int) -> str:
    if not body:
        return str(c)
    return body if c == 1 else f"-{body}" if c == -1 else f"{c}*{body}"


def show(e: Any) -> str:
    """Return a readable text; index variables and sizes by name."""
    if not isinstance(e, Expr):
        return str(e)
    a = e.args
    if e.op == "poly":
        products = sorted((not m, "*".join(sorted(show(g) for g in m)), c) for m, c in a[0])
        parts = [_scaled(body, c) for _, body, c in products]
        return (" + ".join(parts) or "0").replace("+ -", "- ")
    if e.op in ("index", "size", "opaque", "const"):
        return str(a[0])
    if e.op in ("true", "false"):
        return e.op
    if e.op in ("le0", "eq0"):
        return f"{show(a[0])} {'<=' if e.op == 'le0' else '=='} 0"
    if e.op in ("and", "or"):
        return "(" + (" & " if e.op == "and" else " | ").join(show(x) for x in a[0]) + ")"
    if e.op == "not":
        return f"~({show(a[0])})"
    if e.op == "load":
        return f"{a[0]}[{', '.join(show(x) for x in a[1])}]"
    if e.op == "call":
        return f"{a[0]}({', '.join(show(x) for x in a[1])})"
    if e.op in ("floordiv", "mod"):
        return f"({show(a[0])}) {'//' if e.op == 'floordiv' else '%'} ({show(a[1])})"
    return f"{e.op}({', '.join(show(x) for x in a)})"
