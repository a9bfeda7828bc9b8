from __future__ import annotations

import pytest
import torch

from attnc.codegen.triton import launch, run
from attnc.codegen.triton.launch import launcher
from attnc.printer import parse


def draw(spec, *, dtype=None, sk: int = 5):
    sizes = {"b": 1, "h": 2 * spec.group_size, "hkv": 2, "s": 3, "t": sk}
    shapes = ([sizes.get(d, d) for d in o.shape] for o in (spec.q, spec.k, spec.v))
    return [torch.randn(s).to(dtype or spec.q.dtype) for s in shapes]


def test_a_spec_that_no_kernel_serves_runs_as_plain_torch_and_says_so(corpus, caplog) -> None:
    launch.launcher.cache_clear()
    launch._warn.cache_clear()  # it says a thing once per process
    spec = parse(str(corpus["causal"]).replace("float32", "float64"))
    q, k, v = draw(spec)
    torch.testing.assert_close(run(spec, q, k, v), spec(q, k, v))
    assert "the site runs as plain torch" in caplog.text


def test_tensors_of_another_dtype_run_as_plain_torch_and_say_so(corpus, caplog) -> None:
    spec = corpus["causal"]
    q, k, v = draw(spec, dtype=torch.float64)
    torch.testing.assert_close(run(spec, q, k, v), spec(q, k, v))
    assert "expected dtypes and head sizes" in caplog.text


def test_no_keys_at_all_is_what_the_spec_says(corpus) -> None:
    spec = corpus["causal"]
    q, k, v = draw(spec, sk=0)
    out, lse = run(spec, q, k, v)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_kernel_on_cpu_tensors_asks_for_the_interpreter(corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = corpus["causal"]
    with pytest.raises(ValueError, match="expected tensors on a GPU, or TRITON_INTERPRET=1"):
        run(spec, *draw(spec))


def test_free_head_sizes_are_those_of_the_call(corpus, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    spec = parse(str(corpus["causal"]).replace("32]:", "d]:"))
    q, k, v = (x[..., :20] for x in draw(corpus["causal"]))
    with pytest.raises(ValueError, match="expected tensors on a GPU, or TRITON_INTERPRET=1"):
        run(spec, q, k, v)  # from the kernel for heads of 20
    assert launcher(spec.with_head_sizes(20, 20)) is launcher(spec.with_head_sizes(20, 20)) is not None
    wide = [torch.randn(1, n, 3, 600) for n in (4, 2, 2)]
    torch.testing.assert_close(run(spec, *wide), spec(*wide))  # no kernel has heads as wide


def test_wrong_inputs_of_a_kernel_are_named(corpus) -> None:
    attend = launcher(corpus["bert"])
    q, k, v = draw(corpus["bert"])
    pad = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"k: expected torch\.float32 \[1, 2, 5, 32\], found torch\.float32 \[1, 2, 5, 16\]"
    ):
        attend(q, k[..., :16], v, pad)
    with pytest.raises(
        ValueError, match=r"q: expected torch\.float32 \[1, 2, 3, 32\], found torch\.float32 \[1, 1, 3, 32\]"
    ):
        attend(q[:, :1], k, v, pad)
    with pytest.raises(ValueError, match=r"valid: expected what broadcasts to \[1, 5\], found \[1, 4\]"):
        attend(q, k, v, pad[:, :4])
    with pytest.raises(ValueError, match=r"valid: expected torch\.bool, found torch\.float32"):
        attend(q, k, v, pad.float())
    with pytest.raises(ValueError, match="expected at least one key"):
        attend(q, k[:, :, :0], v[:, :, :0], pad[:, :0])


def test_the_launcher_is_emitted_once_per_spec(corpus) -> None:
    assert launcher(corpus["plain"]) is launcher(parse(str(corpus["plain"])))
    assert launcher(corpus["plain"], kind="decode") is not launcher(corpus["plain"])


@pytest.mark.parametrize(
    ("sq", "sk", "kind"),
    [(1, 512, "decode"), (16, 4096, "decode"), (1, 511, "forward"), (17, 4096, "forward")],
)
def test_few_queries_of_many_keys_have_the_keys_cut_into_shares(sq, sk, kind, corpus, monkeypatch) -> None:
    chosen = []
    monkeypatch.setattr(launch, "launcher", lambda spec, place, kind: chosen.append(kind))
    spec = corpus["plain"]
    q, k, v = torch.randn(1, 2, sq, 32), torch.randn(1, 1, sk, 32), torch.randn(1, 1, sk, 32)
    torch.testing.assert_close(run(spec, q, k, v), spec(q, k, v))
    assert chosen == [kind]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "left_padded", "window_and_sinks", "biases", "sink_logits"])
def test_attend_on_a_gpu_equals_the_executed_spec(name: str, corpus) -> None:
    spec = corpus[name]
    sizes = {"b": 2, "h": 2 * spec.group_size, "hkv": 2, "s": 200, "t": 200}
    tensors = []
    for o in (spec.q, spec.k, spec.v, *spec.captured):
        x = torch.randn([sizes.get(d, d) for d in o.shape])
        tensors.append((x > 0 if o.dtype == torch.bool else x.to(o.dtype)).cuda())
    q, k, v, *captured = tensors
    out, lse = torch.ops.attnc.attend(q, k, v, captured, str(spec))
    want, want_lse = spec(*(x.double() for x in (q, k, v)), tuple(captured))
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(
        out.double(), want, rtol=0, atol=4 * eps * v.abs().max().item(), equal_nan=True
    )
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
