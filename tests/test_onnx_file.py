"""ONNX in, ONNX out: files of both of torch's exporters and hand-made ones, rewritten and compared."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn
from torch.export import Dim
from typer.testing import CliRunner

from attnc import inspect_onnx, optimize_onnx
from attnc.cli import app
from attnc.codegen.onnx import export as exporting
from attnc.codegen.onnx.agreement import BATCH
from attnc.errors import CodegenError
from attnc.ir import Scale
from attnc.onnx_file import RewrittenFile, rewrite_onnx

WIDTH, HEADS, KV, SIZE = 32, 4, 2, 8


class Encoder(nn.Module):
    """BERT in small: tables for tokens and positions, padded attention, a pooled first token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, WIDTH), nn.Embedding(64, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, s = input_ids.shape
        x = self.tokens(input_ids) + self.places(torch.arange(s, device=input_ids.device))
        q, k, v = (f(x).view(b, s, HEADS, SIZE).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        weights = (q @ k.transpose(2, 3) / SIZE**0.5 + bias).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(b, s, WIDTH)
        return self.norm(x + self.out(y))[:, 0]


class Decoder(nn.Module):
    """Llama in small: rotary positions, keys shared by two heads each, a causal mask beside padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, WIDTH)
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, KV * SIZE), nn.Linear(WIDTH, KV * SIZE)
        self.register_buffer("speeds", 1.0 / 100 ** (torch.arange(0, SIZE, 2) / SIZE))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, s = input_ids.shape
        x, at = self.tokens(input_ids), torch.arange(s, device=input_ids.device)
        angle = at[:, None].to(x.dtype) * self.speeds
        cos, sin = (torch.cat((f, f), -1) for f in (angle.cos(), angle.sin()))

        def turned(y: torch.Tensor) -> torch.Tensor:
            half = torch.cat((-y[..., SIZE // 2 :], y[..., : SIZE // 2]), -1)
            return y * cos + half * sin

        q = turned(self.q(x).view(b, s, HEADS, SIZE).transpose(1, 2))
        k, v = (f(x).view(b, s, KV, SIZE).transpose(1, 2) for f in (self.k, self.v))
        k = turned(k)
        k, v = (y[:, :, None].expand(b, KV, HEADS // KV, s, SIZE).reshape(b, HEADS, s, SIZE) for y in (k, v))
        keep = (at[None, :] <= at[:, None])[None, None] & attention_mask[:, None, None, :].bool()
        scores = (q @ k.transpose(2, 3)) * SIZE**-0.5
        weights = scores.masked_fill(~keep, torch.finfo(x.dtype).min).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, s, WIDTH))


class Both(nn.Module):
    """An encoder and a decoder beside one another, so that a file holds both kinds of site."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(input_ids, attention_mask), self.decoder(input_ids, attention_mask)


def exported(model: nn.Module, path: Path, exporter: str) -> Path:
    inputs = (torch.arange(10).reshape(2, 5), torch.ones(2, 5, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            sizes = {n: {0: Dim("batch"), 1: Dim("length", max=64)} for n in names}
            torch.onnx.export(
                model, inputs, path, dynamo=True, opset_version=18, dynamic_shapes=sizes, verbose=False
            )
        else:
            axes = {n: {0: "batch", 1: "length"} for n in names}
            torch.onnx.export(
                model, inputs, path, dynamo=False, opset_version=18, input_names=names, dynamic_axes=axes
            )
    return path


@pytest.fixture(scope="module", params=["dynamo", "torchscript"])
def exporter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, exporter: str) -> Path:
    torch.manual_seed(0)
    return exported(Both().eval(), tmp_path_factory.mktemp(exporter) / "both.onnx", exporter)


def rewrite(path: Path, tmp_path: Path, **options: Any) -> tuple[RewrittenFile, onnx.ModelProto]:
    done = rewrite_onnx(path, tmp_path / "out.onnx", **options)
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=False)
    return done, onnx.load(tmp_path / "out.onnx")


def check_untouched(before: onnx.ModelProto, after: onnx.ModelProto) -> Counter[str]:
    """See that what is left of the old graph has its bytes and its order; return what went, by operator."""
    for n in before.graph.node:
        if not n.domain:
            n.ClearField("domain")  # onnx.parser writes the empty domain down
    old = {n.output[0]: n.SerializeToString() for n in before.graph.node}
    kept = [n for n in after.graph.node if old.get(n.output[0]) == n.SerializeToString()]
    order = [n.output[0] for n in before.graph.node]
    places = [order.index(n.output[0]) for n in kept]
    assert places == sorted(places)
    new = [n for n in after.graph.node if old.get(n.output[0]) != n.SerializeToString()]
    assert all(n.name.startswith("attnc") for n in new), [
        n.name for n in new if not n.name.startswith("attnc")
    ]
    weights = {t.name: t.SerializeToString() for t in before.graph.initializer}
    for t in after.graph.initializer:
        assert weights[t.name] == t.SerializeToString()
    for field in ("input", "output"):
        ours, theirs = getattr(after.graph, field), getattr(before.graph, field)
        assert [v.SerializeToString() for v in ours] == [v.SerializeToString() for v in theirs]
    left = {n.output[0] for n in kept}
    return Counter(n.op_type for n in before.graph.node if n.output[0] not in left)


def test_both_sites_become_one_operator_each_and_the_rest_stays(both: Path, tmp_path: Path) -> None:
    done, after = rewrite(both, tmp_path)
    encoder, decoder = done.report.sites
    assert (encoder.status, encoder.backend) == ("rewritten", "MultiHeadAttention")
    assert "bias(c0)" in encoder.spec
    assert decoder.status == "rewritten"
    assert "group=2" in decoder.spec
    assert decoder.mask == "causal & padding(key)"
    for site in done.report.sites:
        assert site.error is not None
        assert site.error <= (site.tolerance or 0)
    assert done.report.checks["runs"] == len(BATCH)
    gone = check_untouched(onnx.load(both), after)
    assert gone["Softmax"] == 2
    assert gone["LayerNormalization"] == 0
    assert "Softmax" not in {n.op_type for n in after.graph.node}


# ---------------------------------------------------------------- hand-made files

SPELLED = """
 kt = Transpose<perm=[0,1,3,2]>(k)
 s = MatMul(q, kt)
 c = Constant<value_float=0.25>()
 sc = Mul(s, c)
 w = Softmax<axis=-1>(sc)
 y = MatMul(w, v)
"""
QKV = "float[B,4,S,8] q, float[B,4,T,8] k, float[B,4,T,8] v"


def written(path: Path, body: str, inputs: str = QKV, out: str = "float[B,4,S,8] y", opset: int = 18) -> Path:
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1, "com.microsoft" : 1]>'
    path.write_bytes(
        onnx.parser.parse_model(f"{header} g ({inputs}) => ({out}) {{ {body} }}").SerializeToString()
    )
    return path


def test_hand_made_graph_without_names(tmp_path: Path) -> None:
    done, after = rewrite(written(tmp_path / "in.onnx", SPELLED), tmp_path)
    assert [s.operator for s in done.sites] == ["MultiHeadAttention"]
    assert "Softmax" not in {n.op_type for n in after.graph.node}
    assert [o.name for o in after.graph.output] == ["y"]


def test_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED)
    optimize_onnx(path, tmp_path / "one.onnx")
    optimize_onnx(path, tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_inspect_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    (site,) = inspect_onnx(written(tmp_path / "in.onnx", SPELLED)).sites
    assert (site.status, site.backend, site.error) == ("rewritten", "MultiHeadAttention", None)
    assert site.source.startswith("Softmax")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_weights_that_are_returned_keep_the_site_unless_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED, out="float[B,4,S,8] y, float[B,4,S,T] w")
    done, after = rewrite(path, tmp_path)
    assert [s.code for s in done.report.sites] == ["weights-in-use"]
    check_untouched(onnx.load(path), after)
    assert len(after.graph.node) == len(onnx.load(path).graph.node)
    done, after = rewrite(path, tmp_path, cost_model=False, force=True)
    assert [s.status for s in done.report.sites] == ["rewritten"]
    assert Counter(n.op_type for n in after.graph.node)["Softmax"] == 1


