"""Every stable code has advice and a paragraph, and the table holds no code that nothing raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnc.codes import UNKNOWN, advice, codes, named
from attnc.errors import ReportError

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "compiler", "codegen")
RAISERS = ("Miss", "refuse")
"""Calls whose first argument is a code; a method ``refuse(code, ..)`` hands its own on to a Miss."""


def raised() -> Iterator[tuple[str, str, str | None]]:
    """Yield place, function around it, and code of each call in the sources; None where it is no constant."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield from _of(tree, str(path.relative_to(ROOT)), "")


def _of(node: ast.AST, path: str, inside: str) -> Iterator[tuple[str, str, str | None]]:
    if isinstance(node, ast.FunctionDef):
        inside = node.name
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in RAISERS:
            for code in _constants(node):
                yield f"{path}:{node.lineno}", inside, code
    for child in ast.iter_child_nodes(node):
        yield from _of(child, path, inside)


def _constants(call: ast.Call) -> list[str | None]:
    """Return the constants that the first argument can be."""
    first = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "code"), None)
    arms = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
    return [a.value if isinstance(a, ast.Constant) and isinstance(a.value, str) else None for a in arms]


def test_every_code_raised_has_a_row():
    open_ended = [place for place, inside, code in raised() if code is None and inside not in RAISERS]
    assert not open_ended, f"a code must be a constant where it is raised: {open_ended}"
    missing = {code: place for place, _, code in raised() if code is not None and code not in codes()}
    assert not missing, f"codes without a row in compiler/codes_*.py: {missing}"


def test_every_row_is_raised():
    used = {code for _, _, code in raised()}
    assert len(used) > 60
    assert sorted(codes().keys() - used) == []


@pytest.mark.parametrize("code", codes())
def test_row_is_one_sentence_and_a_paragraph(code):
    row = codes()[code]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    assert re.fullmatch(r"[A-Z][^\n]*\.", row.advice)
    assert re.fullmatch(r"\S[^\n]*\.", row.paragraph)
    assert "  " not in row.advice + row.paragraph
    assert named(code).text.endswith(row.advice)


def test_unknown_codes_are_told_apart_from_none():
    assert advice("") == ""
    assert advice("of-a-later-version") == UNKNOWN
    with pytest.raises(ReportError, match="did you mean two-masks"):
        named("two-mask")
    with pytest.raises(ReportError, match="attnc explain lists all"):
        named("qqqq")
