from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from attnc.codegen.triton import can_run, emit, emit_all
from attnc.codegen.triton.bench import sdpa_options
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import SHARED_LIMIT, Config, choose, shared_bytes
from attnc.codegen.triton.emit import kind_of, spec_of
from attnc.codegen.triton.holes import REACHES, argument_types
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.reach import reach
from attnc.codegen.triton.store import load, load_apart
from attnc.errors import CodegenError, UnsupportedError
from attnc.printer import parse


@pytest.mark.parametrize(
    "name", ["causal", "left_padded", "window_and_sinks", "biases", "capped_window", "documents", "taylor"]
)
def test_the_file_is_the_one_that_was_reviewed(name: str, corpus, golden) -> None:
    kernel = emit(corpus[name], name=name)
    golden(f"kernel/{name}.py", kernel.source.replace(kernel.key, "<key>"))


OPTIONS = {
    "plain": "scale=0.125, enable_gqa=True",
    "causal": "scale=0.125, is_causal=True, enable_gqa=True",
    **dict.fromkeys(("bert", "capped_half", "sink_logits", "causal_from_the_end", "sigmoid", "signed"), ""),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_times_itself_beside_torch(name: str, corpus, monkeypatch, capsys) -> None:
    """On the CPU, with the clock and the sizes replaced; a wrong option of SDPA would raise."""
    spec = corpus[name]
    kernel = emit(spec, name=name)
    assert sdpa_options(canonical(spec)) == OPTIONS[name]
    assert f"sdpa(*inputs, {OPTIONS[name]})" in kernel.source or not OPTIONS[name]
    module, sizes = load_apart(kernel, "bench"), []
    events = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        Event=lambda enable_timing: SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0),
    )
    module.torch = SimpleNamespace(**{**vars(torch), "cuda": events, "empty": lambda *a, **k: torch.zeros(1)})
    sample = module._sample
    module._sample = lambda case, device, given: sizes.append(given) or sample(case, "cpu", (1, 1, 9, 9))
    module.attend = lambda *inputs: module.reference(*inputs)
    assert module._bench() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert sizes == [module.BENCH]
    assert str(module.BENCH) in head
    assert [line[:11] for line in lines] == [
        "this kernel",
        "plain torch",
        *["torch sdpa "] * bool(OPTIONS[name]),
    ]
    heads = spec.group_size
    flops = 2 * heads * 2 * 4096 * 4096 * (spec.q.shape[3] + spec.v.shape[3])
    assert all(f"{flops / 2e9:.1f} TFLOP/s" in line for line in lines)


def test_torchs_own_attention_in_the_bench_is_the_same_computation(corpus) -> None:
    for name in ("plain", "causal"):
        module = load(emit(corpus[name], name=name))
        inputs = [x.float() for x in module._sample(0, "cpu", (2, 2, 9, 9))]
        options = eval(f"dict({OPTIONS[name]})")
        found = torch.nn.functional.scaled_dot_product_attention(*inputs, **options)
        torch.testing.assert_close(found.double(), module.reference(*inputs)[0], rtol=1e-5, atol=1e-5)


def test_without_a_gpu_the_bench_says_what_it_needs(corpus, tmp_path) -> None:
    (tmp_path / "causal.py").write_text(emit(corpus["causal"], name="causal").source)
    command = [sys.executable, str(tmp_path / "causal.py"), "--bench"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "--bench: expected a GPU, found none\n")


