"""The benchmark of kernels: what it counts, what it compares with, and a run of tiny cases on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc.ir import AttentionSpec
from attnc.printer import parse

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def small_cases() -> list[Any]:
    from gpu_cases import smoke_cases

    return list(smoke_cases())


def drawn(case: Any) -> Any:
    from gpu_cases import draw

    return draw(case, torch.device("cpu"), torch.float32, 0, None)


def test_pairs_that_count_are_those_of_the_mask():
    from gpu_cases import MASKS, Case, visible

    cases = [Case("forward", mask, 16, 1, 1, 1, 72, 72, window=20) for mask in MASKS]
    cases += [Case("blocks", "full", 16, 1, 1, 1, 64, 64, block=16, density=d) for d in (0.5, 0.25, 0.1)]
    at = torch.arange(72)
    for case in cases:
        n = at[: case.sk]
        assert case.pairs == int(visible(case, drawn(case).extra, n[:, None], n[None, :]).sum()), case.name


def test_operations_and_bytes_are_those_of_the_notes():
    from gpu_cases import Case

    full = Case("forward", "full", 128, 4, 16, 16, 4096, 4096)
    assert full.flops == 4 * 4 * 16 * 4096 * 4096 * 128
    assert replace(full, way="backward").flops == 2.5 * full.flops
    assert replace(full, mask="causal").flops == pytest.approx(full.flops / 2, rel=1e-3)
    assert full.bytes(2) == 2 * 4 * 128 * (2 * 16 * 4096 + 2 * 16 * 4096)
    decode = Case("decode", "full", 128, 64, 32, 8, 1, 32768)
    cache = 2 * 2 * 64 * 8 * 32768 * 128
    assert cache < decode.bytes(2) < 1.001 * cache


@pytest.mark.parametrize("at", range(10))
def test_reference_is_the_spec_and_its_gradients(at: int):
    from gpu_cases import reference

    case = small_cases()[at]
    t, spec = drawn(case), parse(case.spec(torch.float32))
    assert isinstance(spec, AttentionSpec)
    q, k, v = (x.double().requires_grad_() for x in (t.q, t.k, t.v))
    out, _ = spec(q, k, v, tuple(x.double() if x.is_floating_point() else x for x in t.captured))
    found = reference(t, torch.float64, rounded=False)
    want = torch.autograd.grad(out, (q, k, v), t.dout.double()) if case.way == "backward" else (out,)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y[0, 0], rtol=1e-6, atol=1e-6)  # slopes are fp32


def test_every_case_of_the_plan_is_there_once_and_the_weightiest_come_first():
    from gpu_cases import MASKS, all_cases

    names = [c.name for c in all_cases()]
    assert len(names) == len(set(names)) == 2 * 3 * 2 * len(MASKS) + 4 + 3
    assert names[: len(MASKS)] == [f"forward/{mask}/d128/n4096" for mask in MASKS]
    assert {"decode/batch64/keys32768", "blocks/density0.1/n8192", "backward/bias/d64/n16384"} <= set(names)
    for case in all_cases():
        parse(case.spec(torch.bfloat16))


def test_a_mask_as_a_tensor_is_the_mask():
    from gpu_cases import visible

    at = torch.arange(64)
    for case in small_cases():
        t = drawn(case)
        if t.keep is not None:
            n = at[: case.sk]
            assert torch.equal(t.keep[0, 0], visible(case, t.extra, n[:, None], n[None, :])), case.name
        if case.mask == "alibi":
            assert t.added[0, 1, 5, 3] == -2 * t.extra["slope"][0, 1, 0, 0]
            assert t.added[0, 1, 3, 5] == -torch.inf


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a run of all tiny cases writes; a process of its own, as triton's interpreter needs it."""
    path = tmp_path_factory.mktemp("result") / "gpu.json"
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import gpu;"
        f"gpu.RESULTS = gpu.Path({str(path)!r}); sys.exit(gpu.main())"
    )
    command = [sys.executable, "-c", program, "--device", "cpu", "--smoke", "--write"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(path.parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(path.read_text())


def test_each_contender_has_a_row_in_each_case(result):
    names = [(r["case"], r["contender"]) for r in result["rows"]]
    who = ("sdpa cudnn", "sdpa flash", "flex", "attnc")
    assert names == [(c.name, w) for c in small_cases() for w in who]
    assert {r["status"] for r in result["rows"]} <= {"ok", "cannot", "failed"}
    for r in result["rows"]:
        assert (r["ms"] is not None) == (r["status"] == "ok"), r
        assert r["status"] == "ok" or r["why"], r
        assert r["status"] != "ok" or 0 <= r["error"] <= r["limit"], r


def test_emitted_kernels_ran_and_have_rates(result):
    rows = {r["case"]: r for r in result["rows"] if r["contender"] == "attnc"}
    for case in small_cases():
        if case.way in ("forward", "blocks"):
            row = rows[case.name]
            assert row["status"] == "ok"
            assert row["tflops"] == pytest.approx(case.flops / row["ms"] / 1e9)
            assert row["gbytes"] == pytest.approx(case.bytes(4) / row["ms"] / 1e6)
            assert 0 < row["of_ceiling"] < 1
            assert row["of_best_rival"] > 0


def test_a_contender_that_cannot_run_says_why(result):
    why = {(r["case"].split("/")[1], r["contender"]): r["why"] for r in result["rows"]}
    assert why["softcap", "sdpa flash"] == "SDPA has no soft cap"
    assert "No viable backend" in why["full", "sdpa cudnn"]


def test_the_result_names_no_machine_and_no_path(result):
    text = json.dumps({k: v for k, v in result.items() if k != "command"})
    assert os.uname().nodename not in text
    assert str(ROOT) not in text
    assert {"command", "date", "machine", "versions", "gpu", "ceilings", "seconds"} <= set(result)


def test_a_wrong_result_has_no_speed_and_the_exit_code_says_so(monkeypatch, capsys):
    import gpu
    from gpu_contenders import Contender

    def off_by(amount: float) -> Any:
        def prepare(t: Any) -> Any:
            out = torch.nn.functional.scaled_dot_product_attention(t.q, t.k, t.v, is_causal=True)
            return lambda: (out + amount,)

        return prepare

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "quiet", lambda: None)
    arguments = ["--device", "cpu", "--smoke", "--only", "forward/causal"]
    for amount, code in ((0.0, 0), (0.01, 1), (float("nan"), 1)):
        pair = [Contender("rival", off_by(0.0)), Contender("attnc", off_by(amount))]
        monkeypatch.setattr(gpu, "contenders", lambda pair=pair: pair)
        assert gpu.main(arguments) == code
        *_, rival, ours = capsys.readouterr().out.splitlines()
        assert "TFLOP/s" in rival
        assert ("TFLOP/s" in ours) == (code == 0)
        assert ("attnc       wrong: off by" in ours) == (code == 1)
    rows = gpu.run(gpu_arguments(only="forward/causal"))["rows"]
    assert (rows[1]["status"], rows[1]["ms"]) == ("wrong", None)


def test_no_case_is_begun_when_the_time_is_over(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    result = gpu.run(gpu_arguments(budget=-1.0))
    assert "11 cases were not run" in capsys.readouterr().out
    assert {r["status"] for r in result["rows"]} == {"not run"}


def gpu_arguments(**given: Any) -> Any:
    from argparse import Namespace

    return Namespace(
        **{"device": "cpu", "smoke": True, "only": "", "contenders": "", "budget": 60.0, **given}
    )


def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "expected a GPU, found none; --device cpu --smoke" in capsys.readouterr().err
