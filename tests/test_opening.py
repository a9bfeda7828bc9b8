"""Models open from folders, programs and files of Python; what is broken or refused is one clear error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from attnc.errors import CheckpointError
from attnc.opening import open_model
from attnc.program_file import LoadedProgram, load_program, save_program, signature_of
from attnc.tensor_files import read_checkpoint, read_header, stream_tensors, write_tensors

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """Save a small BERT once: config.json and model.safetensors."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert") / "model"
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(bert, tmp_path) -> Path:
    """Give a copy of the small BERT that a test may break."""
    return Path(shutil.copytree(bert, tmp_path / "model"))


def refuses(path: Path | str, *words: str, **kw) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(path, **kw)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


# Hugging Face folders


def test_real_checkpoint_opens_with_inputs_that_show_padding(minilm_dir):
    opened = open_model(minilm_dir, "eager")
    assert type(opened.model) is transformers.BertModel
    assert (opened.kind, opened.tokenizer_dir, opened.path) == ("hf", minilm_dir, minilm_dir)
    assert opened.config._attn_implementation == "eager"
    assert not opened.model.training
    ids, mask = opened.kwargs["input_ids"], opened.kwargs["attention_mask"]
    sizes = {v for v in opened.config.to_dict().values() if isinstance(v, int)}
    assert ids.shape == mask.shape == (2, ids.shape[1])
    assert ids.shape[1] not in sizes
    assert 0 < int(mask[1].sum()) < int(mask[0].sum()) == ids.shape[1]
    again = open_model(minilm_dir)
    assert torch.equal(again.kwargs["input_ids"], ids)
    with torch.no_grad():
        assert opened.model(**opened.kwargs).last_hidden_state.shape == (*ids.shape, 384)


def test_shards_open_as_one_file_does(copied):
    entries = read_checkpoint(copied)
    whole = dict(stream_tensors(entries))
    (copied / "model.safetensors").unlink()
    write_tensors(copied, whole, shard_bytes=4000)
    assert len(list(copied.glob("model-*-of-*.safetensors"))) > 2
    state = open_model(copied).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_folder_without_config(copied):
    (copied / "config.json").unlink()
    refuses(copied, "expected a config.json", "found none")
    shutil.copytree(copied, copied / "0_Transformer")
    (copied / "0_Transformer" / "config.json").write_text("{}")
    refuses(copied, "a model lies below it")


def test_folder_without_weights(copied):
    (copied / "model.safetensors").unlink()
    refuses(copied, "expected weights in model.safetensors", "found neither")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_way_to_convert_them(copied, name):
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(pickle.dumps({"w": 1}))
    refuses(copied, name, "refuses them", "safetensors.torch.save_file", "weights_only=True")
    refuses(copied / name, "refuses them", "safetensors.torch.save_file")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_weights(copied, keep):
    path = copied / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refuses(copied, "model.safetensors", "truncated" if keep else "expected a header")


def edit_header(path: Path, edit: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


NAME = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda h: h[NAME].update(data_offsets=[0, 10**12]), ("inside", "bytes of data")),
        (lambda h: h[NAME].update(data_offsets=[-4, 8]), ("offsets >= 0",)),
        (lambda h: h[NAME].update(data_offsets=[8, 4]), ("inside",)),
        (lambda h: h[NAME].update(shape=[3, 3]), ("expected 36 bytes for F32 [3, 3]",)),
        (lambda h: h[NAME].update(shape=[99.0, 16]), ("offsets >= 0",)),
        (lambda h: h[NAME].update(dtype="F31"), ("found 'F31'",)),
        (lambda h: h[NAME].pop("dtype"), ("expected dtype, shape and data_offsets",)),
        (lambda h: h.update({NAME: [1, 2]}), ("expected dtype, shape and data_offsets",)),
    ],
)
def test_header_that_lies_names_file_and_tensor(copied, edit, words):
    edit_header(copied / "model.safetensors", edit)
    refuses(copied, "model.safetensors", repr(NAME), *words)


