"""Gradients by emitted kernels, under Triton's interpreter: a part of the corpus, and all of it if slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnc.codegen.ops import gradients
from attnc.codegen.triton import can_run, emit
from attnc.codegen.triton.launch import backward_launcher, run_backward
from attnc.codegen.triton.store import load
from attnc.printer import parse

HERE = Path(__file__).parent
LINES = (HERE / "corpus.txt").read_text(encoding="utf-8").splitlines()
UNSERVED = {"mixed"}
"""Values narrower than queries and keys have plain torch's gradients."""
NAMES = [line.partition(" ")[0] for line in LINES if not line.startswith("#")]
NAMES = [name for name in NAMES if name not in UNSERVED]
SHARES = ("below_zero", "settled", "vanishing")
"""Specs of interpret_backward.py: what sums of weights may come to."""
SOME = (
    "left_padded",  # rows that spread over hidden keys, in fp16, with a group
    "biases",  # summed over batch entries; columns
    "mask_as_bias",
    "softmax_plus_one",  # a gain per head
    "sink_logits",
    "expression",
    "documents",
    "sigmoid",
    "signed",
    "below_zero",  # weights over their own sum, whose logarithm is NaN
    "settled",  # sums that give way to a bound
)


def interpret(folder: Path, *names: str) -> dict[str, dict[str, object]]:
    """Return what interpret_backward.py found, by name of the run."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpret_backward.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["run"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="session")
def some(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return interpret(tmp_path_factory.mktemp("kernels"), "short", "every_axis", *SOME)


def check(found: dict[str, dict[str, object]], name: str) -> None:
    row = found[f"self-test {name}"]
    assert row["code"] == 0, row["text"]
    rows = {run: row for run, row in found.items() if run.startswith(f"{name} torch.")}
    assert rows
    for run, row in rows.items():
        assert max(row["errors"]) <= 1, run
        assert row["undefined"] == 0, run


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_those_of_the_executed_spec(name: str, some) -> None:
    check(some, name)


def test_rows_that_see_no_key_were_among_them(some) -> None:
    for name in ("left_padded", "mask_as_bias", "documents"):
        assert any(row["hidden_rows"] for run, row in some.items() if run.startswith(f"{name} torch."))


def test_captured_tensors_may_vary_along_any_axes_and_each_gradient_can_be_had_alone(some) -> None:
    (row,) = (row for run, row in some.items() if run.startswith("every_axis"))
    assert len(row["errors"]) == 8
    assert max(row["errors"]) <= 1
    assert row["undefined"] == 0
    assert row["alone"] == [True] * 8


@pytest.mark.slow
def test_gradients_of_the_whole_corpus_are_those_of_the_executed_specs(tmp_path: Path) -> None:
    found = interpret(tmp_path, *NAMES, *SHARES)
    for name in (*NAMES, *SHARES):
        check(found, name)


@pytest.mark.slow
def test_the_self_test_notices_files_that_divide_wrongly(tmp_path: Path) -> None:
    found = interpret(tmp_path, "broken_shares")
    assert len(found) >= 13
    assert [run for run, row in found.items() if not row["noticed"]] == []


def test_the_self_test_notices_every_broken_file(tmp_path: Path) -> None:
    found = interpret(tmp_path, "broken")
    assert len(found) >= 15
    assert [run for run, row in found.items() if not row["noticed"]] == []


def draw(spec, *, dtype=None, sk: int = 5) -> list[torch.Tensor]:
    sizes = {"b": 1, "h": 2 * spec.group_size, "hkv": 2, "s": 3, "t": sk}
    shapes = ([sizes.get(d, d) for d in o.shape] for o in (spec.q, spec.k, spec.v))
    return [torch.randn(s).to(dtype or spec.q.dtype) for s in shapes]


def forward_of(spec, q, k, v):
    out, lse = spec(q, k, v)
    return out, lse, torch.randn_like(out), torch.randn_like(lse)


def test_a_spec_that_no_kernel_serves_gets_its_gradients_from_plain_torch_and_says_so(corpus, caplog) -> None:
    spec = parse(str(corpus["causal"]).replace("float32", "float64"))
    q, k, v = draw(spec)
    out, lse, dout, dlse = forward_of(spec, q, k, v)
    found = run_backward(spec, q, k, v, [], out, lse, dout, dlse, [True, False, True])
    want = gradients(spec, q, k, v, [], dout, dlse, [True, False, True])
    torch.testing.assert_close(found, want)
    assert "the site runs as plain torch" in caplog.text


@pytest.mark.parametrize("lost", ["out", "keys"])
def test_without_the_output_or_without_keys_plain_torch_runs(lost: str, corpus) -> None:
    spec = corpus["causal"]
    q, k, v = draw(spec, sk=0 if lost == "keys" else 5)
    out, lse, dout, dlse = forward_of(spec, q, k, v)
    kept = None if lost == "out" else out
    found = run_backward(spec, q, k, v, [], kept, lse, dout, dlse, [True] * 3)
    torch.testing.assert_close(found, gradients(spec, q, k, v, [], dout, dlse, [True] * 3))


def test_kernels_on_cpu_tensors_ask_for_the_interpreter(corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = corpus["causal"]
    q, k, v = draw(spec)
    out, lse, dout, dlse = forward_of(spec, q, k, v)
    with pytest.raises(ValueError, match="expected tensors on a GPU, or TRITON_INTERPRET=1"):
        run_backward(spec, q, k, v, [], out, lse, dout, dlse, [True] * 3)


def test_wrong_inputs_of_kernels_are_named(corpus) -> None:
    spec = corpus["causal"]
    backward = backward_launcher(spec)
    q, k, v = draw(spec)
    out, lse, dout, _ = forward_of(spec, q, k, v)
    with pytest.raises(
        ValueError, match=r"dout: expected torch\.float32 \[1, 4, 3, 32\], found torch\.float32 \[1, 4, 2"
    ):
        backward(q, k, v, out, lse, dout[:, :, :2])
    with pytest.raises(ValueError, match=r"lse: expected torch\.float32 \[1, 4, 3\], found torch\.float64"):
        backward(q, k, v, out, lse.double(), dout)


def test_nothing_is_launched_for_empty_tensors(corpus) -> None:
    spec = corpus["causal"]
    q, k, v = (x[:0] for x in draw(spec))
    out, lse, dout, _ = forward_of(spec, q, k, v)
    grads = backward_launcher(spec)(q, k, v, out, lse, dout, needs=(True, False, True))
    assert grads[0].shape == q.shape
    assert grads[1] is None


def test_the_other_specs_that_the_forward_serves_have_a_backward(corpus) -> None:
    assert {name for name, spec in corpus.items() if can_run(spec, "backward")} == UNSERVED


def test_the_same_spec_gives_the_same_bytes_and_no_atomic_addition(corpus) -> None:
    for name, spec in corpus.items():
        if name in UNSERVED:
            continue
        source = emit(spec, name=name, kind="backward").source
        assert source == emit(spec, name=name, kind="backward").source
        assert "atomic_" not in source
        assert "\n\n\n\n" not in source, name
        compile(source, name, "exec")


@pytest.mark.parametrize("name", ["capped_window", "biases", "taylor"])
def test_golden(name: str, corpus, golden) -> None:
    golden(f"kernel/{name}_backward.py", emit(corpus[name], name=name, kind="backward").source)


def test_only_what_is_wanted_is_computed(corpus) -> None:
    text = emit(corpus["biases"], name="biases", kind="backward").source
    assert "    if needs[0] or needs[1] or needs[2]" not in text
    assert "    if needs[0]:\n        dq = " in text
    assert "    if needs[1] or needs[2] or needs[4]:\n        dk, dv = " in text
    assert "    if needs[3]:\n        d_bias0 = " in text


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "left_padded", "window_and_sinks", "biases", "sink_logits"])
def test_gradients_on_a_gpu_equal_those_of_the_executed_spec(name: str, corpus) -> None:
    spec = corpus[name]
    sizes = {"b": 2, "h": 2 * spec.group_size, "hkv": 2, "s": 200, "t": 200}
    tensors = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        x = torch.randn([sizes.get(d, d) for d in o.shape])
        tensors.append((x > 0 if o.dtype == torch.bool else x.to(o.dtype)).cuda())
    leaves = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    out, lse = torch.ops.attnc.attend(*tensors[:3], tensors[3:], str(spec))
    dout, dlse = torch.randn_like(out), torch.where(lse.abs() < 1e6, torch.randn_like(lse), 0.0)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    wide = [x.detach().double() if x.is_floating_point() else x for x in tensors]
    needs = [x.is_floating_point() for x in tensors]
    want = gradients(spec, *wide[:3], wide[3:], dout.double(), dlse.double(), needs)
    module = load(emit(spec, name=name, kind="backward"))
    limits = [limit for limit, _ in module._limits(tensors, dout, dlse) if limit is not None]
    for x, z, limit in zip(found, want, limits, strict=True):
        torch.testing.assert_close(x.double(), z, rtol=0, atol=limit.item(), equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_emitted_file_passes_its_own_test_on_a_gpu(name: str, corpus) -> None:
    assert load(emit(corpus[name], name=name, kind="backward")).main() == 0