@pytest.mark.gpu
def test_a_file_times_itself_on_a_gpu(corpus, tmp_path) -> None:
    (tmp_path / "plain.py").write_text(emit(corpus["plain"], name="plain").source)
    command = [sys.executable, str(tmp_path / "plain.py"), "--bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("TFLOP/s") == 4


def test_the_same_spec_gives_the_same_bytes_in_another_process(corpus) -> None:
    spec = corpus["biases"]
    program = (
        "import sys; from attnc.codegen.triton import emit; from attnc.printer import parse;"
        f"sys.stdout.write(emit(parse({str(spec)!r}), name='a').source)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == emit(spec, name="a").source


def test_the_key_is_that_of_the_computation_and_not_of_its_name(corpus) -> None:
    keys = {name: emit(spec).key for name, spec in corpus.items()}
    assert len(set(keys.values())) == len(keys)
    assert emit(corpus["plain"], name="other").key == keys["plain"]
    tuned = emit(corpus["plain"], configs={"sm_90": Config(64, 64, 4, 2)})
    assert tuned.key != keys["plain"]
    assert '"sm_90": (64, 64, 4, 2)' in tuned.source


def test_the_file_stands_alone_and_names_its_spec(corpus) -> None:
    for name, spec in corpus.items():
        source = emit(spec, name=name).source
        tree = ast.parse(source)
        imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imports <= {"os", "sys", "torch", "triton", "triton.language", "numpy"}
        assert not any(isinstance(n, ast.ImportFrom) for n in ast.walk(tree))
        assert spec_of(source) == canonical(spec)
        assert not [line for line in source.splitlines() if line != line.rstrip()]
        assert "\n\n\n\n" not in source
        long = [line for line in source.splitlines() if len(line) > 120 and not line.startswith("spec ")]
        assert not long, long


def test_the_reference_in_the_file_is_the_spec_and_runs_without_the_interpreter(corpus) -> None:
    """Triton's interpreter hands modules names of its own, such as ``math``, which hides a missing import."""
    for name, spec in corpus.items():
        module = load(emit(spec, name=name))
        q, k, v, *captured = (x.double() if x.is_floating_point() else x for x in module._sample(2, "cpu"))
        out, lse = module.reference(q, k, v, *captured)
        want, want_lse = canonical(spec)(q, k, v, tuple(captured))
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)
        torch.testing.assert_close(lse, want_lse.double(), rtol=1e-9, atol=1e-9, msg=name)


def test_only_constructs_that_both_supported_versions_have(corpus) -> None:
    for spec in corpus.values():
        source = emit(spec).source
        for gone in ("tl.advance", "make_block_ptr", "tl.atomic_load", "tl.atomic_store", "approx="):
            assert gone not in source


def test_the_pointer_type_of_every_kernel_argument_is_known(corpus) -> None:
    for spec in corpus.values():
        kernel = next(
            n for n in ast.walk(ast.parse(emit(spec).source)) if getattr(n, "name", "") == "site_0_kernel"
        )
        names = {a.arg for a in kernel.args.args if not a.annotation}  # the others are constants
        types, ones = argument_types(canonical(spec))
        bounds = {f"{x}_ptr" for x in REACHES if reach(spec.mask, x)}
        assert names | {"all_heads", "section"} | bounds == set(types) | set(ones)


def test_a_bias_that_broadcasts_over_queries_is_loaded_as_one_row(corpus) -> None:
    uses = {x.operand.name: x for x in name_inputs(corpus["biases"])}
    assert (uses["ext"].axes, uses["rel"].axes, uses["m"].axes) == ("bk", "hqk", "bqk")
    assert "[:, None]" not in uses["ext"].load(masked=False)


def test_a_tensor_used_in_two_ways_is_one_argument_with_two_uses(corpus) -> None:
    uses = name_inputs(corpus["packed"])
    assert [(x.tensor, x.name, x.axes) for x in uses] == [
        ("tensor0", "valid0", "bk"),
        ("tensor0", "valid1", "bq"),
    ]
    assert "def attend(q, k, v, tensor0):" in emit(corpus["packed"]).source


def test_a_tensor_that_nothing_reads_is_accepted(corpus) -> None:
    spec = parse(str(corpus["causal"]) + " with extra=bhqk[b,h,s,t]:float32")
    assert "def attend(q, k, v, unused0):" in emit(spec).source


def test_the_canonical_form_is_its_own_and_has_the_same_broadcasts(corpus) -> None:
    for spec in corpus.values():
        own = canonical(spec)
        assert canonical(own) == own
        assert [x.axes for x in name_inputs(own)] == [x.axes for x in name_inputs(spec)]
        assert [x.name for x in name_inputs(own)] == [x.name for x in name_inputs(spec)]
        assert parse(str(own)) == own


def test_names_lengths_and_head_counts_do_not_make_another_kernel() -> None:
    text = (
        "attn q=bhqd[{b},8,{s},32]:float16 k=bhkd[{b},4,{s},32]:float16 v=bhke[{b},4,{s},32]:float16 group=2"
        " scale(0.5) bias({n}) mask=(causal & padding(key,{m})) fill(replace,-inf) softmax"
        " with {m}=bk[{b},{s}]:bool with {n}=bhqk[{b},1,1,{s}]:float16"
    )
    specs = [
        parse(text.format(b="s7", s="s9", n="mul_3", m="eq_1")),
        parse(text.format(b="batch", s="seq", n="mul_30", m="eq_10")),
        parse(text.format(b=2, s=128, n="view", m="other")),
    ]
    assert len({emit(s).source for s in specs}) == 1
    assert [k.name for k in emit_all([*specs, specs[0], parse(str(specs[0]).replace("0.5", "0.25"))])] == [
        "site_0",
        "site_1",
    ]


def test_a_batch_of_one_does_not_make_an_axis_broadcast() -> None:
    text = "attn q=bhqd[1,2,s,32]:float16 k=bhkd[1,2,s,32]:float16 v=bhke[1,2,s,32]:float16"
    spec = parse(text + " group=1 bias(x) mask=none softmax with x=bhqk[1,1,s,s]:float16")
    assert canonical(spec).captured[0].shape == ("b", 1, "sq", "sk")


def test_a_model_without_any_kernel_says_why(corpus) -> None:
    wide = parse(str(corpus["plain"]).replace("32]:", "600]:"))
    with pytest.raises(UnsupportedError, match="expected fixed head sizes of 1 to 576"):
        emit_all([wide, wide])
    with pytest.raises(UnsupportedError, match="found none: no sites"):
        emit_all([])
    assert [k.name for k in emit_all([wide, corpus["plain"]])] == ["site_0"]
    assert emit_all([str(corpus["plain"])]) == emit_all([corpus["plain"]])


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (
            ("32]:", "600]:"),
            "triton-head-size",
            r"expected fixed head sizes of 1 to 576, found \(600, 600, 600\)",
        ),
        (("32]:", "d]:"), "triton-head-size", "fixed head sizes"),
        (("float32", "float64"), "triton-dtype", "found torch.float64"),
        (
            ("k=bhkd[b,hkv,t,32]:float32", "k=bhkd[b,hkv,t,32]:float16"),
            "triton-dtype",
            "torch.float16, torch.float32",
        ),
        ((" softmax", " softmax dropout(1.0)"), "triton-dropout", "expected dropout above 0 and below 1"),
        (
            ("[b,t]:bool", "[b,t]:int64"),
            "triton-captured",
            "pad is torch.int64, expected torch.bool",
        ),
        (("bk[b,t]:bool", "bhqk[b,1,1,t]:bool"), "triton-captured", "expected the axes bk"),
    ],
)
def test_what_no_kernel_serves_is_refused_with_a_reason(change, code: str, why: str, corpus) -> None:
    spec = parse(str(corpus["bert"]).replace(*change))
    miss = can_run(spec)
    assert miss is not None
    assert (miss.code, miss.node) == (code, "q")
    with pytest.raises(UnsupportedError, match=why):
        emit(spec)