def test_header_with_an_overlap_or_a_hole(tmp_path):
    write_tensors(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    path = tmp_path / "model.safetensors"
    edit_header(path, lambda h: h["b"].update(data_offsets=[12, 28]))
    with pytest.raises(CheckpointError, match="'b': expected it to begin at byte 16 of the data, found 12"):
        read_header(path)
    edit_header(path, lambda h: h.pop("b"))
    with pytest.raises(CheckpointError, match="expected 16 bytes of data, found 32"):
        read_header(path)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 64, b"\x10" + b"\0" * 7 + b"[1, 2, 3]       ", b"\x04" + b"\0" * 7 + b"{{{{"]
)
def test_corrupt_header(copied, garbage):
    (copied / "model.safetensors").write_bytes(garbage)
    refuses(copied, "reading", "model.safetensors")


def test_missing_and_misshapen_tensors_are_named(copied):
    tensors = dict(stream_tensors(read_checkpoint(copied)))
    (copied / "model.safetensors").unlink()
    short = {k: v for k, v in tensors.items() if k != NAME}
    write_tensors(copied, short)
    refuses(copied, f"expected the tensor {NAME!r} for BertModel, found none")
    (copied / "model.safetensors").unlink()
    write_tensors(copied, {**short, NAME: torch.zeros(98, 16)})
    refuses(copied, "model.safetensors", repr(NAME), "expects shape [99, 16], found [98, 16]")


def test_broken_indexes(copied):
    tensors = dict(stream_tensors(read_checkpoint(copied)))
    (copied / "model.safetensors").unlink()
    write_tensors(copied, tensors, shard_bytes=4000)
    index = copied / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    last = sorted(set(good["weight_map"].values()))[-1]
    for change, words in (
        ({NAME: "../model.safetensors"}, ("names of files beside it",)),
        ({NAME: "model-9.safetensors"}, ("lists the shard model-9.safetensors",)),
        ({"no.such": last}, (last, "expected the tensor 'no.such'")),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        refuses(copied, *words)
    index.write_text("{")
    refuses(copied, "index.json", "expected a JSON file")


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": None}, ("expected architectures", "found None")),
        ({"architectures": ["NoSuchModel"]}, ("NoSuchModel", "no such model class")),
        ({"architectures": ["AutoTokenizer"]}, ("AutoTokenizer", "no such model class")),
        ({"num_attention_heads": 3}, ("BertModel could not be built",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("not quantized",)),
        (
            {"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}},
            ("never runs", "file.py:callable"),
        ),
    ],
)
def test_configs_that_cannot_be_used(copied, changes, words):
    rewrite_config(copied, **changes)
    (copied / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    refuses(copied, "config.json" if "num_attention_heads" not in changes else "opening", *words)


def test_code_in_a_checkpoint_is_ignored_where_transformers_has_the_class(copied):
    rewrite_config(copied, auto_map={"AutoModel": "evil.Evil"})
    (copied / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    opened = open_model(copied)
    assert "auto_map" in opened.warnings[0]
    assert type(opened.model) is transformers.BertModel


def test_config_that_is_no_json(copied):
    (copied / "config.json").write_text("{not json")
    refuses(copied, "config.json", "expected a JSON file")


def test_paths_that_are_no_model(tmp_path):
    refuses(tmp_path / "nowhere", "found nothing at that path")
    (tmp_path / "x.txt").write_text("x")
    refuses(tmp_path / "x.txt", "found a .txt file")
    (tmp_path / "m.py").write_text("x = 1")
    refuses(tmp_path / "m.py", "file.py:build")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "expected a config.json")


# Python files

SOURCE = """
import torch
from torch import nn
from helper import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, mask=None, *, scale=1.0):
        y = self.drop(self.lin(x))
        return {"y": y * scale if mask is None else y * mask * scale}

model = Net()
def alone(): return Net()
def with_args(): return Net(), (torch.ones(2, WIDTH),)
def with_tensor(): return Net(), torch.ones(2, WIDTH)
def with_kwargs(): return Net(), (), {"x": torch.ones(2, WIDTH)}
def wrong(): return 3
def wrong_args(): return Net(), "x"
def raises(): raise KeyError("weights.bin")
"""


@pytest.fixture
def script(tmp_path) -> Path:
    """Write a file with callables that build models in each allowed way, and some that do not."""
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    path = tmp_path / "a_users_net.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("with_args", 1, set()), ("with_tensor", 1, set()), ("with_kwargs", 0, {"x"})],
)
def test_callables_give_model_and_inputs(script, name, args, kwargs):
    opened = open_model(f"{script}:{name}")
    assert opened.kind == "py"
    assert (len(opened.args), set(opened.kwargs)) == (args, kwargs)
    assert not opened.model.training
    again = open_model(f"{script}:{name}").model
    assert torch.equal(again.lin.weight, opened.model.lin.weight)
    assert os.fspath(script.parent.resolve()) not in __import__("sys").path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("alone", ("forward needs x", "(module, args)")),
        ("model", ("forward needs x",)),
        ("wrong", ("expected it to return module", "found (int)")),
        ("wrong_args", ("found (Net, str)",)),
        ("raises", ("raised KeyError", "weights.bin", "a_users_net.py:22")),
        ("absent", ("expected a callable 'absent'", "with_args")),
    ],
)
def test_callables_that_cannot_be_used(script, name, words):
    refuses(f"{script}:{name}", *words)


