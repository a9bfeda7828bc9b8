"""Run the examples in docstrings, module by module.

pytest's own ``--doctest-modules`` imports the folders by their bare names, which they refuse; here each
module is imported by its real name. The names come from the files: ``pkgutil`` cannot see through an
editable install.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"compiler": "attnc", "passes": "attnc.passes", "codegen": "attnc.codegen"}


def module_names() -> list[str]:
    names = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return [name for name in names if not name.endswith(".__main__")]


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, (
        f"{result.failed} of {result.attempted} examples in {name}; see the captured output"
    )
