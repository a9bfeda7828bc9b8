"""What varies between expressions of one shape: the constants in them, slot by slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnc import expr as E
from attnc.expr import Expr

Renaming = Callable[[str], str]


def slots(e: Any, rename: Renaming = str) -> tuple[str, tuple[float, ...]]:
    """Return the shape of an expression as text, and its constants in the order of that text.

    ``rename`` says under which name each tensor that is read goes into the text.
    """
    text: list[str] = []
    numbers: list[float] = []
    _read(e, text, numbers, rename)
    return " ".join(text), tuple(numbers)


def _read(e: Any, text: list[str], numbers: list[float], rename: Renaming) -> None:
    if isinstance(e, tuple):
        text.append(f"({len(e)}")
        for x in e:
            _read(x, text, numbers, rename)
    elif not isinstance(e, Expr):
        text.append(repr(e))
    elif e.op == "poly":
        # A constant of 0 is no term; it has its slot all the same.
        constant = sum(c for m, c in E.terms(e) if not m)
        text.append("poly")
        numbers.append(float(constant))
        for m, c in E.terms(e):
            if m:
                text.append(f"{c}*")
                for g in m:
                    _read(g, text, numbers, rename)
        text.append(";")
    elif e.op == "const":
        text.append("const")
        numbers.append(float(e.args[0]))
    elif e.op in ("index", "size"):
        text.append(f"{e.op}:{e.args[0]}")
    elif e.op == "load":
        text.append(f"load {rename(e.args[0])}")
        _read(e.args[1:], text, numbers, rename)
    else:
        text.append(e.op)
        _read(e.args, text, numbers, rename)


def varying(rows: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the slots in which rows differ."""
    return [i for i in range(len(rows[0])) if len({r[i] for r in rows}) > 1]
