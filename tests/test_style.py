"""Habits of the source that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("compiler", "passes", "codegen") for path in sorted((ROOT / folder).rglob("*.py"))
]
TEMPLATES = sorted((ROOT / "codegen").rglob("*.j2"))

MAY_PRINT = {"compiler/cli.py", "compiler/cli_view.py", "compiler/__main__.py"}
LONGEST_FILE = 500
# Gone or going in triton; loads are written as offsets plus tl.arange with masks.
OLD_TRITON = re.compile(r"\b(tl\.advance|(tl\.)?make_block_ptr)\b")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def find_prints(source: str) -> Iterator[int]:
    """Yield the line of each call of the builtin ``print``; a text that holds one is no call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno


def find_swallowed(source: str) -> Iterator[int]:
    """Yield the line of each handler that catches everything, and neither raises nor looks at the error."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        )
        inside = [n for statement in node.body for n in ast.walk(statement)]
        raises = any(isinstance(n, ast.Raise) for n in inside)
        looks = node.name and any(isinstance(n, ast.Name) and n.id == node.name for n in inside)
        if broad and not raises and not looks:
            yield node.lineno


def find_unsafe(source: str) -> Iterator[str]:
    """Yield what could run code out of a checkpoint: pickle, a full torch.load, remote code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(n.name in ("pickle", "dill", "joblib") for n in node.names):
            yield f"line {node.lineno}: nothing is unpickled"
        if not isinstance(node, ast.Call):
            continue
        words = {k.arg: k.value for k in node.keywords}
        weights_only, remote = words.get("weights_only"), words.get("trust_remote_code")
        safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
        if ast.unparse(node.func) == "torch.load" and not safe:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if remote and not (isinstance(remote, ast.Constant) and remote.value is False):
            yield f"line {node.lineno}: code that came inside a checkpoint is never run"


def test_finders_find():
    source = "def f():\n    print(1)\n    text = 'print(2)'\n    table.print(3)\n"
    assert list(find_prints(source)) == [2]
    silent = "try:\n    f()\nexcept Exception:\n    pass\n"
    assert list(find_swallowed(silent)) == [3]
    assert not list(find_swallowed(silent.replace("pass", "raise ValueError")))
    assert not list(find_swallowed(silent.replace("Exception:\n    pass", "Exception as e:\n    log(e)")))
    assert not list(find_swallowed(silent.replace("Exception", "KeyError")))
    assert len(list(find_faults("def f():\n    print(1)\n" + "#\n" * LONGEST_FILE, may_print=False))) == 4
    unsafe = "import pickle\ntorch.load(f)\ntorch.load(f, weights_only=True)\nm(d, trust_remote_code=True)\n"
    assert [fault[:6] for fault in find_unsafe(unsafe)] == ["line 1", "line 2", "line 4"]
    assert OLD_TRITON.search("p = tl.make_block_ptr(x)")
    assert not OLD_TRITON.search("my_tl.advanced")


def find_faults(source: str, may_print: bool) -> Iterator[str]:
    """Yield what ``source`` does that no file of ours should."""
    tree, length = ast.parse(source), len(source.splitlines())
    if not may_print:
        yield from (f"line {n}: only the command line prints, the rest logs" for n in find_prints(source))
    yield from (f"line {n}: catches every error and looks at none" for n in find_swallowed(source))
    yield from find_unsafe(source)
    if length > LONGEST_FILE:
        yield f"{length} lines; split at {LONGEST_FILE}"
    if ast.get_docstring(tree) is None:
        yield "no docstring says what the module is"
    defines = any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in tree.body)
    if defines and "from __future__ import annotations" not in source:
        yield "expected `from __future__ import annotations`"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_keeps_the_habits(path):
    faults = list(find_faults(path.read_text(encoding="utf-8"), relative(path) in MAY_PRINT))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", SOURCES + TEMPLATES, ids=relative)
def test_no_triton_calls_that_are_gone(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    bad = [f"line {n}: {line.strip()}" for n, line in enumerate(lines, 1) if OLD_TRITON.search(line)]
    assert not bad, "\n".join(bad)
