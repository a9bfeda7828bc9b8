"""Describe a saved directory in ``attnc.json``: rewrites, certificates, versions, and a hash per file.

No time, no machine path and none of the user's data is in it, so the same model saved twice gives the same
bytes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from attnc.errors import CheckpointError
from attnc.files import sha256
from attnc.report.report import Report, SiteRecord, jsonable

MANIFEST = "attnc.json"
FORMAT = 1
PACKAGES = ("attnc", "torch", "transformers", "safetensors")


@dataclass(slots=True)
class Manifest:
    """The content of ``attnc.json``.

    ``kind`` says how to load: ``hf`` through a transformers class, ``program`` from ``program.pt2``.
    ``layout`` says whose tensor names the weights have: transformers', or the module's own where layers
    became int8.  ``plan`` maps site globs to forms; ``sites`` are the certificates.  ``inputs`` is the recipe
    of the example inputs: shapes, dtypes and ranges; ``fixed_sizes`` says that no size was free at capture.
    """

    kind: Literal["hf", "program"]
    model: str
    target: str
    plan: list[dict[str, Any]]
    inputs: dict[str, Any]
    layout: Literal["transformers", "module"] = "transformers"
    attn_implementation: str | None = None
    fixed_sizes: bool = False
    signature: list[dict[str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    linears: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def records(self) -> list[SiteRecord]:
        """Return the certificates as records."""
        return [SiteRecord.from_dict(row) for row in self.sites]

    def write(self, folder: Path) -> None:
        """Hash every file of ``folder`` and write the manifest beside them."""
        self.files = hashes(folder)
        self.versions = installed_versions()
        text = json.dumps(
            jsonable(asdict(self)), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False
        )
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``attnc.json``.

    Raises:
        CheckpointError: there is none, it is broken, or a later version wrote it.
    """
    from attnc.tensor_files import read_json

    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"opening {folder}: expected a folder saved by attnc, found no {MANIFEST} in it"
        )
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"reading {path}: expected format {FORMAT}, found {values.get('format')!r}; another version of "
            "attnc wrote it"
        )
    names = {f.name for f in fields(Manifest)}
    wrong = sorted(values.keys() ^ names)
    if wrong or values["kind"] not in ("hf", "program"):
        raise CheckpointError(
            f"reading {path}: expected the keys of format {FORMAT}, found a difference in "
            f"{', '.join(wrong) or 'kind'}"
        )
    return Manifest(**values)


def certificates(report: Report) -> list[dict[str, Any]]:
    """Return the site records without what changes from run to run: details, and folders of source files."""
    rows = [site.to_dict() for site in report.sites]
    for row in rows:
        del row["details"]
        file, colon, line = row["source"].rpartition(":")
        row["source"] = f"{os.path.basename(file)}{colon}{line}" if colon else os.path.basename(line)
    return rows


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file under ``folder`` but the manifest, by path relative to it."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): sha256(p) for p in found}


def verify_files(directory: str | Path) -> dict[str, str]:
    """Check every file that the manifest lists against its hash, and no other; return the hashes.

    Raises:
        CheckpointError: no manifest, or a file that is missing or changed; the message names each.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    wrong = list(_differences(folder, manifest.files))
    if wrong:
        raise CheckpointError(f"checking {folder}: {'; '.join(wrong)}: the folder is not what attnc saved")
    return manifest.files


def installed_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of the installed packages among ``names``."""
    out = {}
    for name in names:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _differences(folder: Path, files: Mapping[str, str]) -> Iterable[str]:
    for name, digest in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{name} is not a path inside the folder"
        elif not path.is_file():
            yield f"{name} is missing"
        elif sha256(path) != digest:
            yield f"{name} has changed (expected sha256 {digest[:12]}..)"
