"""Print how every emitted kernel of the corpus differs between two commits, or between two folders.

    make replay A=HEAD~1 B=HEAD
    python tests/codegen/triton/replay.py [-a COMMIT] [-b COMMIT]

A side is a commit or a folder with the sources of this project; without ``-a`` it is where this branch left
main (or HEAD), without ``-b`` the working tree.  Each side emits its own corpus with its own code, in every
kind of kernel it has, in a process of its own.  A change that claims to move code only shows an empty diff.
The exit code is 0, whatever the diff; 2 where a side cannot be emitted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CORPUS = "tests/codegen/triton/corpus.txt"
SOURCES = ("compiler", "passes", "codegen")


class ReplayError(Exception):
    """A side cannot be emitted: no such commit, no corpus, or its code fails."""


def replay(a: str | None, b: str | None, root: Path = ROOT) -> Iterator[str]:
    """Yield the lines of the diff from side ``a`` to side ``b``, then one line that counts.

    Raises:
        ReplayError: a side cannot be emitted.
    """
    with tempfile.TemporaryDirectory(prefix="attnc-replay-") as temporary:
        sides = []
        for name, side in (("a", a or _branch_point(root)), ("b", b or str(root))):
            folder = Path(temporary, name)
            folder.mkdir()
            sides.append(_emitted(_tree(side, root, folder), folder))
    (old, _), (new, refused) = sides
    counts = dict.fromkeys(("same", "changed", "new", "gone"), 0)
    for path in sorted(old | new):
        before, after = old.get(path), new.get(path)
        verdict = "new" if before is None else "gone" if after is None else "changed"
        counts["same" if before == after else verdict] += 1
        if verdict == "gone":
            yield f"gone: {path}: {refused.get(path, 'its spec or its kind is not there')}"
        else:
            yield from _diff(path, before, after)
    yield ", ".join(f"{n} {what}" for what, n in counts.items())


def _diff(path: str, before: str | None, after: str | None) -> Iterator[str]:
    ours = [(text or "").splitlines() for text in (before, after)]
    old_name = "/dev/null" if before is None else f"a/{path}"
    yield from difflib.unified_diff(*ours, old_name, f"b/{path}", lineterm="")


def _branch_point(root: Path) -> str:
    """Return the commit at which the current branch left main; HEAD where there is no main."""
    done = _git(root, "merge-base", "main", "HEAD")
    return done.stdout.decode().strip() if done.returncode == 0 else "HEAD"


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)


def _tree(side: str, root: Path, folder: Path) -> Path:
    """Return a folder with the sources of a side; those of a commit are unpacked below ``folder``."""
    if (Path(side) / "codegen").is_dir():
        return Path(side).resolve()
    archive = folder / "tree.tar"
    done = _git(root, "archive", f"--output={archive}", side, *SOURCES, CORPUS)
    if done.returncode != 0:
        why = done.stderr.decode().strip()
        raise ReplayError(f"{side}: expected a folder or a commit with our sources, found none: {why}")
    shutil.unpack_archive(archive, folder / "tree", **_safe())
    return folder / "tree"


def _safe() -> dict[str, Any]:
    """Return the option of newer Pythons by which an archive cannot leave its folder."""
    return {"filter": "data"} if sys.version_info >= (3, 12) else {}


def _emitted(tree: Path, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Run the side's code; return the files it emits, by ``kind/name.py``, and the reasons against others."""
    links, out = folder / "links" / "attnc", folder / "out.json"
    links.mkdir(parents=True)
    inside = (path for path in (tree / "compiler").iterdir() if path.name != "__pycache__")
    for path in (*inside, tree / "passes", tree / "codegen"):
        (links / path.name).symlink_to(path)
    command = [sys.executable, str(Path(__file__).resolve()), "--emit", str(tree / CORPUS), str(out)]
    paths = {"PYTHONPATH": str(links.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReplayError(f"{tree}: expected the corpus to be emitted, found:\n{done.stderr[-2000:]}")
    found: dict[str, dict[str, str]] = json.loads(out.read_text(encoding="utf-8"))
    return found["files"], found["refused"]


def emit_side(corpus: Path, out: Path) -> None:
    """Emit a corpus with the ``attnc`` on the path; runs in a process of its own, with a side's code.

    The digest in a file is replaced, since it changes with any other line.
    """
    import attnc

    place = Path(os.environ["PYTHONPATH"], "attnc")
    assert Path(attnc.__file__).parent == place, f"expected attnc from {place}, found {attnc.__file__}"
    from attnc.codegen.triton import can_run, emit
    from attnc.printer import parse

    files: dict[str, str] = {}
    refused: dict[str, str] = {}
    for line in corpus.read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition(" ")
        if not text or name.startswith("#"):
            continue
        for kind, option in _kinds():
            miss = can_run(parse(text), **option)
            if miss is not None:
                refused[f"{kind}/{name}.py"] = f"{miss.code}: {miss.why}"
                continue
            source = emit(parse(text), name=name, **option).source
            files[f"{kind}/{name}.py"] = re.sub(r"(?m)^key     \w+$", "key     <key>", source)
    out.write_text(json.dumps({"files": files, "refused": refused}), encoding="utf-8")


def _kinds() -> list[tuple[str, dict[str, str]]]:
    """Return each kind of kernel, and how ``emit`` is asked for it."""
    try:
        from attnc.codegen.triton.kinds import KINDS
    except ModuleNotFoundError:  # a commit from before there were kinds
        return [("forward", {})]
    return [(kind, {"kind": kind}) for kind in KINDS]


def main() -> int:
    """Print the diff; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-a", help="a commit or a folder; where this branch left main, if not given")
    parser.add_argument("-b", help="a commit or a folder; the working tree, if not given")
    parser.add_argument("--emit", nargs=2, type=Path, metavar=("CORPUS", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.emit:
        emit_side(*given.emit)
        return 0
    try:
        for line in replay(given.a, given.b):
            print(line)
    except ReplayError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