def test_files_that_cannot_be_run(tmp_path):
    refuses(tmp_path / "none.py:f", "found nothing at")
    (tmp_path / "bad_syntax.py").write_text("x = 1\ndef f(:\n")
    refuses(tmp_path / "bad_syntax.py:f", "SyntaxError", "line 2")
    (tmp_path / "bad_import.py").write_text("\nimport no_such_module_at_all\n")
    refuses(tmp_path / "bad_import.py:f", "ModuleNotFoundError", "line 2")


# Programs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("unkept", torch.ones(4), persistent=False)

    def forward(self, x, mask=None, *, scale=1.0, **more):
        y = self.lin(x) + self.kept + self.unkept
        return {"y": y * scale if mask is None else y * mask * scale}


X = torch.arange(8.0).view(2, 4)


def saved(path: Path, args: tuple, kwargs: dict, model: nn.Module | None = None) -> nn.Module:
    model = model or Net()
    program = torch.export.export(model, args, kwargs, strict=False)
    with open(path, "wb") as f:
        save_program(program, f)
    return model


def reopened(path: Path, model: nn.Module) -> LoadedProgram:
    program = load_program(path)
    return LoadedProgram(program, signature_of(model, program), "Net")


@pytest.mark.parametrize(
    ("args", "kwargs"), [((X,), {}), ((), {"x": X}), ((X, X > 2), {}), ((X,), {"mask": X > 2, "scale": 2.0})]
)
def test_saved_program_keeps_signature_keys_and_output_type(tmp_path, args, kwargs):
    model = saved(tmp_path / "p.pt2", args, kwargs)
    loaded = reopened(tmp_path / "p.pt2", model)
    assert str(loaded.__signature__) == "(x, mask=None, *, scale=1.0, **more)"
    assert list(loaded.state_dict()) == list(model.state_dict())
    wanted = model(*args, **kwargs)["y"]
    by_name = dict(zip(("x", "mask"), args, strict=False)) | kwargs
    by_place = tuple(by_name[n] for n in ("x", "mask") if n in by_name)
    assert torch.equal(loaded(**by_name)["y"], wanted)
    assert torch.equal(loaded(*by_place, **{k: v for k, v in kwargs.items() if k == "scale"})["y"], wanted)


def test_loaded_program_moves_and_loads_weights(tmp_path):
    model = saved(tmp_path / "p.pt2", (X,), {})
    loaded = reopened(tmp_path / "p.pt2", model)
    loaded.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    twice = Net()
    twice.load_state_dict(loaded.state_dict())
    assert torch.equal(loaded(X)["y"], twice(X)["y"])
    loaded.to(torch.float64).eval()
    assert loaded(X.double())["y"].dtype == torch.float64


