"""Every stable code has advice and a paragraph, and the table holds no code that nothing raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from attnc.codes.known import UNKNOWN, advice, codes, named
from attnc.errors import ReportError

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "compiler", "codegen")


@cache
def trees() -> dict[str, ast.Module]:
    paths = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


@cache
def raisers() -> dict[str, dict[str, int]]:
    """Return, per file, where the code stands in calls of Miss and of functions that hand a ``code`` on.

    A private function counts in its own file only.
    """
    sources = trees()
    out: dict[str, dict[str, int]] = {path: {"Miss": 0} for path in sources}
    while True:
        more = [
            (p, f.name, names.index("code") - (names[0] == "self"))
            for path, tree in sources.items()
            for f in ast.walk(tree)
            if isinstance(f, ast.FunctionDef) and "code" in (names := [a.arg for a in f.args.args])
            if any(_called(c) in out[path] and any(map(_hands_on, c.args)) for c in _calls(f))
            for p in ([path] if f.name.startswith("_") else sources)
            if f.name not in out[p]
        ]
        if not more:
            return out
        for path, name, at in more:
            out[path][name] = at


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    yield from (n for n in ast.walk(node) if isinstance(n, ast.Call))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def raised() -> Iterator[tuple[str, str | None]]:
    """Yield place and code of each call in the sources; None where it is neither constant nor handed on."""
    known = raisers()
    for path, tree in trees().items():
        named = _constants_of(tree)
        for call in _calls(tree):
            at = known[path].get(_called(call))
            if at is None or (at < len(call.args) and _hands_on(call.args[at])):
                continue
            given = call.args[at] if at < len(call.args) else _keyword(call)
            for code in _constants(given, named):
                yield f"{path}:{call.lineno}", code


def _constants_of(tree: ast.Module) -> dict[str, str]:
    """Return the names that a file gives to texts, at its top."""
    return {
        n.targets[0].id: n.value.value
        for n in tree.body
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        if isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    }


def _hands_on(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "code"


def _keyword(call: ast.Call) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == "code"), None)


def _constants(node: ast.expr | None, named: dict[str, str]) -> list[str | None]:
    """Return the texts that an argument can be."""
    out: list[str | None] = []
    for arm in [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]:
        if isinstance(arm, ast.Name):
            out.append(named.get(arm.id))
        else:
            out.append(arm.value if isinstance(arm, ast.Constant) and isinstance(arm.value, str) else None)
    return out


def test_every_code_raised_has_a_row():
    assert all({"Miss", "refuse"} <= known.keys() for known in raisers().values())
    open_ended = [place for place, code in raised() if code is None]
    assert not open_ended, f"a code must be a constant where it is raised: {open_ended}"
    missing = {code: place for place, code in raised() if code is not None and code not in codes()}
    assert not missing, f"codes without a row in compiler/codes_*.py: {missing}"


def test_every_row_is_raised():
    used = {code for _, code in raised()}
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
    with pytest.raises(ReportError, match="did you mean mask-not-readable"):
        named("mask-not-readabl")
    with pytest.raises(ReportError, match="attnc explain lists all"):
        named("qqqq")
