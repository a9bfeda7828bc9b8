"""What gets installed: the list of packages, the wheel's contents, and the ways to start the program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
FOLDERS = {"compiler": "attnc", "passes": "attnc.passes", "codegen": "attnc.codegen"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DATA = (".j2", ".json", ".typed")


def expected_files() -> set[str]:
    """Return what a wheel must hold under ``attnc/``: modules, templates, tables and the type marker."""
    found = set()
    for folder, package in FOLDERS.items():
        base = ROOT / folder
        for path in base.rglob("*"):
            if path.suffix in (".py", *DATA) and "__pycache__" not in path.parts:
                found.add(f"{package.replace('.', '/')}/{path.relative_to(base).as_posix()}")
    return found


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy: setuptools would pack what an older run left in the build/ of the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_packages_are_the_folders_that_hold_an_init():
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(ROOT / folder).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_modules_has_an_init():
    bare = {p.parent for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    assert not [str(p.relative_to(ROOT)) for p in bare if not (p / "__init__.py").exists()]


def test_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n and not n.endswith("/")}
    assert names == expected_files()


def test_wheel_carries_the_licence(wheel):
    (name,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("licenses/LICENSE")]
    assert b"Apache License" in zipfile.ZipFile(wheel).read(name)


def test_wheel_alone_can_be_imported(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    modules = [
        n.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for n in expected_files()
        if n.endswith(".py")
    ]
    modules = sorted(m for m in modules if m != "attnc.__main__")
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "start", [["-m", "attnc"], ["-c", "from attnc.cli import main; main()"]], ids=["-m", "main"]
)
def test_program_starts_and_lists_its_verbs(start, tmp_path):
    done = run(sys.executable, *start, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for verb in ("inspect", "optimize", "export", "emit", "verify", "bench", "doctor"):
        assert verb in done.stdout


def test_program_fails_on_an_unknown_verb(tmp_path):
    done = run(sys.executable, "-m", "attnc", "no-such-verb", cwd=tmp_path)
    assert done.returncode != 0
    assert "no-such-verb" in done.stderr


def test_dynamo_backend_is_registered_and_loads():
    (entry,) = entry_points(group="torch_dynamo_backends", name="attnc")
    assert callable(entry.load())


def test_console_script_points_at_a_function():
    (entry,) = entry_points(group="console_scripts", name="attnc")
    assert callable(entry.load())
