"""Optimized models are saved and loaded again; a stand-in for the pipeline only reports sites."""

from __future__ import annotations

import copy
import errno
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnc import tensor_files
from attnc.checkpoint import Opened, load, open_model, rewritten_forms, save, verify_files
from attnc.codegen.int8 import W8A8Linear, quantize_modules
from attnc.errors import CheckpointError
from attnc.manifest import Manifest, read_manifest
from attnc.passes.rewrite.forms import parse_forms
from attnc.passes.rewrite.sparse.sliding_window import SlidingWindow
from attnc.report.report import Report, SiteRecord
from attnc.tensor_files import read_checkpoint, stream_tensors

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip
SPEC = (
    "attn q=bhqd[2,2,s{0},8]:float32 k=bhkd[2,2,s{0},8]:float32 v=bhke[2,2,s{0},8]:float32 "
    "group=1 mask=none softmax"
)


@dataclass
class Session:
    plan: dict[str, Any]
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    report: Report
    programs: list[Any] = field(default_factory=list)
    quantized: tuple[str, ...] = ()
    source: Opened | None = None
    dynamic_shapes: Any = "auto"


class Api(types.ModuleType):
    """Stand in for attnc.api: one rewritten site per attention layer; remembers how it was called."""

    def __init__(self) -> None:
        super().__init__("attnc.api")
        self.calls: list[dict[str, Any]] = []
        self.symbol = 77
        self.skip: set[str] = set()

    def parse_forms(self, forms: Any) -> Any:
        return parse_forms(forms)

    def session(self, fast: nn.Module) -> Session:
        return fast.__dict__["_session"]

    def optimize(self, model: Any, args: Any = (), kwargs: Any = None, **options: Any) -> nn.Module:
        self.calls.append({"args": args, "kwargs": kwargs, **options})
        fast = copy.deepcopy(model)
        names = [n for n, m in model.named_modules() if n.endswith("attention.self") and n not in self.skip]
        self.symbol += 1
        spec = SPEC.format(self.symbol)
        sites = [
            SiteRecord(
                n,
                n,
                "/home/me/m.py:3",
                spec,
                "none",
                "fused",
                "sdpa",
                "SAME",
                "rewritten",
                error=1e-7,
            )
            for n in names
        ]
        for record in sites:
            record.details = {"seconds": 0.5}
        plan = {"encoder.layer.1.*": [{"form": "sliding_window", "window": 8}], "*": [{"form": "fused"}]}
        fast.__dict__["report"] = report = Report("0.1.0", type(model).__name__, "cpu", sites)
        fast.__dict__["_session"] = Session(plan, "cpu", tuple(args), dict(kwargs or {}), report)
        return fast


@pytest.fixture
def api(monkeypatch) -> Api:
    made = Api()
    monkeypatch.setitem(sys.modules, "attnc.api", made)
    return made


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Save a small BERT with a tokenizer file, code and a pickle beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "model"
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / ".hidden").write_text("x")
    return folder


def optimized(api: Api, opened: Opened | Path) -> nn.Module:
    opened = open_model(opened) if isinstance(opened, Path) else opened
    fast = api.optimize(opened.model, opened.args, opened.kwargs)
    api.session(fast).source = opened
    return fast


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def outputs(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs)[0]


def test_saved_folder_holds_config_tokenizer_weights_and_manifest_and_nothing_else(api, source, tmp_path):
    save(optimized(api, source), tmp_path / "out")
    made, given = files_of(tmp_path / "out"), files_of(source)
    assert set(made) == {
        "config.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "model.safetensors",
        "attnc.json",
    }
    assert all(made[name] == given[name] for name in ("config.json", "vocab.txt", "model.safetensors"))


def test_manifest_lists_versions_certificates_recipe_and_hashes(api, source, tmp_path):
    fast = optimized(api, source)
    save(fast, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "attnc.json").read_text())
    assert {"attnc", "torch", "transformers", "safetensors"} <= values["versions"].keys()
    assert [s["module"] for s in values["sites"]] == [
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    ]
    assert values["sites"][0]["error"] == 1e-7
    assert [row["sites"] for row in values["plan"]] == ["encoder.layer.1.*", "*"]
    assert set(values["files"]) == {"config.json", "vocab.txt", "1_Pooling/config.json", "model.safetensors"}
    text = json.dumps(values)
    assert "/home/me" not in text
    assert "seconds" not in text
    ids = dict(values["inputs"]["kwargs"]["dict"])["input_ids"]["tensor"]
    assert ids["shape"] == list(fast.__dict__["_session"].kwargs["input_ids"].shape)