def test_shape_read_off_the_scores_is_computed_without_them(tmp_path: Path) -> None:
    body = SPELLED + " n = Shape(w) z = ConstantOfShape(n)"
    path = written(tmp_path / "in.onnx", body, out="float[B,4,S,8] y, float[B,4,S,T] z")
    done, after = rewrite(path, tmp_path)
    assert [s.status for s in done.report.sites] == ["rewritten"]
    assert "Softmax" not in {n.op_type for n in after.graph.node}


def test_unknown_operator_is_left_alone_and_named(tmp_path: Path) -> None:
    body = SPELLED.replace("y = MatMul(w, v)", "a = MatMul(w, v) y = other.Thing(a)")
    path = written(tmp_path / "in.onnx", body)
    done, after = rewrite(path, tmp_path)
    assert [s.operator for s in done.sites] == ["MultiHeadAttention"]
    assert any(w.startswith("other.Thing is left alone (1 time)") for w in done.report.warnings)
    assert Counter(n.op_type for n in after.graph.node)["Thing"] == 1


def test_file_with_an_old_opset_is_kept_with_the_reason(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED, opset=17)
    done, after = rewrite(path, tmp_path)
    assert [s.code for s in done.report.sites] == ["opset-too-old"]
    assert len(after.graph.node) == len(onnx.load(path).graph.node)


