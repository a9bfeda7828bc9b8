"""The direction of imports, read from the import statements themselves.

The rules: passes and codegen never import each other; both see only the shared core of attnc; attnc.ir and
what it stands on import torch only; pipeline, api and cli alone bring passes and codegen together; heavy
libraries are imported inside functions, so that ``import attnc`` is fast and needs no GPU.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"compiler": "attnc", "passes": "attnc.passes", "codegen": "attnc.codegen"}
_MASKS = ("masks", "mask_atoms", "mask_joins", "mask_tiles", "formula", "formula_text", "intervals")
_STEPS = ("steps", "norms", "pointwise", "duals")
LOW = tuple(
    f"attnc.{n}"
    for n in ("ir", *_STEPS, "expr", "polynomial", "terms", *_MASKS, "block_list", "errors", "logs")
)
CORE = (
    *LOW,
    "attnc.formula_nodes",
    "attnc.printer",
    "attnc.sizes",
    "attnc.editing",
    "attnc.cost",
    "attnc.programs",
)
JOINERS = ("attnc.pipeline", "attnc.onnx_file", "attnc.api", "attnc.cli")
HEAVY = ("onnx", "onnxruntime", "onnxscript", "triton", "transformers")


@dataclass(frozen=True)
class Import:
    """One imported module: where it is asked for, and whether that runs when the file is imported."""

    module: str
    line: int
    on_load: bool
    relative: bool


@dataclass(frozen=True)
class Module:
    """A source file of the package, under the name it is imported by."""

    name: str
    path: Path
    imports: tuple[Import, ...]

    def breaks(self, rule: str, found: Import) -> str:
        return f"{self.path.relative_to(ROOT)}:{found.line}: {rule}, found {found.module!r}"


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    """Say whether module ``name`` is one of ``packages`` or lies inside one."""
    return any(name == p or name.startswith(p + ".") for p in packages)


def read_imports(source: str) -> Iterator[Import]:
    """Yield every import of ``source``; those inside functions or under TYPE_CHECKING do not run on load."""
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while todo:
        node, on_load = todo.pop()
        match node:
            case ast.Import(names=names):
                yield from (Import(n.name, node.lineno, on_load, relative=False) for n in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                # ``from attnc import passes`` names a package too: each name counts, its module in front.
                known = module in ("attnc", None)
                for n in names:
                    name = f"{module}.{n.name}" if known and module else module or n.name
                    yield Import(name, node.lineno, on_load, relative=level > 0)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                on_load = False
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                todo += [(child, on_load) for child in node.orelse]
                todo += [(child, False) for child in node.body]
                continue
        todo += [(child, on_load) for child in ast.iter_child_nodes(node)]


def read_modules() -> list[Module]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            found.append(Module(name, path, tuple(read_imports(path.read_text(encoding="utf-8")))))
    return found


MODULES = read_modules()


def imports_of(*packages: str) -> Iterator[tuple[Module, Import]]:
    """Yield the imports made by ``packages``; asking for ``attnc`` includes passes and codegen."""
    for module in MODULES:
        if is_within(module.name, packages):
            yield from ((module, found) for found in module.imports)


def test_reader_sees_every_kind_of_import():
    source = (
        "import attnc.passes.detect\n"
        "from attnc import codegen\n"
        "from attnc.ir import Match\n"
        "if TYPE_CHECKING:\n    import onnx\n"
        "def f():\n    import triton.language\n"
        "from . import near\n"
        "try:\n    import networkx\nexcept ImportError:\n    pass\n"
    )
    seen = {i.module: (i.on_load, i.relative) for i in read_imports(source)}
    assert seen == {
        "attnc.passes.detect": (True, False),
        "attnc.codegen": (True, False),
        "attnc.ir": (True, False),
        "onnx": (False, False),
        "triton.language": (False, False),
        "near": (True, True),
        "networkx": (True, False),
    }


def test_reader_finds_the_three_folders():
    names = {m.name for m in MODULES}
    assert {"attnc", "attnc.ir", "attnc.passes", "attnc.codegen", "attnc.passes.detect.scores"} <= names


def test_no_relative_imports():
    bad = [m.breaks("expected an absolute import", i) for m, i in imports_of("attnc") if i.relative]
    assert not bad, "\n".join(bad)


def test_no_import_of_a_bare_folder():
    bad = [
        m.breaks("expected attnc...", i)
        for m, i in imports_of("attnc")
        if is_within(i.module, tuple(FOLDERS))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("folder", ["attnc.passes", "attnc.codegen"])
def test_passes_and_codegen_see_only_themselves_and_the_core(folder):
    bad = [
        m.breaks(f"{folder} may import itself and {CORE}", i)
        for m, i in imports_of(folder)
        if is_within(i.module, ("attnc",)) and not is_within(i.module, (folder, *CORE))
    ]
    assert not bad, "\n".join(bad)


def test_low_modules_import_torch_and_the_standard_library_only():
    allowed = ("torch", *LOW, *sys.stdlib_module_names)
    bad = [
        m.breaks("expected torch, the standard library or the low modules", i)
        for m, i in imports_of(*LOW)
        # A spec prints itself, so printing may be asked for inside a method.
        if not is_within(i.module, allowed) and (i.on_load or i.module != "attnc.printer")
    ]
    assert not bad, "\n".join(bad)


def test_only_the_joiners_import_both_passes_and_codegen():
    bad = []
    for module in MODULES:
        sides = {
            side
            for side in ("attnc.passes", "attnc.codegen")
            for i in module.imports
            if is_within(i.module, (side,))
        }
        if len(sides) == 2 and module.name not in JOINERS:
            bad.append(f"{module.name} imports both; only {', '.join(JOINERS)} may")
    assert not bad, "\n".join(bad)


def test_heavy_libraries_are_imported_inside_functions():
    bad = [
        m.breaks("expected the import inside the function that needs it", i)
        for m, i in imports_of("attnc")
        if i.on_load and is_within(i.module, HEAVY)
    ]
    assert not bad, "\n".join(bad)


def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules of a fresh interpreter that has run ``statement``."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_attnc_loads_no_heavy_library():
    # What torch brings is torch's affair; it differs between releases.
    extra = loaded_after("import torch, attnc") - loaded_after("import torch")
    assert "attnc" in extra
    assert not extra & set(HEAVY)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_refuse_their_own_names(folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: import attnc" in done.stderr
