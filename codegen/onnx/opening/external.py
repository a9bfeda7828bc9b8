"""Check where a tensor's external data lies, before any library follows the path.

The file has to be a plain one inside the model's folder: no ``..``, no absolute path, no symbolic link on the
way, one name only (a second hard link may be a file from elsewhere), and as long as the tensor needs.
Source: ONNX, External Data; GHSA-538c-55jv-c5g9.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnc.codegen.onnx.opening.wire import quoted
from attnc.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

KEYS = ("location", "offset", "length", "checksum")
MOVE = "attnc reads plain files inside the model's folder alone; where you trust it, copy the data there"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(slots=True)
class Folder:
    """The folder of a model, and the sizes of the data files in it that were found to be plain."""

    path: Path
    sizes: dict[str, int] = field(default_factory=dict)

    def check(self, tensor: onnx.TensorProto, nbytes: int | None) -> None:
        """Check the external data of ``tensor``, which has ``nbytes`` bytes by its type and shape.

        ``nbytes`` None: its type has no fixed size (texts).

        Raises:
            CheckpointError: keys, path, file, offset or length are not as the module says.
        """
        where = f"tensor {quoted(tensor.name)}: external data: "
        keys = _keys(tensor, where)
        location = keys["location"]
        if location not in self.sizes:
            self.sizes[location] = self._plain(location, where)
        size = self.sizes[location]
        offset, length = (_number(keys, key, where) for key in ("offset", "length"))
        if nbytes is None:
            raise CheckpointError(f"{where}expected numbers, found texts, which have to lie in the model")
        if length is not None and length != nbytes:
            raise CheckpointError(
                f"{where}expected {nbytes} bytes by its type and shape {quoted(list(tensor.dims))}, found a "
                f"length of {length}"
            )
        if (offset or 0) + nbytes > size:
            raise CheckpointError(
                f"{where}expected bytes {offset or 0} to {(offset or 0) + nbytes} inside {quoted(location)}, "
                f"found a file of {size} bytes; it is truncated or the model lies"
            )

    def _plain(self, location: str, where: str) -> int:
        """Return the size of the file at ``location`` after checking every step to it."""
        parts = location.split("/")
        if any(c in location for c in "\0\\") or location.startswith("/") or os.path.isabs(location):
            raise CheckpointError(
                f"{where}expected a path relative to the model, found {quoted(location)}; {MOVE}"
            )
        if any(p in ("", ".", "..") for p in parts):
            raise CheckpointError(
                f"{where}expected a path inside the model's folder, found {quoted(location)}; {MOVE}"
            )
        place = self.path
        for i, part in enumerate(parts):
            place = place / part
            try:
                found = os.lstat(place)
            except OSError as e:
                raise CheckpointError(
                    f"{where}expected a file {quoted(location)} beside the model, found none ({e.strerror})"
                ) from None
            if stat.S_ISLNK(found.st_mode):
                raise CheckpointError(
                    f"{where}expected a plain file, {quoted(location)} is a symbolic link; {MOVE}"
                )
            if i + 1 < len(parts) and not stat.S_ISDIR(found.st_mode):
                raise CheckpointError(f"{where}expected a folder at {quoted(part)} of {quoted(location)}")
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise CheckpointError(f"{where}expected a plain file, {quoted(location)} is {kind}")
        if found.st_nlink > 1:
            raise CheckpointError(
                f"{where}expected a file of one name, {quoted(location)} has {found.st_nlink} hard links; "
                f"{MOVE}"
            )
        return found.st_size


def _keys(tensor: onnx.TensorProto, where: str) -> dict[str, str]:
    """Return the entries of a tensor's external data: each known key at most once, a location at least."""
    out: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key.startswith("prepacked"):  # written by ONNX Runtime, about ranges that it alone reads
            continue
        if entry.key not in KEYS:
            raise CheckpointError(f"{where}expected the keys {', '.join(KEYS)}, found {quoted(entry.key)}")
        if entry.key in out:
            raise CheckpointError(f"{where}expected one {entry.key}, found two")
        out[entry.key] = entry.value
    if not out.get("location"):
        raise CheckpointError(f"{where}expected a location, found none")
    return out


def _number(keys: dict[str, str], key: str, where: str) -> int | None:
    text = keys.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise CheckpointError(f"{where}expected the {key} to be a number of bytes, found {quoted(text)}")
    return int(text)