def test_same_model_gives_the_same_bytes(api, source, tmp_path):
    save(optimized(api, source), tmp_path / "one")
    api.symbol = 77
    save(optimized(api, source), tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_loaded_model_equals_the_saved_one_and_makes_only_the_rewrites_of_the_manifest(api, source, tmp_path):
    fast = optimized(api, source)
    save(fast, tmp_path / "out")
    api.calls.clear()
    loaded = load(tmp_path / "out")
    assert type(loaded) is transformers.BertModel
    kwargs = fast.__dict__["_session"].kwargs
    assert torch.equal(outputs(loaded, kwargs), outputs(fast, kwargs))
    call = api.calls[0]
    assert call["forms"] == parse_forms(
        {"encoder.layer.0.attention.self": "fused", "encoder.layer.1.attention.self": SlidingWindow(window=8)}
    )
    assert call["dynamic_shapes"] == "auto"
    assert (call["verify"], call["cost_model"], call["target"]) == (False, False, "cpu")
    assert call["kwargs"]["attention_mask"].equal(kwargs["attention_mask"])
    assert loaded.report.sites[0].error == 1e-7
    save(loaded, tmp_path / "again")
    assert files_of(tmp_path / "again").keys() == files_of(tmp_path / "out").keys()


def test_other_programs_load_the_saved_folder_too(api, source, tmp_path):
    fast = optimized(api, source)
    save(fast, tmp_path / "out", shard_bytes=4000)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(theirs.state_dict()[k], v) for k, v in fast.state_dict().items())


def test_a_site_that_is_lost_or_new_is_an_error(api, source, tmp_path):
    save(optimized(api, source), tmp_path / "out")
    api.skip = {"encoder.layer.1.attention.self"}
    with pytest.raises(
        CheckpointError,
        match=r"expected the 2 sites.*encoder.layer.1.attention.self .* was not found.*attnc 0",
    ):
        load(tmp_path / "out")
    save(optimized(api, source), tmp_path / "fewer")
    api.skip = set()
    with pytest.raises(CheckpointError, match=r"expected the 1 sites.*encoder.layer.1.* is new"):
        load(tmp_path / "fewer")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt"])
