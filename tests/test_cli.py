"""The command line: results on stdout, one line per error, nothing half-written; a stand-in pipeline."""

from __future__ import annotations

import copy
import errno
import json
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnc import cli, cli_work, tensor_files
from attnc.cli_work import Subject, compare, race, read_toml
from attnc.errors import CaptureError, VerifyError
from attnc.ir import Kernel
from attnc.opening import Opened
from attnc.passes.rewrite.forms import FORMS, parse_forms
from attnc.report.report import Report, SiteRecord

transformers = pytest.importorskip("transformers")

SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip
SPEC = (
    "attn q=bhqd[2,2,s0,8]:float32 k=bhkd[2,2,s0,8]:float32 v=bhke[2,2,s0,8]:float32 "
    "group=1 mask=none softmax"
)
MODULE = "encoder.layer.0.attention.self"


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
    """Stand in for attnc.api; ``change`` edits the optimized model, ``fail`` is raised by it."""

    def __init__(self) -> None:
        super().__init__("attnc.api")
        self.calls: list[dict[str, Any]] = []
        self.fail: Exception | None = None
        self.change = lambda model: None

    def parse_forms(self, forms: Any) -> Any:
        return parse_forms(forms)

    def session(self, fast: nn.Module) -> Session:
        return fast.__dict__["_session"]

    def _report(self, model: nn.Module) -> Report:
        site = SiteRecord(
            MODULE, MODULE, "m.py:3", SPEC, "none", "fused", "sdpa", "SAME", "rewritten", error=1e-7
        )
        return Report("0.1.0", type(model).__name__, "cpu", [site], warnings=["beware"])

    def inspect(self, model: Any, args: Any, kwargs: Any, **options: Any) -> Report:
        self.calls.append(options)
        return self._report(model)

    def optimize(
        self, model: Any, args: Any = (), kwargs: Any = None, progress: Any = None, **options: Any
    ) -> Any:
        self.calls.append(options)
        if self.fail is not None:
            raise self.fail
        if progress is not None:
            progress("detect", 1, 3)
        fast = copy.deepcopy(model)
        self.change(fast)
        fast.__dict__["report"] = report = self._report(model)
        plan = {"*": [{"form": "fused"}]}
        fast.__dict__["_session"] = Session(plan, "cpu", tuple(args), dict(kwargs or {}), report)
        return fast

    def export_onnx(self, fast: nn.Module, path: Path, *, target: str, force: bool) -> Any:
        Path(path).write_bytes(b"onnx")
        site = types.SimpleNamespace(
            id="site_0", domain="com.microsoft", operator="MultiHeadAttention", is_fused=True, error=1e-7,
            tolerance=1e-5, reason="first choice of the table",
        )  # fmt: skip
        return [site]

    def emit(self, fast: nn.Module, directory: Path, *, kinds: Sequence[str], force: bool) -> list[Kernel]:
        Path(directory).mkdir()
        self.kinds = list(kinds)
        return [Kernel("site_0", "pass", "abc123"), Kernel("site_1", "pass", "abc123")]


