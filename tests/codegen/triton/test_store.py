from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from attnc.codegen.triton.store import folder, keep, load, load_apart, write
from attnc.errors import CodegenError
from attnc.ir import Kernel

KERNEL = Kernel("one", "VALUE = 1\n", "k1")


def test_kernels_are_kept_by_name_and_key_under_the_cache_home(kernel_folder) -> None:
    path = keep(KERNEL)
    assert folder() == kernel_folder
    assert path == kernel_folder / "one_k1.py"
    assert path.read_text() == KERNEL.source
    before = path.stat().st_mtime_ns
    assert keep(KERNEL).stat().st_mtime_ns == before


def test_a_file_with_other_content_is_replaced_and_never_imported(kernel_folder) -> None:
    kernel_folder.mkdir(parents=True)
    (kernel_folder / "two_k2.py").write_text("VALUE = 666\n")
    assert load(Kernel("two", "VALUE = 2\n", "k2")).VALUE == 2


def test_a_file_that_was_cut_off_is_replaced(kernel_folder) -> None:
    path = keep(KERNEL)
    path.write_text(KERNEL.source[:4])
    assert keep(KERNEL).read_text() == KERNEL.source


def test_processes_may_keep_the_same_kernels_at_once(kernel_folder) -> None:
    kernels = [Kernel("many", f"VALUE = {n}\n" + "#" * 100_000, f"k{n}") for n in range(40)]
    program = (
        "from attnc.codegen.triton.store import Kernel, keep; print(flush=True); input();"
        "[keep(Kernel('many', f'VALUE = {n}\\n' + '#' * 100_000, f'k{n}')) for n in range(40)]"
    )
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    other.stdin.write("go\n")
    other.stdin.flush()
    for kernel in kernels:
        assert keep(kernel).read_text() == kernel.source  # whole, whoever wrote it
    other.communicate(timeout=60)
    assert other.returncode == 0
    assert sorted(p.name for p in kernel_folder.iterdir()) == sorted(f"many_{k.key}.py" for k in kernels)
    assert all(keep(k).read_text() == k.source for k in kernels)


def test_a_second_module_of_a_kernel_is_apart_from_the_first() -> None:
    kernel = Kernel("five", "VALUE = []\n", "k5")
    assert load_apart(kernel, "test") is load_apart(kernel, "test")
    assert load_apart(kernel, "test").VALUE is not load(kernel).VALUE


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch) -> None:
    path = tmp_path / "kernel.py"
    write(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["kernel.py"]


def test_a_cache_that_cannot_be_written_is_left_for_a_temporary_folder(tmp_path, monkeypatch, caplog) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    path = keep(KERNEL)
    assert path.read_text() == KERNEL.source
    assert "cannot keep kernels" in caplog.text
    path.unlink()


def test_only_the_owner_may_read_or_write_a_kept_kernel() -> None:
    assert stat.S_IMODE(keep(KERNEL).stat().st_mode) == 0o600


def test_the_same_kernel_is_imported_once() -> None:
    assert load(Kernel("three", "X = object()\n", "k3")) is load(Kernel("three", "X = object()\n", "k3"))


def test_a_kernel_that_does_not_import_says_where_it_is() -> None:
    with pytest.raises(CodegenError, match=r"cannot import .*four_k4\.py: No module named 'absent_module'"):
        load(Kernel("four", "import absent_module\n", "k4"))
