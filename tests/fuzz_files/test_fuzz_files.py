"""Two hundred broken ONNX files, fixed seeds: each is opened or refused, and nothing else happens."""

from __future__ import annotations

import random
import socket
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from attnc.errors import CheckpointError
from attnc.onnx_file import inspect_onnx
from tests.fuzz_files import child
from tests.fuzz_files.batch import keep, outcomes
from tests.fuzz_files.mutate import MUTATIONS, mutated, parse, written
from tests.fuzz_files.seeds import SECRET, attention, make_folder, seeds
from tests.fuzz_files.watch import trespasses, watched

FILES = 200


def test_broken_files_are_opened_or_refused_and_nothing_else_happens():
    done = list(outcomes(0, FILES))
    failed = [o for o in done if o.verdict == "failed"]
    if failed:
        kept = keep(failed[0], Path("build/fuzz-files"))
        pytest.fail(f"seeds {[o.seed for o in failed]}; the first: {failed[0].why} ({kept})", pytrace=False)
    assert [o.seed for o in done] == list(range(FILES))
    counts = [sum(o.verdict == v for o in done) for v in ("opened", "refused")]
    assert min(counts) > FILES / 10, "files are broken too little or too much to say anything"
    assert sum(counts) == FILES


def test_valid_models_are_opened(tmp_path: Path):
    folder = make_folder(tmp_path)
    for data in seeds():
        (folder / "m.onnx").write_bytes(data)
        assert child.use(folder / "m.onnx") == ""
        onnx.load(folder / "m.onnx")


def test_one_of_the_models_holds_attention_that_inspect_finds(tmp_path: Path):
    folder = make_folder(tmp_path)
    (folder / "m.onnx").write_bytes(attention().SerializeToString())
    (site,) = inspect_onnx(folder / "m.onnx").sites
    assert "softmax" in site.spec


def test_a_seed_gives_the_same_file_and_fields_survive_reading_and_writing():
    models = seeds()
    assert [mutated(i, models) for i in range(50)] == [mutated(i, seeds()) for i in range(50)]
    assert [written(parse(data)) for data in models] == models


def test_every_mutation_changes_some_file():
    models = seeds()
    for change in MUTATIONS:
        tries = [
            change(models[i % len(models)], models, random.Random(i)) != models[i % len(models)]
            for i in range(40)
        ]
        assert any(tries), change.__name__


def test_a_crash_is_a_failure_of_its_seed_and_the_rest_goes_on():
    done = list(outcomes(0, 5, "tests.fuzz_files.crashing"))
    assert [(o.seed, o.verdict) for o in done] == [(i, "failed" if i == 2 else "opened") for i in range(5)]
    assert "the process died: exit code -6" in done[2].why


def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_: object) -> tuple[object, str]:
    monkeypatch.setattr(child, "open_model", open_)
    folder = make_folder(tmp_path)
    (folder / "m.onnx").write_bytes(b"x")
    found = child.judge(folder / "m.onnx", 1)
    return found["verdict"], str(found["why"])


def test_another_error_is_a_failure(monkeypatch, tmp_path: Path):
    def other(path: Path) -> None:
        raise ValueError("oops")

    assert judged(monkeypatch, tmp_path, other) == ("failed", "ValueError: oops")


def test_an_unclear_message_is_a_failure(monkeypatch, tmp_path: Path):
    def unclear(path: Path) -> None:
        raise CheckpointError("no")

    assert judged(monkeypatch, tmp_path, unclear) == ("failed", "an unclear message: no")


def test_a_file_read_outside_is_a_failure(monkeypatch, tmp_path: Path):
    def reading(path: Path) -> None:
        (path.parent.parent / SECRET).read_bytes()
        raise CheckpointError(f"reading {path}: expected nothing")

    verdict, why = judged(monkeypatch, tmp_path, reading)
    assert verdict == "failed"
    assert SECRET in why


def test_much_memory_is_a_failure(monkeypatch, tmp_path: Path):
    if not child.status("VmHWM"):
        pytest.skip("this system does not tell a process its peak of memory")

    def taking(path: Path) -> None:
        np.ones(40 << 20).sum()
        raise CheckpointError(f"reading {path}: expected nothing")

    verdict, why = judged(monkeypatch, tmp_path, taking)
    assert verdict == "failed"
    assert "MiB for 1 bytes" in why


def test_what_a_block_does_outside_is_seen(tmp_path: Path):
    folder = make_folder(tmp_path)
    with watched() as seen:
        (folder / "w.bin").read_bytes()
        assert trespasses(seen, folder) == []
        (folder / "new").write_bytes(b"")
        (folder / "link.bin").read_bytes()
        subprocess.run(["true"], check=True)
        with socket.socket() as s, pytest.raises(OSError, match="refused"):
            s.connect(("127.0.0.1", 1))
    found = {event for event, _ in trespasses(seen, folder)}
    assert found >= {"write open", "open", "subprocess.Popen", "socket.connect"}