def _renamed(body: str) -> str:
    """Return the same nodes with other names for what they give."""
    for name in ("kt", "s", "c", "sc", "w", "y"):
        body = body.replace(f" {name} =", f" {name}2 =").replace(f"({name})", f"({name}2)")
        body = body.replace(f"({name},", f"({name}2,").replace(f", {name})", f", {name}2)")
    return body


def test_two_sites_of_the_same_operands_keep_both_names(tmp_path: Path) -> None:
    body = SPELLED + _renamed(SPELLED)
    path = written(tmp_path / "in.onnx", body, out="float[B,4,S,8] y, float[B,4,S,8] y2")
    done, after = rewrite(path, tmp_path)
    assert [s.status for s in done.report.sites] == ["rewritten", "rewritten"]
    assert [o.name for o in after.graph.output] == ["y", "y2"]


def test_new_names_stay_apart_from_those_of_a_file_of_ours(tmp_path: Path) -> None:
    other = _renamed(SPELLED).replace("MatMul(q, kt2)", "MatMul(y, kt2)")
    first, _ = rewrite(written(tmp_path / "in.onnx", SPELLED, out="float[B,4,S,8] y"), tmp_path)
    grown = onnx.load(first.files[0])
    more = onnx.load(written(tmp_path / "more.onnx", SPELLED + other, out="float[B,4,S,8] y2"))
    grown.graph.node.extend(n for n in more.graph.node if n.output[0].endswith("2"))
    grown.graph.output[0].CopyFrom(more.graph.output[0])
    onnx.save(grown, tmp_path / "grown.onnx")
    first = rewrite_onnx(tmp_path / "grown.onnx", tmp_path / "twice.onnx")
    model = onnx.load(first.files[0])
    names = [n.name for n in model.graph.node if n.name]
    values = [v for n in model.graph.node for v in n.output]
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    assert Counter(n.op_type for n in model.graph.node)["MultiHeadAttention"] == 2
    assert sorted(s.code for s in first.report.sites) == ["", "already-fused"]


def test_site_that_no_operator_fits_becomes_a_function(tmp_path: Path) -> None:
    relu = SPELLED.replace("w = Softmax<axis=-1>(sc)", "sr = Relu(sc) w = Softmax<axis=-1>(sr)")
    done, after = rewrite(written(tmp_path / "in.onnx", relu), tmp_path)
    (site,) = done.sites
    assert site.domain == "attnc"
    assert [f.name for f in after.functions] == [site.operator]
    assert site.operator in {n.op_type for n in after.graph.node}


# ---------------------------------------------------------------- what goes wrong


