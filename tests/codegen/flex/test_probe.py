from __future__ import annotations

import json

import pytest
import torch

from attnc.codegen.flex import probe


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Count how often the compiler is tried; nothing is compiled."""
    calls: list[str] = []

    def answer(device: str) -> str:
        calls.append(device)
        return "no compiler"

    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(probe, "_try", answer)
    probe.why_not.cache_clear()
    yield calls
    probe.why_not.cache_clear()


def test_the_compiler_is_tried_once_per_machine(asked, tmp_path):
    assert [probe.why_not("cpu") for _ in range(3)] == ["no compiler"] * 3
    probe.why_not.cache_clear()  # as another process would
    assert probe.why_not("cpu") == "no compiler"
    assert asked == ["cpu"]
    assert [f.name for f in tmp_path.iterdir()] == ["flex.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "null"])
def test_a_damaged_file_is_asked_anew(text, asked, tmp_path):
    (tmp_path / "flex.json").write_text(text)
    assert probe.why_not("cpu") == "no compiler"
    assert asked == ["cpu"]
    assert list(json.loads((tmp_path / "flex.json").read_text()).values()) == ["no compiler"]


@pytest.mark.parametrize("change", ["compiler", "torch"])
def test_another_compiler_or_torch_is_another_question(change, asked, monkeypatch):
    probe.why_not("cpu")
    probe.why_not.cache_clear()
    if change == "compiler":
        monkeypatch.setenv("CXX", "/nowhere/c++")
    else:
        monkeypatch.setattr(torch, "__version__", "9.9")
    probe.why_not("cpu")
    assert asked == ["cpu", "cpu"]


def test_a_folder_that_cannot_be_written_is_told(asked, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file"))
    assert probe.why_not("cpu") == "no compiler"
    assert "cannot keep" in caplog.text


def test_what_is_switched_off_is_not_remembered(asked, monkeypatch, tmp_path):
    with torch._dynamo.config.patch(disable=True):
        assert "TORCHDYNAMO_DISABLE" in probe.why_not("cpu")
    assert "not on tpu" in probe.why_not("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in probe.why_not("cuda")
    assert not asked
    assert not list(tmp_path.iterdir())


def test_caches_lie_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert probe.folder() == tmp_path / "attnc"
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "own"))
    assert probe.folder() == tmp_path / "own"


def test_a_missing_compiler_is_found_out(monkeypatch):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    with fresh_cache(), config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        why = probe._try("cpu")
    assert why.startswith("FlexAttention does not compile for cpu: ")
