"""Run one tool on one model of the recognition corpus, through the corpus' own runners.

The corpus is a folder with ``spellings/run.py`` (34 spellings of attention) and ``zoo/`` (tiny versions of
public models, whose attention sites a tracker counts).  A result is a plain row: what the tool did with one
model.  Nothing here judges: numbers of sites, mask forms and agreement are the corpus' own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Tool:
    """A tool as each runner of the corpus names it, and the packages whose versions matter."""

    name: str
    title: str
    spelling: str
    zoo: str
    packages: tuple[str, ...]
    reports_masks: bool = False


TOOLS = (
    Tool("attnc", "attnc", "attnc", "zoo.attnc_tool:attnc", ("torch", "transformers"), True),
    Tool("inductor", "Inductor's matcher", "peers:spelling_inductor", "inductor", ("torch",)),
    Tool(
        "ort_fusions",
        "onnxscript ort_fusions",
        "peers:spelling_ort_fusions",
        "zoo.tools_onnx:ort_fusions",
        ("torch", "onnxscript", "onnxruntime"),
    ),
    Tool(
        "ort_optimizer",
        "ONNX Runtime's optimizer",
        "peers:spelling_ort_optimizer",
        "peers:ort_optimizer",
        ("torch", "onnxruntime"),
    ),
)


class Corpus:
    """The two runners, loaded from ``folder``.

    Raises:
        SystemExit: the folder does not hold the corpus; the message says what was expected.
    """

    def __init__(self, folder: Path) -> None:
        for part in ("spellings/run.py", "zoo/zoo/__main__.py"):
            if not (folder / part).is_file():
                sys.exit(
                    f"recognition: expected the corpus in {folder}, with {part}; it is not part of this "
                    "repository: pass its folder with --corpus DIR"
                )
        self.folder = folder
        sys.path[:0] = [str(folder / "zoo"), str(Path(__file__).parent)]

    def spellings(self) -> types.ModuleType:
        """Return the runner of the spellings as a module."""
        return _module("spellings_run", self.folder / "spellings" / "run.py")

    def zoo(self) -> types.ModuleType:
        """Return the zoo's runner as a module."""
        import zoo.__main__ as runner

        module: types.ModuleType = runner
        return module

    def spelling_names(self) -> list[str]:
        """Return the names of the spellings in order."""
        return list(self.spellings().CASES)

    def kind(self, case: str) -> str:
        """Return "other" for a spelling that is no plain softmax attention, "softmax" for the rest."""
        return "other" if case in self.spellings().OTHER else "softmax"

    def zoo_names(self, sample: int) -> list[str]:
        """Return the zoo's public names as its own runner lists them, one in ``sample``."""
        argv = ["--list", *(["--sample", str(sample)] if sample > 1 else [])]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.zoo().main(argv)
        return out.getvalue().split()

    def fingerprint(self, tool: Tool) -> str:
        """Return a digest of what a row depends on: the corpus, the adapters, and attnc for attnc."""
        files = [*self.folder.glob("*/*.py"), *self.folder.glob("zoo/zoo/*.py")]
        files.append(Path(__file__).parent / "peers.py")
        if tool.name == "attnc":
            files += [p for d in ("compiler", "passes", "codegen") for p in (ROOT / d).rglob("*.py")]
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def _module(name: str, path: Path) -> types.ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, path
        assert spec.loader is not None, path
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def run_spelling(corpus: Corpus, tool: Tool, case: str) -> dict[str, Any]:
    """Return the runner's own row for one spelling, and its verdicts as 0 or 1."""
    runner, out = corpus.spellings(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        argv = ["run.py", "--tool", tool.spelling, "--json", str(file), case]
        with (
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            runner.main()
        row: dict[str, Any] = json.loads(file.read_text())[0]
    said = re.search(r"(\d) of \d softmax .* recognised, (\d) with .*; (\d) of \d others", out.getvalue())
    assert said is not None, f"the runner of the spellings said {out.getvalue()!r}"
    found, lifted, named = map(int, said.groups())
    sites = row.get("sites", [])
    checked = [s["agrees"] for s in sites if "agrees" in s]
    if tool.name == "attnc":
        checked = ["error" not in row and row["max_error"] <= 1e-5]
    return {
        "name": case,
        "kind": row["kind"],
        "mask": row["mask_expected"],
        "rewritten": found,
        "mask_closed": lifted,
        "named": named,
        "agrees": all(checked) if checked else None,
        **({"raised": row["error"]} if "error" in row else {}),
    }


_KEPT = (
    "name",
    "family",
    "status",
    "why",
    "unfused",
    "masks",
    "fused",
    "by_status",
    "agrees",
    "runs",
    "wall_s",
)


def run_model(corpus: Corpus, tool: Tool, name: str, limit: int) -> dict[str, Any]:
    """Return the zoo's own row for one model, shortened."""
    row = corpus.zoo().child(name, tool.zoo, False, limit)
    out = {k: row[k] for k in _KEPT if k in row}
    if "tool_error" in row:
        out["raised"] = row["tool_error"]
    if "mask_forms" in row:
        out["dense"] = any("dense" in str(m).lower() for m in row["mask_forms"])
    return out
