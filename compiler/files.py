"""Write a file or a directory as a whole or not at all.

The new content grows in a hidden sibling ``.name.attnc-XXXX``, is flushed to the disk, and takes the place of
the old in one rename (a swap where the system has one), so at each moment the output is either the complete
old one or the complete new one.  Whatever fails on the way, a full disk or an interrupt among them, leaves
the old output as it was and no sibling behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from attnc.errors import CheckpointError

AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
CHUNK = 1 << 20
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def write_file(path: str | Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a sibling of ``path`` for writing and put it in its place if the block ends without an error.

    Raises:
        CheckpointError: the path exists and ``force`` is not given, is a folder, or cannot be written.
    """
    path = Path(path)
    check_free(path, force=force)
    if path.is_dir() and not path.is_symlink():
        raise CheckpointError(f"writing {path}: expected a file name, found an existing folder")
    with _reported(path), _sibling(path) as temporary:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        _place(temporary, path, force)


@contextmanager
def write_directory(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty sibling folder of ``path`` and put it in its place if the block ends without an error.

    Raises:
        CheckpointError: the path exists and ``force`` is not given, is not safe to replace, or cannot be
            written.
    """
    path = Path(path)
    check_free(path, force=force)
    with _reported(path), _sibling(path) as temporary:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        _place(temporary, path, force)


def write_bytes(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """Write one file as a whole.

    Raises:
        CheckpointError: as for ``write_file``.
    """
    with write_file(path, force=force) as f:
        f.write(data)


def check_free(path: str | Path, *, force: bool = False) -> None:
    """Check, before any work is done, that an output may go to ``path``.

    Raises:
        CheckpointError: it exists and ``force`` is not given, or it is a folder that holds more than one
            output: the working folder, the home folder, one above them, or a git repository.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not force:
        raise CheckpointError(
            f"writing {path}: it exists already; choose another path, or replace it with --force (force=True)"
        )
    if path.is_dir() and not path.is_symlink():
        here = path.resolve()
        kept = [Path.cwd(), Path.home().resolve()]
        if any(k.is_relative_to(here) for k in kept) or (here / ".git").exists() or os.path.ismount(here):
            raise CheckpointError(
                f"writing {path}: expected a folder that holds one output only, found a working folder; "
                "choose another path"
            )


def check_apart(output: str | Path, *inputs: str | Path) -> None:
    """Check that ``output`` is none of the inputs, nor holds or lies in one.

    Raises:
        CheckpointError: it does; attnc never writes over its input.
    """
    out = Path(output).resolve()
    for given in inputs:
        source = Path(given).resolve()
        if out == source or source.is_relative_to(out) or (source.is_dir() and out.is_relative_to(source)):
            raise CheckpointError(
                f"writing {output}: expected a path apart from the input {given}; choose another one"
            )


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder`` to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def sha256(path: str | Path) -> str:
    """Return the hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:  # some network file systems have no fsync of folders
        if e.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(fd)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn an error of the system into one line that says what stayed as it was."""
    try:
        yield
    except OSError as e:
        reason = REASONS.get(e.errno or 0, e.strerror or str(e))
        state = "the old output is unchanged" if os.path.lexists(path) else "nothing was written"
        raise CheckpointError(f"writing {path}: {reason}; {state}") from e


@contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """Give a hidden name beside ``path``, making missing parents; take both away if the block fails."""
    made = [p for p in path.parents if not p.exists()]
    temporary = path.parent / f".{path.name[:200]}.attnc-{secrets.token_hex(4)}"
    try:
        if path.parent.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path.parent))
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            _remove(temporary)
        for parent in made:
            with suppress(OSError):  # somebody else may have put a file there meanwhile
                parent.rmdir()
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _place(temporary: Path, path: Path, force: bool) -> None:
    """Rename ``temporary`` to ``path``; what was there is removed only afterwards."""
    if force and os.path.lexists(path):
        if not temporary.is_dir() and not (path.is_dir() and not path.is_symlink()):
            os.replace(temporary, path)
        else:
            _swap(temporary, path)
            _discard(temporary, path)
    elif not _rename2(temporary, path, RENAME_NOREPLACE):
        # No such rename here: look once more, so that only a race of microseconds could replace something.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it appeared while the output was being written", str(path))
        os.rename(temporary, path)
    _sync(path.parent)


def _discard(old: Path, path: Path) -> None:
    try:
        _remove(old)
    except OSError as e:
        raise CheckpointError(
            f"writing {path}: complete, but the old output could not be removed from {old}: {e}"
        ) from e


def _swap(temporary: Path, path: Path) -> None:
    """Exchange two paths, in one step where the system can."""
    if _rename2(temporary, path, RENAME_EXCHANGE):
        return
    aside = temporary.with_name(temporary.name + "-old")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(aside, path)
        raise
    os.rename(aside, temporary)


def _rename2(source: Path, target: Path, flags: int) -> bool:
    """Call Linux's ``renameat2``; return False where the system or the file system lacks it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))