@pytest.fixture
def api(monkeypatch) -> Api:
    made = Api()
    monkeypatch.setitem(sys.modules, "attnc.api", made)
    return made


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """Save a small BERT once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "model"
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_shows_a_table_and_warnings_apart(api, bert, capsys):
    code, out, err = run(capsys, "inspect", bert)
    assert code == 0
    assert out.startswith("attnc 0.1.0: BertModel for cpu: 1 of 1 attention site rewritten")
    assert MODULE in out
    assert max(map(len, out.splitlines())) <= 110
    assert err == "warning: beware\n"


def test_inspect_json_is_the_report_alone(api, bert, capsys):
    code, out, _ = run(capsys, "inspect", bert, "--json")
    assert code == 0
    assert json.loads(out)["sites"][0]["module"] == MODULE


def test_optimize_writes_a_folder_that_verifies_and_inspects(api, bert, capsys, tmp_path):
    code, out, _ = run(
        capsys, "optimize", bert, "-o", tmp_path / "out", "--html", tmp_path / "r.html", "--json"
    )
    assert code == 0
    assert json.loads(out)["output"] == str(tmp_path / "out")
    assert (tmp_path / "r.html").is_file()
    code, out, _ = run(capsys, "verify", bert, tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["within"] is True
    assert found["cosine"] == 1.0
    assert 0 < found["max_error"] <= found["limit"]
    assert found["hashes"] == {str(tmp_path / "out"): 2}
    code, out, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    assert json.loads(out)["sites"][0]["error"] == 1e-7


def test_options_reach_the_pipeline(api, bert, capsys, tmp_path):
    argv = (
        "--form",
        "w8a8",
        "--form",
        "sliding_window(window=8)",
        "--no-verify",
        "--no-cost-model",
        "--target",
        "cpu",
    )
    assert run(capsys, "optimize", bert, "-o", tmp_path / "a", *argv)[0] == 0
    assert [f.name for f in api.calls[-1]["forms"].at("x")] == ["w8a8", "sliding_window"]
    assert (api.calls[-1]["verify"], api.calls[-1]["cost_model"], api.calls[-1]["target"]) == (
        False,
        False,
        "cpu",
    )
    (tmp_path / "plan.toml").write_text('["*"]\nform = "fused"\n')
    plan = tmp_path / "plan.toml"
    plan.write_text('"encoder.*" = [{form = "sliding_window", window = 8}]\n"*" = [{form = "fused"}]\n')
    assert run(capsys, "inspect", bert, "--plan", plan, "--attn", "eager")[0] == 0
    assert [pattern for pattern, _ in api.calls[-1]["forms"].rules] == ["encoder.*", "*"]


def error_line(code: int, err: str, *words: str) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert code not in (0, 70), err
    assert len(lines) == 1, err
    assert lines[0].startswith("attnc: error: ")
    for word in words:
        assert word in lines[0]


def test_bad_input_is_one_line_and_writes_nothing(api, bert, capsys, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "bad.toml").write_text("x = = 1")
    (tmp_path / "both.toml").write_text('"*" = [{form = "fused"}]')
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        ((tmp_path / "none", "-o", out), ("found nothing at that path",)),
        ((tmp_path / "empty", "-o", out), ("expected a config.json",)),
        ((bert, "-o", tmp_path / "there"), ("exists already", "--force")),
        ((bert, "-o", bert, "--force"), ("apart from the input",)),
        ((bert, "-o", bert / "x"), ("apart from the input",)),
        ((bert, "-o", tmp_path / "bad.toml" / "x"), ("a part of the path is a file",)),
        (
            (bert, "-o", out, "--form", "magic"),
            (
                "expected one of fused, chunked, neighborhood",
                "found 'magic'",
            ),
        ),
        ((bert, "-o", out, "--plan", tmp_path / "bad.toml"), ("expected a TOML file",)),
        ((bert, "-o", out, "--plan", tmp_path / "absent.toml"), ("expected a TOML file",)),
        ((bert, "-o", out, "--plan", tmp_path / "both.toml", "--form", "fused"), ("--form or --plan",)),
        ((bert,), ("Missing option",)),
        ((bert, "-o", out, "--no-such-option"), ("No such option",)),
    ]
    for argv, words in cases:
        code, stdout, err = run(capsys, "optimize", *argv)
        error_line(code, err, *words)
        assert stdout == ""
        assert sorted(tmp_path.rglob("*")) == before


def test_forms_are_listed_or_explained(capsys):
    assert cli.main(["forms"]) == 0
    out = capsys.readouterr().out
    assert "sliding_window(window," in out
    assert "BOUNDED" in out
    assert cli.main(["forms", "--json"]) == 0
    found = {x["name"]: x for x in json.loads(capsys.readouterr().out)["forms"]}
    assert set(found) == set(FORMS)
    assert found["fused"]["contract"] == "SAME"
    assert found["neighborhood"]["options"][:3] == ["grid", "window", "stride=1"]
    for name, form in found.items():
        assert form["summary"].endswith(".")
        assert name == "fused" or "Source" in form["text"], f"{name} names no source"
    assert cli.main(["forms", "power-attention"]) == 0
    assert "power of two" in capsys.readouterr().out
    assert cli.main(["forms", "magic"]) == 1
    assert "expected one of fused, chunked" in capsys.readouterr().err


def test_explain_prints_one_paragraph_or_lists_all_codes(capsys):
    assert cli.main(["explain", "mask-not-readable"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("mask-not-readable\n\n")
    assert "What to do: Scale" in text
    assert cli.main(["explain", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["codes"]
    assert {"code", "advice", "paragraph"} == set(rows[0])
    assert cli.main(["explain", "mask-not-readabl"]) == 1
    assert "did you mean mask-not-readable" in capsys.readouterr().err


def test_a_report_tells_equal_reasons_once_with_place_and_advice(capsys):
    from attnc.cli_view import Screen

    left = [
        SiteRecord(
            f"l.{i}.a", f"l.{i}.a", "A m.py:3", SPEC, "none", "", "", "SAME", "kept",
            reason="slower: predicted 0.5x", code="slower", advice="Ask for it.", blocking_source="m.py:9",
        )
        for i in range(5)
    ]  # fmt: skip
    Screen().report(Report("0", "M", "cpu", left))
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("kept slower: l.*.a (5 sites)")
    assert [" ".join(line.split()) for line in lines[at + 1 : at + 4]] == [
        "where m.py:9", "why predicted 0.5x", "help Ask for it."
    ]  # fmt: skip
    Screen(as_json=True).report(Report("0", "M", "cpu", left))
    assert capsys.readouterr().out == ""


def test_errors_of_the_model_are_one_line_and_json_stays_json(api, bert, capsys, tmp_path):
    api.fail = CaptureError("the forward failed:\n  IndexError: index out of range (modeling_bert.py:88)")
    code, out, err = run(capsys, "optimize", bert, "-o", tmp_path / "out", "--json")
    error_line(code, err, "IndexError: index out of range (modeling_bert.py:88)")
    assert json.loads(out)["error"]["type"] == "CaptureError"
    assert not (tmp_path / "out").exists()


def test_faults_of_our_own_are_told_apart(api, bert, capsys, tmp_path, monkeypatch):
    api.fail = ZeroDivisionError("oops")
    code, _, err = run(capsys, "optimize", bert, "-o", tmp_path / "out")
    assert code == 70
    assert err.count("\n") == 1
    assert "ZeroDivisionError: oops" in err
    assert "ATTNC_DEBUG=1" in err
    monkeypatch.setenv("ATTNC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["optimize", str(bert), "-o", str(tmp_path / "out")])


def test_full_disk_leaves_the_old_output(api, bert, capsys, tmp_path, monkeypatch):
    assert run(capsys, "optimize", bert, "-o", tmp_path / "out")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(f: Any, _: object) -> None:
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "_write_shard", full)
    code, _, err = run(capsys, "optimize", bert, "-o", tmp_path / "out", "--force")
    error_line(code, err, "the disk is full; the old output is unchanged")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_verify_fails_beyond_the_limit_and_on_changed_files(api, bert, capsys, tmp_path):
    assert run(capsys, "optimize", bert, "-o", tmp_path / "out")[0] == 0
    api.change = lambda model: model.encoder.layer[0].output.dense.weight.data.mul_(1.01)
    code, out, err = run(capsys, "verify", bert, tmp_path / "out", "--json")
    error_line(code, err, "expected error <=")
    assert json.loads(out)["within"] is False
    api.change = lambda model: None
    error_line(
        *run(capsys, "verify", bert, tmp_path / "out", "--min-cosine", "1.1")[::2], "expected cosine >= 1.1"
    )
    (tmp_path / "out" / "config.json").write_text("{}")
    error_line(*run(capsys, "verify", bert, tmp_path / "out")[::2], "config.json has changed")


def test_saved_folders_are_not_optimized_again(api, bert, capsys, tmp_path):
    assert run(capsys, "optimize", bert, "-o", tmp_path / "out")[0] == 0
    code, _, err = run(capsys, "optimize", tmp_path / "out", "-o", tmp_path / "two")
    error_line(code, err, "found one that attnc has saved")


def test_export_says_what_each_site_became(api, bert, capsys, tmp_path):
    code, out, _ = run(capsys, "export", bert, "-o", tmp_path / "m.onnx", "--json")
    assert code == 0
    assert json.loads(out)["sites"][0]["became"] == "com.microsoft.MultiHeadAttention"
    assert api.calls[-1]["cost_model"] is False
    code, _, err = run(capsys, "export", bert, "-o", tmp_path / "m.onnx")
    error_line(code, err, "exists already")


def test_export_with_past_asks_for_a_decoder(api, bert, capsys, tmp_path):
    code, _, err = run(capsys, "export", bert, "-o", tmp_path / "m.onnx", "--with-past")
    error_line(code, err, "BertModel: expected a decoder of transformers")
    assert not (tmp_path / "m.onnx").exists()


def test_emit_report_compiles_each_different_kernel_once(api, bert, capsys, tmp_path, monkeypatch):
    from attnc.codegen.triton import aot

    row = {
        "kernel": "site_0",
        "program": "kernel",
        "target": "sm_90",
        "registers": 128,
        "shared": 4096,
        "stack": 0,
        "spills": 0,
        "error": None,
    }
    monkeypatch.setattr(aot, "report_rows", lambda kernel: [row])
    code, out, _ = run(capsys, "emit", bert, "-o", tmp_path / "kernels", "--report", "--json")
    assert code == 0
    assert [k["name"] for k in json.loads(out)["kernels"]] == ["site_0", "site_1"]
    assert json.loads(out)["compiled"] == [row]
    assert api.kinds == ["forward"]
    code, out, _ = run(capsys, "emit", bert, "-o", tmp_path / "again", "--report", "--kind", "backward")
    assert api.kinds == ["backward"]
    assert "sm_90" in out
    assert "128" in out


def test_emit_tune_writes_the_tiles_that_were_measured(api, bert, capsys, tmp_path, monkeypatch):
    import importlib

    module = importlib.import_module("attnc.codegen.triton.tune")  # the package has a function of this name
    asked = []

    def tuned(kernel: Kernel, tokens: int) -> Kernel:
        asked.append((kernel.name, tokens))
        return Kernel(kernel.name, "tuned", "k2")

    monkeypatch.setattr(module, "tuned", tuned)
    monkeypatch.setattr(module, "check_gpu", lambda: None)
    code, out, _ = run(capsys, "emit", bert, "-o", tmp_path / "kernels", "--tune", "4096", "--json")
    assert code == 0
    assert asked == [("site_0", 4096), ("site_1", 4096)]
    assert {k["key"] for k in json.loads(out)["kernels"]} == {"k2"}
    assert {p.read_text() for p in (tmp_path / "kernels").iterdir()} == {"tuned"}


def test_emit_tune_asks_for_a_gpu_before_any_work(api, bert, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "emit", bert, "-o", tmp_path / "kernels", "--tune", "4096")
    error_line(code, err, "tune: expected a GPU to measure on, found none")
    assert not (tmp_path / "kernels").exists()
    assert not api.calls


@pytest.mark.no_poison
def test_bench_prints_medians_and_the_spread_of_their_ratio(api, bert, capsys):
    code, out, _ = run(capsys, "bench", bert, "--batch", 1, "--length", 5, "--rounds", 5, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["rounds"] == 5
    assert found["low"] <= found["ratio"] <= found["high"]
    code, out, _ = run(capsys, "bench", bert, bert, "--batch", 1, "--length", 5, "--rounds", 3)
    assert "times as fast (quartiles" in out


def test_race_takes_turns():
    order: list[str] = []
    timing = race(lambda: order.append("a"), lambda: order.append("b"), rounds=4)
    assert order == ["a", "b"] * 2 + ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timing.rounds == 4


class Two(nn.Module):
    def __init__(self, factor: float, infinite: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([factor]))
        self.infinite = infinite

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = x * self.w / 3
        return {"y": torch.where(y > 2, torch.inf, y) if self.infinite else y, "n": 3}


def subject(factor: float, **kw: bool) -> Subject:
    x = torch.linspace(-9, 9, 64).view(8, 8)
    model = Two(factor, **kw)
    return Subject(f"two({factor})", model, (x,), {}, Opened(model, (x,), {}, "py"))


def test_compare_derives_its_limit_from_fp64():
    same = compare(subject(1.0), subject(1.0))
    assert same.within
    assert same.max_error <= 2**-23 * 9
    off = compare(subject(1.0), subject(1.0 + 1e-5))
    assert not off.within
    assert off.max_error == pytest.approx(3e-5, rel=0.1)
    assert compare(subject(1.0), subject(1.0 + 1e-5), atol=1e-4).within


def test_compare_refuses_other_shapes_and_new_infinities():
    with pytest.raises(VerifyError, match="expected finite values"):
        compare(subject(1.0), subject(1.0, infinite=True))
    other = Subject("other", nn.Identity(), (), {})
    with pytest.raises(VerifyError, match=r"expected outputs of shapes \[\[8, 8\]\]"):
        compare(subject(1.0), Subject("flat", nn.Flatten(0), (), {}))
    assert other.on((torch.ones(1),), {}).shape == (1,)
    with pytest.raises(VerifyError, match="found none to compare"):
        compare(Subject("ints", nn.Identity(), (torch.ones(2, dtype=torch.int64),), {}), other)


def test_toml_keeps_the_order_of_globs(tmp_path):
    (tmp_path / "p.toml").write_text('"z.*" = []\n"a.*" = []\n"*" = []\n')
    assert list(read_toml(tmp_path / "p.toml")) == ["z.*", "a.*", "*"]


def test_doctor_names_versions_and_says_what_is_missing(capsys, monkeypatch):
    from attnc.codegen.flex import probe

    monkeypatch.setattr(probe, "why_not", lambda device: f"no compiler for {device}")
    code, out, _ = run(capsys, "doctor", "--json")
    found = {f["name"]: f for f in json.loads(out)["findings"]}
    assert code == 0
    assert (
        found["torch"]["value"] == torch.__version__.split("+")[0]
        or found["torch"]["value"] == torch.__version__
    )
    assert found["cuda"]["health"] == "missing" or torch.cuda.is_available()
    assert found["flex on cpu"]["hint"].startswith("no compiler for cpu; windows run as overlapping views")
    assert found["MultiHeadAttention"]["value"].startswith("does what its table says: ")
    assert found["CUDAExecutionProvider, ort-cuda-1.31"]["value"].startswith("not measured")
    assert run(capsys, "doctor")[0] == 0


def test_doctor_fails_where_something_is_broken(capsys, monkeypatch):
    from attnc import doctor

    monkeypatch.setattr(
        doctor, "examine", lambda: [doctor.Finding("torch", "not installed", "broken", "reinstall")]
    )
    code, _, err = run(capsys, "doctor")
    error_line(code, err, "broken: torch")


def test_logs_help_and_wrong_names(capsys, monkeypatch):
    monkeypatch.setenv("ATTNC_LOGS", "help")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert out.startswith("components: capture")
    monkeypatch.setenv("ATTNC_LOGS", "nonsense")
    error_line(*run(capsys, "doctor")[::2], "ATTNC_LOGS", "'nonsense'")


def test_no_arguments_show_the_verbs(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert all(verb in out for verb in ("inspect", "optimize", "export", "emit", "verify", "bench", "doctor"))


@pytest.fixture
def interruptible():
    """Hear SIGINT as at a terminal: a job that a shell started in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_and_kill_leave_nothing(api, bert, capsys, tmp_path, monkeypatch):
    for send in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(tensor_files, "_write_shard", lambda *_, s=send: signal.raise_signal(s))
        code, _, err = run(capsys, "optimize", bert, "-o", tmp_path / "out")
        assert code == 130
        assert err.endswith("attnc: error: interrupted; nothing was left half-written\n")
        assert list(tmp_path.iterdir()) == []


def test_help_is_fast_and_needs_no_model_libraries():
    code = (
        "import sys; from attnc.cli import main; main(['--help']); "
        "print([m for m in ('transformers', 'onnx', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    assert cli_work.WARM_UP == 2
