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


def trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def raisers() -> dict[str, int]:
    """Return where the code stands in calls of Miss, and of functions that hand their ``code`` on to one."""
    takers = [
        (f, names)
        for _, tree in trees()
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and "code" in (names := [a.arg for a in f.args.args])
    ]
    out = {"Miss": 0}
    while True:
        more = {
            f.name: names.index("code") - (names[0] == "self")
            for f, names in takers
            if any(_called(c) in out and any(map(_hands_on, c.args)) for c in _calls(f))
        }
        if more.keys() <= out.keys():
            return out
        out |= more


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    yield from (n for n in ast.walk(node) if isinstance(n, ast.Call))


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def raised() -> Iterator[tuple[str, str | None]]:
    """Yield place and code of each call in the sources; None where it is neither constant nor handed on."""
    known = raisers()
    for path, tree in trees():
        for call in _calls(tree):
            at = known.get(_called(call))
            if at is None or (at < len(call.args) and _hands_on(call.args[at])):
                continue
            given = call.args[at] if at < len(call.args) else _keyword(call)
            for code in _constants(given):
                yield f"{path}:{call.lineno}", code


def _hands_on(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "code"


def _keyword(call: ast.Call) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == "code"), None)


def _constants(node: ast.expr | None) -> list[str | None]:
    """Return the constants that an argument can be."""
    arms = [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]
    return [a.value if isinstance(a, ast.Constant) and isinstance(a.value, str) else None for a in arms]


def test_every_code_raised_has_a_row():
    assert {"Miss", "refuse"} <= raisers().keys()
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
    with pytest.raises(ReportError, match="did you mean two-masks"):
        named("two-mask")
    with pytest.raises(ReportError, match="attnc explain lists all"):
        named("qqqq")