def test_arguments_a_program_was_not_captured_with(tmp_path):
    model = saved(tmp_path / "p.pt2", (X,), {"scale": 2.0})
    loaded = reopened(tmp_path / "p.pt2", model)
    loaded(X, None, scale=2.0)
    with pytest.raises(TypeError, match="missing a required argument"):
        loaded()
    with pytest.raises(TypeError, match=r"Net: captured with \(x, scale\), called with also mask"):
        loaded(X, X, scale=2.0)
    with pytest.raises(TypeError, match="called with also other"):
        loaded(X, scale=2.0, other=X)


def test_saved_program_holds_no_paths_and_no_example_data_and_is_reproducible(tmp_path):
    secret = torch.full((2, 4), 1234.5)
    torch.manual_seed(0)
    model = saved(tmp_path / "one.pt2", (secret,), {})
    saved(tmp_path / "two.pt2", (secret * 2,), {}, model)
    data = (tmp_path / "one.pt2").read_bytes()
    assert data == (tmp_path / "two.pt2").read_bytes()
    assert os.path.dirname(__file__).encode() not in data
    assert struct.pack("<f", 1234.5) * 2 not in data


def test_saving_leaves_the_program_as_it_was(tmp_path):
    program = torch.export.export(Net(), (X,), strict=False)
    before = [n.meta.get("stack_trace") for n in program.graph.nodes]
    with open(tmp_path / "p.pt2", "wb") as f:
        save_program(program, f)
    assert any(before)
    assert [n.meta.get("stack_trace") for n in program.graph.nodes] == before
    assert program.example_inputs is not None


def test_program_opens_as_a_model_with_inputs_of_its_sizes(tmp_path):
    saved(tmp_path / "p.pt2", (X,), {"scale": 2.0})
    opened = open_model(tmp_path / "p.pt2")
    assert opened.kind == "pt2"
    assert opened.args[0].shape == X.shape
    assert opened.kwargs == {"scale": 2.0}


@pytest.mark.parametrize("keep", [0, 30, 0.5])
def test_truncated_program(tmp_path, keep):
    path = tmp_path / "p.pt2"
    saved(path, (X,), {})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refuses(path, "expected a .pt2 archive", "truncated or corrupt")


def test_flipped_byte_in_a_program(tmp_path):
    path = tmp_path / "p.pt2"
    model = saved(path, (X,), {})
    data = bytearray(path.read_bytes())
    data[data.index(model.lin.weight.detach().numpy().tobytes())] ^= 0xFF
    path.write_bytes(data)
    refuses(path, "does not match its checksum", "corrupt")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb-went-off",))


def replace_member(path: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    assert any(name.endswith(ending) for name in members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith(ending) else data)


def test_pickles_inside_a_program_are_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.pt2"
    torch.save({"x": Bomb()}, tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    torch.export.save(torch.export.export(Net(), (X,), strict=False), path)
    replace_member(path, "sample_inputs/model.pt", lambda _: bomb)
    refuses(path, "torch.export.load failed")
    saved(path, (X,), {})
    replace_member(path, "weights/weight_0", lambda _: bomb)
    replace_member(
        path, "weights_config.json", lambda t: t.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    )
    refuses(path, "torch.export.load failed")
    saved(path, (X,), {})
    config = json.dumps(
        {
            "config": {
                "o": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            }
        }
    )
    replace_member(path, "constants_config.json", lambda _: config.encode())
    refuses(path, "pickled object")
    assert not (tmp_path / "bomb-went-off").exists()


def test_program_that_calls_no_tensor_operation_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "p.pt2"
    saved(path, (X,), {})
    program = torch.export.load(path)
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    node.target = os.getcwd
    monkeypatch.setattr(torch.export, "load", lambda _: program)
    refuses(path, "no tensor operation; refused")