def test_the_whole_corpus_can_run(corpus) -> None:
    assert {name: can_run(spec) for name, spec in corpus.items()} == dict.fromkeys(corpus)


def test_a_kernel_needs_an_identifier_for_a_name(corpus) -> None:
    with pytest.raises(
        CodegenError, match=r"expected a Python identifier as the kernel's name, found 'layers\.0'"
    ):
        emit(corpus["plain"], name="layers.0")


def test_a_file_without_a_spec_is_refused() -> None:
    with pytest.raises(CodegenError, match="line 'spec    attn"):
        spec_of("import torch\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 16, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["plain", "biases"])
def test_default_tiles_fit_into_shared_memory(name: str, dtype: torch.dtype, size: int, corpus) -> None:
    operands = {
        n: dataclasses.replace(o, shape=(*o.shape[:3], size), dtype=dtype)
        for n, o in _qkv(corpus[name]).items()
    }
    spec = dataclasses.replace(corpus[name], **operands)
    for arch, config in choose(spec).items():
        if arch in SHARED_LIMIT:
            assert shared_bytes(spec, arch, config) <= SHARED_LIMIT[arch], arch


def _qkv(spec):
    return {"q": spec.q, "k": spec.k, "v": spec.v}


def test_a_model_gets_a_file_per_computation_and_kind(corpus) -> None:
    causal, mixed = corpus["causal"], corpus["mixed"]
    kernels = emit_all([causal, causal, mixed], kinds=("forward", "backward"))
    assert [k.name for k in kernels] == ["site_0", "site_0_backward", "site_1"]  # no backward of mixed dtypes
    assert [kind_of(k.source) for k in kernels] == ["forward", "backward", "forward"]
    with pytest.raises(CodegenError, match=r"expected a kind of kernel among forward, .*, found 'sideways'"):
        emit_all([causal], kinds=("sideways",))
