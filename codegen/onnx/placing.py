"""Put a written model in place: at every moment the path holds the complete old one or the complete new one.

Weights in a file of their own carry a digest of their bytes in its name.  So new weights never take the place
of those that the old model names: they come first, then the model in one rename, and old weights go last.
A process that is killed leaves at most files that no model names; the next export to the path removes them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.errors import CodegenError

if TYPE_CHECKING:
    import onnx_ir as ir

DIGEST = 16
"""Hexadecimal digits in the name of a weights file: 64 bits of SHA-256."""
CHUNK = 1 << 20
_WEIGHTS = "weights.data"


def check_free(path: Path, force: bool) -> tuple[Path, ...]:
    """Check that a model may go to ``path``; return the weights files that earlier exports left beside it.

    Raises:
        CodegenError: no such folder, something there and no ``force``, or something there that is no plain
            file of one name.
    """
    if not path.parent.is_dir():
        raise CodegenError(f"ONNX export: expected an existing folder {path.parent}, found none")
    if os.path.lexists(path):
        _check_plain(path)
        if not force:
            raise CodegenError(f"ONNX export: {path} exists; remove it, or ask to replace it with --force")
    return tuple(sorted(p for p in path.parent.iterdir() if _is_weights(p.name, path.name)))


def _check_plain(path: Path) -> None:
    """Check that what is at ``path`` can be replaced without a surprise elsewhere."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        what = f"is a symbolic link to {os.readlink(path)!r}"
    elif stat.S_ISDIR(found.st_mode):
        what = "exists and is a folder"
    elif not stat.S_ISREG(found.st_mode):
        what = "is a pipe, a socket or a device"
    elif found.st_nlink > 1:
        what = (
            f"is one of {found.st_nlink} names of the same file (hard links), of which one alone would change"
        )
    else:
        return
    raise CodegenError(f"ONNX export: expected a plain file to replace, {path} {what}; choose another path")


def _is_weights(name: str, model: str) -> bool:
    """Say whether ``name`` is what a weights file of ``model`` is called."""
    return re.fullmatch(rf"{re.escape(model)}\.[0-9a-f]{{{DIGEST}}}\.data", name) is not None


class Sibling:
    """A temporary folder beside a path, removed in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name[:200]}.", dir=self._path.parent))
        except OSError as e:
            raise CodegenError(f"ONNX export: cannot write into {self._path.parent}: {e}") from e
        return self._folder

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def save(model: ir.Model, path: Path, external: bool) -> None:
    """Write ``model`` to ``path``, the only model in its folder; its weights beside it if ``external``.

    The same model gives the same bytes and the same names.

    Raises:
        CodegenError: the disk is full, or the files cannot be written.
    """
    import onnx_ir as ir

    try:
        for old in path.parent.iterdir():
            old.unlink()
        ir.save(model, path, external_data=_WEIGHTS if external else None)
        weights = path.with_name(_WEIGHTS)
        if weights.exists():
            _name_weights(path, weights)
    except OSError as e:
        raise CodegenError(f"ONNX export: cannot write {path.name}: {e}") from e


def _name_weights(path: Path, weights: Path) -> None:
    """Name a weights file by its content, in the folder and in the model."""
    import onnx

    named = weights.with_name(f"{path.name}.{_digest(weights)}.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = named.name
    weights.rename(named)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(CHUNK):
            found.update(piece)
    return found.hexdigest()[:DIGEST]


def place(folder: Path, path: Path, old: Iterable[Path], force: bool) -> tuple[Path, ...]:
    """Move the files in ``folder`` to where ``path`` lies, the model last, and remove the weights ``old``.

    Returns the files, the model first.

    Raises:
        CodegenError: the disk is full, or a file cannot be replaced.
    """
    files = sorted(folder.iterdir(), key=lambda f: f.name == path.name)
    new = [path.with_name(f.name) for f in files]
    try:
        for file in files:
            _flush(file)
        for file, to in zip(files, new, strict=True):
            if os.path.lexists(to):
                _check_plain(to)
            if to == path and os.path.lexists(path) and not force:
                raise CodegenError(f"ONNX export: {path} appeared while the model was made; it was kept")
            os.replace(file, to)
            _flush(path.parent)
        for file in old:
            if file not in new:
                file.unlink(missing_ok=True)
    except OSError as e:
        raise CodegenError(f"ONNX export: cannot put {path} in place: {e}") from e
    return tuple(reversed(new))


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if not path.is_dir():  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(fd)
