"""A model and its weights are put in place whole: whoever kills the process, whatever lies there before."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from attnc.codegen.onnx import placing
from attnc.codegen.onnx.opening.files import open_model
from attnc.errors import CodegenError
from tests.codegen.onnx.hostile import Node, graph, model

NAMES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def filled(number: float, marks: int = 1) -> ir.Model:
    """Return a model whose weight of 256 numbers holds ``number``, with that many nodes."""
    nodes = [Node("Add", ["x", "w"], ["t0"]), *(Node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(marks))]
    weight = helper.make_tensor("w", 1, [256], np.full(256, number, np.float32).tobytes(), raw=True)
    return ir.from_proto(model(graph(nodes, outputs=(f"t{marks}",), initializers=[weight])))


def write(path: Path, what: ir.Model, external: bool = True, force: bool = False) -> tuple[Path, ...]:
    old = placing.check_free(path, force)
    with placing.Sibling(path) as folder:
        placing.save(what, folder / path.name, external)
        return placing.place(folder, path, old, force)


def held(path: Path) -> tuple[int, float]:
    """Return the number of nodes and the one value of the weights at ``path``."""
    found = open_model(path)
    numbers = found.graph.initializers["w"].const_value.numpy()
    assert (numbers == numbers[0]).all()
    return len(list(found.graph)), float(numbers[0])


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_weights_are_named_by_their_bytes_and_old_ones_go(tmp_path: Path):
    path = tmp_path / "m.onnx"
    first = write(path, filled(1.0))
    assert [f.name for f in first] == listing(tmp_path)
    second = write(path, filled(2.0), force=True)
    assert [f.name for f in second] == listing(tmp_path)
    assert first[1] != second[1]
    assert held(path) == (2, 2.0)
    write(path, filled(2.0), external=False, force=True)
    assert listing(tmp_path) == ["m.onnx"]


def test_the_same_model_gives_the_same_names_and_bytes(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "m.onnx", filled(1.0))
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    for name in listing(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_weights_that_stay_are_not_removed(tmp_path: Path):
    path = tmp_path / "m.onnx"
    write(path, filled(1.0))
    write(path, filled(1.0, marks=2), force=True)
    assert held(path) == (3, 1.0)
    assert len(listing(tmp_path)) == 2


def test_files_of_others_stay(tmp_path: Path):
    names = ["m.onnx.data", "other.onnx", f"n.onnx.{'0' * 16}.data", f"m.onnx.{'g' * 16}.data"]
    for name in names:
        (tmp_path / name).write_bytes(b"theirs")
    write(tmp_path / "m.onnx", filled(1.0))
    write(tmp_path / "m.onnx", filled(2.0), external=False, force=True)
    assert listing(tmp_path) == sorted([*names, "m.onnx"])


@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "folder", "pipe"])
def test_a_destination_that_is_no_plain_file_is_refused(kind: str, tmp_path: Path):
    folder, other = tmp_path / "out", tmp_path / "other"
    folder.mkdir()
    other.write_bytes(b"theirs")
    path = folder / "m.onnx"
    if kind == "link":
        path.symlink_to(other)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "hard":
        os.link(other, path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    words = {"hard": "2 names of the same file", "folder": "a folder", "pipe": "a pipe"}.get(
        kind, "a symbolic link"
    )
    with pytest.raises(CodegenError, match=f"expected a plain file to replace, {path} .*{words}"):
        write(path, filled(1.0), force=True)
    assert listing(folder) == ["m.onnx"]
    assert listing(tmp_path) == ["other", "out"]
    assert other.read_bytes() == b"theirs"


def test_weights_do_not_go_through_a_link(tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    (weights,) = (f.name for f in write(folder / "m.onnx", filled(1.0)) if f.name != "m.onnx")
    for name in listing(folder):
        (folder / name).unlink()
    (folder / weights).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CodegenError, match="symbolic link"):
        write(folder / "m.onnx", filled(1.0))
    assert listing(folder) == [weights]
    assert listing(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path):
    path = tmp_path / "m.onnx"
    old = placing.check_free(path, False)
    with placing.Sibling(path) as folder:
        placing.save(filled(1.0), folder / path.name, False)
        path.write_bytes(b"theirs")
        with pytest.raises(CodegenError, match="appeared while the model was made"):
            placing.place(folder, path, old, False)
    assert path.read_bytes() == b"theirs"
    assert listing(tmp_path) == ["m.onnx"]


def killed_at(step: int, path: Path) -> bool:
    """Write new over old in a process, killed before its ``step``-th touch of a file; say whether it was."""
    child = os.fork()
    if not child:
        count = [0]

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event in NAMES:
                count[0] += 1
                if count[0] > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            write(path, filled(2.0, marks=2), force=True)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder / "m.onnx", filled(1.0))
    return folder / "m.onnx"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")
def test_killed_before_any_touch_of_a_file_the_path_holds_old_or_new(steps: Path):
    """Every step of the write: the old model has its old weights, the new its new ones."""
    found = []
    for step in range(200):
        killed = killed_at(step, steps)
        found.append(held(steps))
        if not killed:
            break
        write(steps, filled(1.0), force=True)
    assert not killed
    assert len(found) > 8
    at = found.index((3, 2.0))
    assert found == [(2, 1.0)] * at + [(3, 2.0)] * (len(found) - at)
    assert 0 < at < len(found) - 1, (
        "the new model is in place before the last step, which removes the old weights"
    )
    kept = [n for n in listing(steps.parent) if not n.startswith(".")]
    assert len(kept) == 2, "what killed processes left was removed by the next"


def kill_at_random(path: Path, times: int) -> set[tuple[int, float]]:
    """Kill a process that writes one model over the other for ever; return what the path held afterwards."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(times):
        child = os.fork()
        if not child:
            try:
                while True:
                    for number in (1.0, 2.0):
                        write(path, filled(number, marks=int(number)), force=True)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        seen.add(held(path))
    return seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")
def test_killed_at_a_random_moment_the_path_holds_old_or_new(steps: Path):
    assert kill_at_random(steps, 5) <= {(2, 1.0), (3, 2.0)}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")
def test_killed_at_many_random_moments_the_path_holds_old_or_new(steps: Path):
    assert kill_at_random(steps, 300) == {(2, 1.0), (3, 2.0)}
