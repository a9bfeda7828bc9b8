"""Models go through the whole compiler, are saved, and load again with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnc import api
from attnc.checkpoint import load, open_model, save
from attnc.cli_work import Subject, compare
from attnc.codegen.int8 import W8A8Linear
from attnc.manifest import read_manifest
from attnc.tensor_files import read_checkpoint

transformers = pytest.importorskip("transformers")


def small_bert(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=99,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """Save a BERT of one small layer once."""
    return small_bert(tmp_path_factory.mktemp("real") / "model", layers=1)


def optimized(path: Path | str, forms: Any = "fused") -> nn.Module:
    opened = open_model(path, "eager")
    # Sites are checked in tests/test_verify.py; here all that can be is rewritten, whatever it gains.
    fast = api.optimize(opened.model, opened.args, opened.kwargs, forms=forms, verify=False, cost_model=False)
    api.session(fast).source = opened
    return fast


def run(model: nn.Module, fast: nn.Module) -> Any:
    state = api.session(fast)
    with torch.no_grad():
        return model(*state.args, **state.kwargs)


@pytest.mark.parametrize("form", ["fused", "sliding_window(window=8)", "s2(block=4, local=1, vertical=2)"])
def test_rewritten_checkpoint_loads_with_equal_outputs(bert, tmp_path, form):
    fast = optimized(bert, form)
    assert fast.report.counts()["rewritten"] == 1
    save(fast, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded) is transformers.BertModel
    assert [s.id for s in loaded.report.sites] == [s.id for s in fast.report.sites]
    assert {s.form for s in loaded.report.sites} == {form.partition("(")[0]}
    wanted, got = run(fast, fast), run(loaded, fast)
    assert type(got) is type(wanted)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)
    # The rewrite is there in the loaded model, too: other inputs give what the optimized model gives.
    ids = torch.randint(1, 99, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids, torch.ones_like(ids))[0], fast(ids, torch.ones_like(ids))[0])
    save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    again, once = read_manifest(tmp_path / "again"), read_manifest(tmp_path / "out")
    assert [s["spec"] for s in again.sites] == [s["spec"] for s in once.sites]


def test_only_the_sites_of_the_plan_are_rewritten_after_loading(tmp_path):
    fast = optimized(small_bert(tmp_path / "model", layers=2), {"encoder.layer.1.*": "fused"})
    assert fast.report.counts() == {"rewritten": 1, "kept": 1, "missed": 0}
    save(fast, tmp_path / "out")
    assert load(tmp_path / "out").report.counts() == {"rewritten": 1, "kept": 1, "missed": 0}


def test_quantized_checkpoint_loads_with_equal_outputs(bert, tmp_path):
    fast = optimized(bert, "w8a8")
    save(fast, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    entries = read_checkpoint(tmp_path / "out")
    assert manifest.quantized
    assert all(entries[f"{n}.weight"].dtype == "I8" for n in manifest.quantized)
    loaded = load(tmp_path / "out")
    assert sum(isinstance(m, W8A8Linear) for m in loaded.modules()) == len(manifest.quantized)
    assert torch.equal(run(loaded, fast)[0], run(fast, fast)[0])
    save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert read_manifest(tmp_path / "again").quantized == manifest.quantized


SOURCE = """
import math
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
    def forward(self, x, bias=None, *, gain=1.0):
        b, n, d = x.shape
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        w = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(hidden, -math.inf).softmax(-1)
        y = self.out((w @ v).transpose(1, 2).reshape(b, n, d))
        return {"y": y * gain if bias is None else y * gain + bias}

def build():
    return Net(), (torch.randn(2, 19, 16),)
"""


@pytest.fixture
def script(tmp_path) -> str:
    """Write a file with a causal attention layer and a callable that builds it."""
    (tmp_path / "saved_net.py").write_text(SOURCE)
    return f"{tmp_path / 'saved_net.py'}:build"


def test_any_model_loads_as_a_program_with_its_signature_and_output_type(script, tmp_path):
    fast = optimized(script)
    assert fast.report.counts()["rewritten"] == 1
    save(fast, tmp_path / "out")
    loaded = load(tmp_path / "out")
    x = api.session(fast).args[0]
    with torch.no_grad():
        assert torch.equal(loaded(x)["y"], fast(x)["y"])
        assert torch.equal(loaded(x=x)["y"], fast(x)["y"])
        # Sizes that were free at capture are free after loading.
        assert torch.allclose(loaded(x[:, :7])["y"], fast(x[:, :7])["y"], atol=1e-6)
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert str(tmp_path).encode() not in (tmp_path / "out" / "program.pt2").read_bytes()


def test_a_program_goes_in_and_comes_out(script, tmp_path):
    opened = open_model(script)
    torch.export.save(torch.export.export(opened.model, opened.args, strict=False), tmp_path / "given.pt2")
    fast = optimized(tmp_path / "given.pt2")
    assert fast.report.counts()["rewritten"] == 1
    save(fast, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert next(iter(loaded.__signature__.parameters)) == "x"
    before = Subject("given", opened.model, opened.args, {}, opened)
    found = compare(before, Subject("loaded", loaded, opened.args, {}))
    assert found.limit is not None
    assert found.within, found
