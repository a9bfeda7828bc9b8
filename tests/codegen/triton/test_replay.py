from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("replay.py")
CORPUS = "tests/codegen/triton/corpus.txt"

EMITTER = """
from types import SimpleNamespace
def can_run(spec, **kind):
    if "dropout" in spec:
        return SimpleNamespace(code="triton-dropout", why="expected dropout 0")
def emit(spec, name, **kind):
    digest = abs(hash(spec))  # another one in each process
    return SimpleNamespace(source=f"{kind.get('kind')} {name}\\nkey     {digest}\\nVERSION\\n")
"""


def tree(folder: Path, *, version: str, corpus: str, kinds: str = "") -> None:
    """Write a project whose compiler writes a few words per spec."""
    files = {
        "compiler/__init__.py": "",
        "compiler/printer.py": "def parse(text):\n    return text\n",
        "passes/__init__.py": "",
        "codegen/__init__.py": "",
        "codegen/triton/__init__.py": EMITTER.replace("VERSION", version),
        CORPUS: f"# name, spec\n{corpus}",
    }
    if kinds:
        files["codegen/triton/kinds.py"] = f"KINDS = {kinds!r}.split()\n"
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_two_folders_differ_by_the_files_that_changed_came_and_went(tmp_path) -> None:
    tree(tmp_path / "old", version="one", corpus="same spec\nlost spec\nbarred spec\n")
    tree(
        tmp_path / "new",
        version="one",
        corpus="same spec\nbarred dropout\nadded spec\n",
        kinds="forward decode",
    )
    emitter = tmp_path / "old/codegen/triton/__init__.py"
    emitter.write_text(
        emitter.read_text().replace("kind.get('kind')", "'forward'")
    )  # before there were kinds
    done = run("-a", tmp_path / "old", "-b", tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, counts = done.stdout.splitlines()
    assert counts == "1 same, 0 changed, 3 new, 2 gone"
    assert "gone: forward/barred.py: triton-dropout: expected dropout 0" in lines
    assert "gone: forward/lost.py: its spec or its kind is not there" in lines
    assert [x for x in lines if x.startswith("+++")] == [
        "+++ b/decode/added.py",
        "+++ b/decode/same.py",
        "+++ b/forward/added.py",
    ]
    assert "forward/same.py" not in done.stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_two_commits_are_compared_each_with_its_own_code(tmp_path) -> None:
    import replay

    def git(*arguments: str) -> None:
        who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, env={**os.environ, **who})

    git("init", "-q", "-b", "main")
    tree(tmp_path, version="one", corpus="a spec\nb spec\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    git("switch", "-qc", "side")
    tree(tmp_path, version="two", corpus="a spec\n")
    git("commit", "-qam", "two")
    tree(tmp_path, version="three", corpus="a spec\n")

    def shown(a: str | None, b: str | None) -> list[str]:
        return [x for x in replay.replay(a, b, tmp_path) if not x.startswith(("---", "+++", "@@", " "))]

    both = ["-one", "+two", "gone: forward/b.py: its spec or its kind is not there"]
    assert shown("main", "side") == [*both, "0 same, 1 changed, 0 new, 1 gone"]
    assert shown("side", None) == ["-two", "+three", "0 same, 1 changed, 0 new, 0 gone"]
    assert shown(None, None) == [both[0], "+three", both[2], "0 same, 1 changed, 0 new, 1 gone"]


@pytest.fixture(autouse=True)
def _script_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def test_a_side_that_is_not_there_or_does_not_run_is_an_error(tmp_path) -> None:
    tree(tmp_path, version="one", corpus="a spec\n")
    done = run("-a", "no-such-commit", "-b", tmp_path)
    assert done.returncode == 2
    assert "no-such-commit: expected a folder or a commit" in done.stderr
    (tmp_path / "codegen/triton/__init__.py").write_text("raise RuntimeError('broken')\n")
    done = run("-a", tmp_path, "-b", tmp_path)
    assert done.returncode == 2
    assert "RuntimeError: broken" in done.stderr


def test_a_changed_template_shows_in_the_kernels_and_its_digest_does_not(tmp_path) -> None:
    corpus = (ROOT / CORPUS).read_text(encoding="utf-8").splitlines()
    line = next(x for x in corpus if x.startswith("causal "))
    for side in ("old", "new"):
        shutil.copytree(
            ROOT / "codegen", tmp_path / side / "codegen", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("compiler", "passes"):
            (tmp_path / side / name).symlink_to(ROOT / name)
        (tmp_path / side / CORPUS).parent.mkdir(parents=True)
        (tmp_path / side / CORPUS).write_text(line)
    template = tmp_path / "new/codegen/triton/templates/file.py.j2"
    template.write_text(template.read_text().replace("GUARD = 12344.0", "GUARD = 12345.0"))
    done = run("-a", tmp_path / "old", "-b", tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    changed = [x for x in done.stdout.splitlines() if x[:1] in "+-" and x[:3] not in ("---", "+++")]
    assert set(changed) == {"-GUARD = 12344.0", "+GUARD = 12345.0"}
