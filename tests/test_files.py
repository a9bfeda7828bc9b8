"""Outputs appear as a whole or not at all, and the old output outlives every failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnc import files
from attnc.errors import CheckpointError


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def write_folder(path: Path, text: str, force: bool = False) -> None:
    with files.write_directory(path, force=force) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(text)


def test_file_and_folder_appear_complete_with_ordinary_modes(tmp_path):
    files.write_bytes(tmp_path / "x.bin", b"new")
    write_folder(tmp_path / "out", "new")
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt", "x.bin"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


def test_missing_parents_are_made_and_taken_away_when_writing_fails(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "x", b"1")
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"
    with pytest.raises(RuntimeError, match="boom"), files.write_directory(tmp_path / "c" / "d" / "out"):
        raise RuntimeError("boom")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_existing_output_needs_force(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"exists already.*--force"):
        write_folder(path, "new")
    write_folder(path, "new", force=True)
    assert (path / "a.txt").read_text() == "new"
    assert not path.is_symlink()
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt"]


def test_force_replaces_a_file_and_keeps_no_copy(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    files.write_bytes(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert listing(tmp_path) == ["x"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="expected a file name, found an existing folder"):
        files.write_bytes(tmp_path / "out", b"new", force=True)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_old_folder_is_intact_after_a_failure_in_the_middle(tmp_path, error):
    path = tmp_path / "out"
    write_folder(path, "old")
    expected = CheckpointError if isinstance(error, OSError) else type(error)

    def fail_half_way() -> None:
        with files.write_directory(path, force=True) as folder:
            (folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        fail_half_way()
    assert (path / "sub" / "b.txt").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"writing {path}: the disk is full; the old output is unchanged"


@pytest.mark.parametrize("call", ["fsync", "rename2"])
def test_old_output_is_intact_when_the_disk_is_full_at_the_last_moment(tmp_path, monkeypatch, call):
    path = tmp_path / "out"
    write_folder(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (files, "_rename2")), full)
    with pytest.raises(CheckpointError, match="the disk is full; the old output is unchanged"):
        write_folder(path, "new", force=True)
    assert (path / "a.txt").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt"]


def test_swap_works_without_the_system_call(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_rename2", lambda *_: False)
    write_folder(tmp_path / "out", "old")
    write_folder(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt"]


def test_swap_without_the_system_call_puts_the_old_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_rename2", lambda *_: False)
    write_folder(tmp_path / "out", "old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out" and not str(source).endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_folder(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/a.txt", "out/sub", "out/sub/b.txt"]


def test_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def raced() -> None:
        with files.write_directory(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(CheckpointError, match="exists"):
        raced()
    assert listing(tmp_path) == ["out", "out/theirs"]


def test_unwritable_path_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        CheckpointError, match="a part of the path is a file, not a folder; nothing was written"
    ):
        files.write_bytes(tmp_path / "file" / "out", b"new")
    assert listing(tmp_path) == ["file"]


def test_no_permission_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match=f"writing {tmp_path / 'out'}: no permission to write there"):
        write_folder(tmp_path / "out", "new")


def test_working_folder_and_repositories_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "work", tmp_path / "repo"):
        with pytest.raises(CheckpointError, match="a working folder"):
            files.check_free(path, force=True)


def test_output_apart_from_input(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for output in (source, source / "out", tmp_path):
        with pytest.raises(CheckpointError, match="apart from the input"):
            files.check_apart(output, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="apart from the input"):
        files.check_apart(tmp_path / "link", source)
    files.check_apart(tmp_path / "model2", source)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are a POSIX matter")
def test_a_process_that_may_write_no_more_leaves_the_old_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    code = (
        "import resource, sys; from attnc import files; from attnc.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with files.write_directory(sys.argv[1], force=True) as folder:\n"
        "        (folder / 'a.txt').write_bytes(b'x' * 100000)\n"
        "except CheckpointError as e:\n"
        "    print(e)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, timeout=60
    )
    assert "larger than this process may write; the old output is unchanged" in run.stdout, run.stderr
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/a.txt"]