def test_site_that_disagrees_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = exporting.decide

    def wrong(calls: Any, capabilities: Any) -> Any:
        out = []
        for d in true(calls, capabilities):
            spec = dataclasses.replace(d.call.spec, scores=(Scale(0.7),))
            out.append(dataclasses.replace(d, call=dataclasses.replace(d.call, spec=spec)))
        return out

    monkeypatch.setattr(exporting, "decide", wrong)
    path = written(tmp_path / "in.onnx", SPELLED)
    done, after = rewrite(path, tmp_path)
    assert [s.code for s in done.report.sites] == ["failed-verification"]
    assert not done.sites
    assert not any(check_untouched(onnx.load(path), after).values())
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in onnx.load(path).graph.node]


def test_site_that_the_runtime_refuses_is_put_back_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = exporting.decide

    def wrong(calls: Any, capabilities: Any) -> Any:
        out = true(calls, capabilities)
        for i, d in enumerate(out):
            if "scale(0.25)" not in d.call.text:
                out[i] = dataclasses.replace(d, call=dataclasses.replace(d.call, head_sizes=(7, 7)))
        return out

    monkeypatch.setattr(exporting, "decide", wrong)
    body = SPELLED + _renamed(SPELLED).replace("0.25", "0.5")
    path = written(tmp_path / "in.onnx", body, out="float[B,4,S,8] y, float[B,4,S,8] y2")
    done, after = rewrite(path, tmp_path)
    assert [s.code for s in done.report.sites] == ["", "failed-verification"]
    assert Counter(n.op_type for n in after.graph.node)["Softmax"] == 1


def test_nothing_is_written_when_the_file_cannot_run(tmp_path: Path) -> None:
    inputs = f"{QKV}, float[3] one, float[4] two"
    path = written(tmp_path / "in.onnx", f"{SPELLED} bad = Add(one, two)", inputs)
    with pytest.raises(CodegenError):
        rewrite_onnx(path, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_output_must_be_free_and_apart_from_the_input(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED)
    before = path.read_bytes()
    with pytest.raises(CodegenError, match="apart from the input"):
        rewrite_onnx(path, path, force=True)
    (tmp_path / "out.onnx").write_text("mine")
    with pytest.raises(CodegenError, match="exists"):
        rewrite_onnx(path, tmp_path / "out.onnx")
    assert path.read_bytes() == before
    assert (tmp_path / "out.onnx").read_text() == "mine"


def test_weights_beside_the_file_are_read_and_written_beside_the_new_one(tmp_path: Path) -> None:
    body = SPELLED.replace("q, kt", "p, kt").replace(" kt =", " p = MatMul(q, weight) kt =")
    inputs, out = QKV.replace(",8]", ",16]"), "float[B,4,S,16] y"
    model = onnx.load(written(tmp_path / "in.onnx", body, inputs, out))
    weight = onnx.numpy_helper.from_array(torch.randn(16, 16).numpy(), "weight")
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="in.bin")
    (tmp_path / "to").mkdir()
    done = rewrite_onnx(tmp_path / "in.onnx", tmp_path / "to" / "out.onnx")
    assert [s.operator for s in done.sites] == ["MultiHeadAttention"]
    assert sorted(p.name for p in done.files) == ["out.onnx", done.files[1].name]
    loaded = onnx.load(tmp_path / "to" / "out.onnx")
    assert loaded.graph.initializer[0].raw_data == weight.raw_data


# ---------------------------------------------------------------- the command line


def test_command_line_inspects_and_optimizes_a_file(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED)
    runner = CliRunner()
    looked = runner.invoke(app, ["inspect", str(path), "--json"])
    assert looked.exit_code == 0, looked.output
    assert [s["status"] for s in json.loads(looked.stdout)["sites"]] == ["rewritten"]
    out = tmp_path / "out.onnx"
    done = runner.invoke(app, ["optimize", str(path), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sites"][0]["backend"] == "MultiHeadAttention"
    assert out.is_file()


def test_command_line_refuses_options_without_meaning(tmp_path: Path) -> None:
    path = written(tmp_path / "in.onnx", SPELLED)
    done = CliRunner().invoke(app, ["inspect", str(path), "--form", "w8a8"])
    assert done.exit_code != 0
    assert "--form" in str(done.exception)
