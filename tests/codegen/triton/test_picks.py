from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from attnc.codegen.triton import emit, picks
from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.picks import Place, bucket, place_of
from attnc.codegen.triton.store import load
from attnc.printer import parse

PLACE = Place("sm_90", "a GPU", 1024, 4096)
PICK = Config(64, 128, 4, 3)


def test_a_pick_says_what_it_is_for_and_what_was_measured(corpus, kernel_folder) -> None:
    path = picks.keep(corpus["left_padded"], "forward", PLACE, PICK, pick=1.0, default=1.5)
    assert path.parent == kernel_folder / "picks"
    found = json.loads(path.read_text())
    assert found["ms"] == {"pick": 1.0, "default": 1.5}
    assert found["config"] == [64, 128, 4, 3]
    expected = {
        "arch": "sm_90",
        "device": "a GPU",
        "kind": "forward",
        "dtype": "float16",
        "head_sizes": [32, 32],
    }
    assert expected.items() <= found["key"].items()
    assert found["key"]["mask"] == "(causal & padding(key,valid))"
    assert found["key"]["lengths"] == [1024, 4096]
    assert found["key"]["triton"] == triton.__version__


@pytest.mark.parametrize(
    "place",
    [
        replace(PLACE, arch="sm_80"),
        replace(PLACE, device="another"),
        replace(PLACE, sq=2048),
        replace(PLACE, sk=1),
    ],
    ids=["arch", "device", "sq", "sk"],
)
def test_another_place_has_another_pick(place: Place, corpus) -> None:
    picks.keep(corpus["causal"], "forward", PLACE, PICK)
    assert picks.find(corpus["causal"], "forward", place) is None


def test_another_version_of_triton_or_other_templates_have_other_picks(corpus, monkeypatch) -> None:
    picks.keep(corpus["causal"], "forward", PLACE, PICK)
    with monkeypatch.context() as m:
        m.setattr(triton, "__version__", "0.0.1")
        assert picks.find(corpus["causal"], "forward", PLACE) is None
    with monkeypatch.context() as m:
        m.setattr(picks, "digest", lambda: "another")
        assert picks.find(corpus["causal"], "forward", PLACE) is None
    assert picks.find(corpus["causal"], "forward", PLACE) == PICK


def test_the_digest_is_that_of_every_template_and_of_the_code_that_fills_it(monkeypatch, tmp_path) -> None:
    (tmp_path / "templates").mkdir()
    seen = []
    for text in ("one", "two"):
        (tmp_path / "templates" / "a.py.j2").write_text(text)
        monkeypatch.setattr(picks.resources, "files", lambda name: tmp_path)
        picks.digest.cache_clear()
        seen.append(picks.digest())
    (tmp_path / "holes.py").write_text("")
    picks.digest.cache_clear()
    assert len({*seen, picks.digest()}) == 3
    picks.digest.cache_clear()


def test_numbers_of_a_spec_share_a_pick_and_its_structure_does_not(corpus) -> None:
    spec = corpus["capped_window"]
    picks.keep(spec, "forward", PLACE, PICK)

    def found(old: str, new: str) -> Config | None:
        assert old in str(spec)
        return picks.find(parse(str(spec).replace(old, new)), "forward", PLACE)

    assert found("scale(0.3)", "scale(1e-05)") == PICK
    assert found("left=15", "left=4000") == PICK
    assert found("b,hkv,t,", "x,y,z,") == PICK
    assert found("float32", "float16") is None
    assert found(",32]", ",64]") is None
    assert found("group=2", "group=1") is None
    assert found("softcap(5.0) ", "") is None
    assert found("window(left=15,right=0)", "causal") is None
    assert found("fill(add,-3.4028234663852886e+38)", "fill(replace,-inf)") is None
    assert picks.find(spec, "decode", PLACE) is None


BROKEN = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1, 2]",
    "another key": lambda text: text.replace("a GPU", "my GPU"),
    "three numbers": lambda text: json.dumps({**json.loads(text), "config": [64, 64, 4]}),
    "words": lambda text: json.dumps({**json.loads(text), "config": [64, 64, 4, "two"]}),
    "too many stages": lambda text: json.dumps({**json.loads(text), "config": [64, 64, 4, 0]}),
    "no config": lambda text: json.dumps({"key": json.loads(text)["key"]}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_counts_as_none_and_is_written_anew(how: str, corpus, caplog) -> None:
    path = picks.keep(corpus["causal"], "forward", PLACE, PICK)
    path.write_text(BROKEN[how](path.read_text()))
    assert picks.find(corpus["causal"], "forward", PLACE) is None
    assert "expected a pick of attnc" in caplog.text
    assert picks.keep(corpus["causal"], "forward", PLACE, PICK) == path
    assert picks.find(corpus["causal"], "forward", PLACE) == PICK


def test_a_folder_that_cannot_be_written_keeps_no_pick_and_says_so(
    tmp_path, monkeypatch, corpus, caplog
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert picks.keep(corpus["causal"], "forward", PLACE, PICK) is None
    assert "cannot keep picks" in caplog.text
    assert picks.find(corpus["causal"], "forward", PLACE) is None


def test_another_process_finds_the_pick_and_may_write_its_own_meanwhile(corpus) -> None:
    spec = corpus["causal"]
    picks.keep(spec, "forward", PLACE, PICK)
    program = (
        "from attnc.codegen.triton import picks; from attnc.printer import parse;"
        f"spec, place = parse({str(spec)!r}), picks.{PLACE!r};"
        "print(picks.find(spec, 'forward', place), flush=True);"
        "[picks.keep(spec, 'forward', place, picks.Config(64, 32, 4, 3)) for _ in range(100)]"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == str(PICK)
    seen = set()
    while other.poll() is None:
        picks.keep(spec, "forward", PLACE, PICK)
        seen.add(picks.find(spec, "forward", PLACE))
    other.stdout.close()
    assert other.returncode == 0
    assert seen <= {PICK, Config(64, 32, 4, 3)}  # never a part of one, which would be None
    assert [p.suffix for p in picks.folder().iterdir()] == [".json"]


def test_lengths_up_to_a_power_of_two_are_taken_as_one() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 64, 65, 4096, 4097)] == [1, 1, 2, 4, 64, 128, 4096, 8192]
    q, k = torch.empty(1, 1, 100, 8), torch.empty(1, 1, 3, 8)
    assert place_of(q, k) == Place("interpreter", "cpu", 128, 4)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_the_place_is_what_the_emitted_file_takes_its_tiles_by(capability, corpus, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    q = SimpleNamespace(device=torch.device("cuda", sum(capability)), shape=(1, 1, 1, 1))
    assert place_of(q, q).arch == load(emit(corpus["plain"]))._arch(q)