def test_changed_and_missing_files_are_named(api, source, tmp_path, name):
    save(optimized(api, source), tmp_path / "out")
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} has changed"):
        load(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_files(tmp_path / "out")


def test_folders_that_attnc_did_not_save(api, source, tmp_path):
    with pytest.raises(CheckpointError, match=r"found no attnc.json"):
        load(source)
    save(optimized(api, source), tmp_path / "out")
    path = tmp_path / "out" / "attnc.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(CheckpointError, match="expected format 1, found 99"):
        load(tmp_path / "out")
    del values["sites"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="a difference in sites"):
        load(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="expected a JSON file"):
        load(tmp_path / "out")


def test_output_is_never_the_input_and_needs_force_where_it_exists(api, source, tmp_path):
    fast = optimized(api, source)
    for path in (source, source / "out"):
        with pytest.raises(CheckpointError, match="apart from the input"):
            save(fast, path, force=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save(fast, tmp_path / "out")
    save(fast, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "attnc.json").is_file()


def test_old_output_is_intact_when_the_disk_is_full_in_the_middle_of_the_weights(
    api, source, tmp_path, monkeypatch
):
    fast = optimized(api, source)
    save(fast, tmp_path / "out")
    before = files_of(tmp_path / "out")

    def full(f: Any, _: object) -> None:
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "_write_shard", full)
    with pytest.raises(CheckpointError, match="the disk is full; the old output is unchanged"):
        save(fast, tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_quantized_layers_are_stored_as_integers_and_load_back(api, source, tmp_path):
    opened = open_model(source)
    names = [n for n, m in opened.model.named_modules() if isinstance(m, nn.Linear) and "attention" in n]
    quantize_modules(opened.model, names)
    fast = optimized(api, opened)
    fast.__dict__["_session"].quantized = tuple(names)
    save(fast, tmp_path / "out")
    entries = read_checkpoint(tmp_path / "out")
    assert all(entries[f"{n}.weight"].dtype == "I8" for n in names)
    assert all(entries[f"{n}.weight_scale"].dtype == "F32" for n in names)
    assert read_manifest(tmp_path / "out").quantized == sorted(names)
    loaded = load(tmp_path / "out")
    assert all(isinstance(loaded.get_submodule(n), W8A8Linear) for n in names)
    assert torch.equal(outputs(loaded, opened.kwargs), outputs(fast, opened.kwargs))


def test_other_programs_do_not_take_integers_for_weights(api, source, tmp_path):
    opened = open_model(source)
    quantize_modules(opened.model, ["pooler.dense"])
    fast = optimized(api, opened)
    fast.__dict__["_session"].quantized = ("pooler.dense",)
    save(fast, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert "pooler.dense" not in config["ignore"]
    assert "encoder.layer.0.output.dense" in config["ignore"]
    with pytest.raises(CheckpointError, match="not quantized"):
        open_model(tmp_path / "out")


def test_tied_weights_are_stored_once_and_are_tied_again(api, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).eval()
    kwargs = {"input_ids": torch.randint(1, 99, (2, 7))}
    fast = api.optimize(model, (), kwargs)
    save(fast, tmp_path / "out")
    assert "cls.predictions.decoder.weight" not in read_checkpoint(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(outputs(loaded, kwargs), outputs(model, kwargs))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    quantize_modules(fast, ["bert.encoder.layer.0.output.dense"])
    fast.__dict__["_session"].quantized = ("bert.encoder.layer.0.output.dense",)
    save(fast, tmp_path / "int8")
    loaded = load(tmp_path / "int8")
    assert torch.equal(outputs(loaded, kwargs), outputs(fast, kwargs))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_names_that_transformers_changes_on_loading_are_changed_back(api, tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, vocab_size=50, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    kwargs = {"input_ids": torch.randint(1, 50, (2, 7)), "use_cache": False}
    save(api.optimize(model, (), kwargs), tmp_path / "out")
    assert any("block_sparse_moe.experts.0.w1" in name for name in read_checkpoint(tmp_path / "out"))
    loaded = load(tmp_path / "out")
    assert torch.equal(outputs(loaded, kwargs), outputs(model, kwargs))


def test_attention_code_of_the_original_is_kept(api, source, tmp_path):
    fast = optimized(api, open_model(source, "eager"))
    save(fast, tmp_path / "out")
    assert load(tmp_path / "out").config._attn_implementation == "eager"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, scale: float = 1.0
    ) -> dict[str, torch.Tensor]:
        y = self.lin(x) * scale
        return {"y": y if bias is None else y + bias}


def test_any_other_model_is_saved_as_its_program(api, tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 4)
    fast = api.optimize(model, (x,), {"bias": x})
    fast.__dict__["_session"].programs = [torch.export.export(model, (x,), {"bias": x}, strict=False)]
    save(fast, tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == {"program.pt2", "attnc.json"}
    loaded = load(tmp_path / "out")
    for got in (loaded(x, x), loaded(x, bias=x), loaded(bias=x, x=x)):
        assert torch.equal(got["y"], model(x, x)["y"])
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert loaded.report.model == "Net"


def test_a_model_that_was_never_captured_cannot_be_saved(api, tmp_path):
    fast = api.optimize(Net(), (torch.ones(2, 4),))
    with pytest.raises(CheckpointError, match=r"found none; call attnc\.optimize"):
        save(fast, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_plan_is_restricted_to_rewritten_sites_and_holds_no_quantizers(api):
    plan = [
        {"sites": "a.*", "forms": [{"form": "fused"}, {"form": "w8a8"}]},
        {"sites": "*", "forms": [{"form": "w8a8"}, {"form": "sliding_window", "window": 4}]},
    ]
    sites = [
        SiteRecord(i, i, "", "", "", "fused", "sdpa", "SAME", status).to_dict()
        for i, status in (("a.x", "rewritten"), ("b.x", "rewritten"), ("b.x.y", "kept"), ("c", "missed"))
    ]
    manifest = Manifest("hf", "BertModel", "cpu", plan, {}, sites=sites)
    forms = rewritten_forms(manifest)
    assert forms.rules == (
        *parse_forms({"a.x": "fused", "b.x": SlidingWindow(window=4)}).rules,
        ("b.x.y", ()),
    )
    assert forms.at("b.x.y") == forms.at("c") == ()
    manifest.sites = sites[2:]
    assert rewritten_forms(manifest).rules == ()
    manifest.plan = [{"sites": "*", "forms": [{"form": "of_the_future"}]}]
    with pytest.raises(CheckpointError, match="expected a plan that attnc wrote"):
        rewritten_forms(manifest)


def test_tensors_of_any_kind_keep_their_bytes(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "b": torch.randn(3, 4).bfloat16(), "a": torch.arange(6, dtype=torch.int8), "t": torch.randn(4, 4),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "flag": torch.ones(5, dtype=torch.bool),
    }  # fmt: skip
    tensor_files.write_tensors(tmp_path, tensors | {"t": tensors["t"].t()})
    back = dict(stream_tensors(read_checkpoint(tmp_path)))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) for k, v in (tensors | {"t": tensors["t"].t()}).items())
    save_file(
        tensors | {"t": tensors["t"].t().contiguous()},
        tmp_path / "theirs.safetensors",
        metadata={"format": "pt"},
    )
    theirs = tensor_files.read_header(tmp_path / "theirs.safetensors")
    assert {k: (e.dtype, e.shape) for k, e in theirs.items()} == {
        k: (e.dtype, e.shape) for k, e in read_checkpoint(tmp_path).items()
    }
