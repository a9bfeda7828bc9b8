"""Emitted kernels with dropout, under Triton's interpreter: a part of the corpus, and all of it if slow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnc.codegen.dropout import keep
from attnc.codegen.ops import execute, gradients
from attnc.codegen.triton import can_run, emit, run
from attnc.codegen.triton import op as ops
from attnc.codegen.triton.aot import report_rows
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.contest import Lengths, disagreement, draw, limits
from attnc.codegen.triton.kinds import KINDS, TARGETS
from attnc.codegen.triton.launch import backward_launcher, launcher, run_backward
from attnc.codegen.triton.op import replace_attends, triton_op_for
from attnc.codegen.triton.store import load
from attnc.errors import UnsupportedError
from attnc.printer import parse
from tests.codegen.triton.test_interpreted import NAMES

SERVED = ("forward", "backward")
SOME = ("mask_as_bias", "sigmoid")
"""Rows of fills and of NaN, with a group; weights that no sum divides."""
SHARES = ("below_zero", "settled", "vanishing")
"""Specs of interpret_backward.py: what sums of weights may come to."""
SEED = torch.tensor([11])


def dropping(spec, rate: float = 0.3):
    return dataclasses.replace(spec, dropout=rate)


@pytest.fixture(scope="session")
def some(interpret):
    return interpret("interpret_dropout.py", "short", "masks", *SOME)


def check(found, name: str) -> None:
    rows = {run: row for run, row in found.items() if name in run.split()}
    assert len(rows) >= 2, name
    for run_, row in rows.items():
        if run_.startswith("self-test"):
            assert row["code"] == 0, row["text"]
        elif "forward" in run_:
            assert row["out"] <= 1, run_
            assert row["lse"] <= 1, run_
            assert row["strange"], run_
            assert row["strange_lse"], run_
        else:
            assert max(row["errors"]) <= 1, run_
            assert row["undefined"] == 0, run_


@pytest.mark.parametrize("name", SOME)
def test_results_and_gradients_are_those_of_plain_torch_with_the_same_seed(name: str, some) -> None:
    check(some, name)


def test_kernels_of_any_tile_keep_just_the_weights_that_plain_torch_keeps(some) -> None:
    assert some["masks"]["same"]


@pytest.mark.slow
def test_results_and_gradients_of_the_whole_corpus_are_those_of_plain_torch(interpret) -> None:
    every = [*NAMES, *SHARES]
    for at in range(0, len(every), 8):
        names = every[at : at + 8]
        found = interpret("interpret_dropout.py", *names)
        for name in names:
            check(found, name)


@pytest.mark.slow
def test_the_self_test_notices_every_broken_file(interpret) -> None:
    found = interpret("interpret_dropout.py", "broken")
    assert len(found) >= 16
    assert [run for run, row in found.items() if not row["noticed"]] == []


def test_what_is_served_without_dropout_is_served_with_it_by_two_kinds_alone(corpus) -> None:
    for name, spec in corpus.items():
        for kind in KINDS:
            found, bare = can_run(dropping(spec), kind), can_run(spec, kind)
            if kind in SERVED:
                assert (found and found.code) == (bare and bare.code), (name, kind)
            elif bare is None:
                assert found.code == "triton-dropout"
                assert found.why == f"triton: expected dropout 0 in {kind} kernels, found 0.3"


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, 1 - 2.0**-40])
def test_a_rate_that_leaves_nothing_or_is_no_rate_is_refused(rate: float, corpus) -> None:
    miss = can_run(dropping(corpus["plain"], rate))
    assert miss.code == "triton-dropout"
    assert miss.why == f"triton: expected dropout above 0 and below 1, found {rate}"


def test_rates_do_not_share_a_file_and_names_do(corpus) -> None:
    spec = corpus["causal"]
    keys = {emit(dropping(spec, rate), kind=kind).key for rate in (0.0, 0.1, 0.2) for kind in SERVED}
    assert len(keys) == 6
    assert emit(dropping(spec)).key == emit(canonical(dropping(spec))).key


def test_golden_files(corpus, golden) -> None:
    for kind in SERVED:
        end = "" if kind == "forward" else f"_{kind}"
        spec = dropping(corpus["capped_half"])
        golden(f"kernel/dropout{end}.py", emit(spec, name=f"dropout{end}", kind=kind).source)


def drawn(spec, sq: int = 3, sk: int = 5) -> tuple[torch.Tensor, ...]:
    return draw(canonical(spec), Lengths(1, 2, sq, sk), "cpu")


def test_a_call_that_no_kernel_serves_drops_the_same_weights_in_plain_torch(corpus) -> None:
    spec = parse(str(dropping(corpus["plain"])).replace("float16", "float64"))
    q, k, v, seed = drawn(spec)
    found = run(spec, q, k, v, [], seed)
    torch.testing.assert_close(found, execute(spec, q, k, v, seed=seed))
    dout, needs = torch.randn_like(found[0]), [True] * 3
    grads = run_backward(spec, q, k, v, [], *found, dout, None, needs, seed)
    torch.testing.assert_close(grads, gradients(spec, q, k, v, [], dout, None, needs, seed))


def test_kernels_want_their_seed(corpus, monkeypatch) -> None:
    spec = dropping(corpus["plain"])
    q, k, v, seed = drawn(spec)
    with pytest.raises(UnsupportedError, match=r"expected a seed for the rate 0\.3, found none"):
        run(spec, q, k, v)
    with pytest.raises(ValueError, match=r"seed: expected torch\.int64 \[1\], found torch\.int32 \[1\]"):
        launcher(canonical(spec))(q, k, v, seed.int())
    out, lse = execute(spec, q, k, v, seed=seed)
    with pytest.raises(ValueError, match=r"seed: expected torch\.int64 \[1\], found torch\.int64 \[2\]"):
        backward_launcher(canonical(spec))(q, k, v, seed.repeat(2), out, lse, out)


def test_the_operator_of_a_kernel_takes_the_seed_last(corpus) -> None:
    spec = canonical(dropping(parse(str(corpus["biases"]))))
    operator, text = triton_op_for(spec), str(spec)
    assert [a.name for a in operator._opoverload._schema.arguments][-1] == "seed"

    def attend(*x: torch.Tensor):
        return torch.ops.attnc.attend(*x[:3], list(x[3:-1]), text, x[-1])

    tensors = drawn(spec)
    torch.library.opcheck(operator._opoverload, tensors)
    results = []
    for call in (operator, attend):
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors]
        out, lse = call(*leaves)
        floats = [x for x in leaves if x.is_floating_point()]
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), floats)
        dims = (0, *(None for _ in tensors[2:]), 0)
        mapped = torch.vmap(call, in_dims=dims)(tensors[0][None], *tensors[1:-1], tensors[-1][None])
        tangent = torch.func.jvp(lambda q, f=call: f(q, *tensors[1:]), (tensors[0],), (tensors[0],))[1]
        results.append([out, lse, *grads, *mapped, *tangent])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_attend_nodes_with_a_seed_become_operators_of_their_kernels(corpus) -> None:
    spec = canonical(dropping(parse(str(corpus["plain"]).replace("float16", "float32"))))
    text = str(spec)

    class Site(torch.nn.Module):
        def forward(self, q, k, v, seed):
            return torch.ops.attnc.attend(q, k, v, [], text, seed)[0]

    tensors = drawn(spec)
    program = torch.export.export(Site(), tensors, strict=False)
    want = program.module()(*tensors)
    assert replace_attends(program.graph, "sm_90") == {"triton": 1, "attend": 0}
    program.graph_module.recompile()
    assert torch.equal(program.module()(*tensors), want)


def test_no_launch_with_a_seed_looks_at_data(corpus) -> None:
    spec = canonical(dropping(corpus["causal"]))
    module, operator = ops._traceable(emit(spec, name="attend"), "sm_90"), triton_op_for(spec)
    with FakeTensorMode():  # raises where a value is asked for
        tensors = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in drawn(spec)
        ]
        out, lse = module.attend(*tensors)
        assert [x.shape for x in operator(*tensors)] == [out.shape, lse.shape]


def test_tensors_to_tune_on_have_a_seed_which_the_reference_takes_too(corpus) -> None:
    spec = canonical(dropping(corpus["biases"]))
    tensors = drawn(spec, 40, 40)
    assert (tensors[-1].dtype, tensors[-1].shape) == (torch.int64, (1,))
    module = load(emit(spec, name="tuned"))
    out, lse = execute(spec, *tensors[:3], tensors[3:-1], seed=tensors[-1])
    allowed = limits(module, spec, tensors, (out, lse))
    assert disagreement(module.reference(*tensors), (out, lse), allowed) is None
    other = module.reference(*tensors[:-1], tensors[-1] + 1)
    assert "output 0 is off" in disagreement(other, (out, lse), allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("name", NAMES)
def test_the_emitted_file_passes_its_own_test_on_a_gpu(name: str, kind: str, corpus) -> None:
    spec = dropping(corpus[name])
    if can_run(spec, kind) is None:
        assert load(emit(spec, name=f"{name}_{kind}", kind=kind)).main() == 0


@pytest.mark.gpu
def test_a_gpu_keeps_just_the_weights_that_plain_torch_keeps() -> None:
    text = (
        "attn q=bhqd[b,h,s,64]:float16 k=bhkd[b,h,t,64]:float16 v=bhke[b,h,t,64]:float16 group=1 mask=none"
        " softmax dropout(0.1)"
    )
    q, k, v = torch.zeros(2, 3, 300, 64), torch.zeros(2, 3, 500, 64), torch.zeros(2, 3, 500, 64)
    v[:, :, 400:464] = torch.eye(64)
    out, _ = torch.ops.attnc.attend(*(x.half().cuda() for x in (q, k, v)), [], text, SEED.cuda())
    assert torch.equal(out.cpu() > 0, keep(SEED, 0.1, (2, 3, 300, 500))[..., 400:464])


MIN = -3.4028234663852886e38
TEXT = (
    "attn q=bhqd[b,h,s,{d}]:bfloat16 k=bhkd[b,hkv,t,{d}]:bfloat16 v=bhke[b,hkv,t,{d}]:bfloat16 group=4"
    " scale(0.125) {}"
)
CASES = {
    "causal": "mask=causal fill(replace,-inf) softmax dropout(0.1)",
    "padded": f"mask=(causal & padding(key,pad)) fill(replace,{MIN}) softmax dropout(0.1)"
    " with pad=bk[b,t]:bool",
    "biased": "bias(x) mask=none softmax dropout(0.1) with x=bhqk[b,h,s,t]:bfloat16",
}


def spills(d: int, case: str, kind: str, targets: tuple[str, ...]) -> list[dict[str, object]]:
    """Return the programs whose default tiles do not compile within registers and shared memory."""
    kernel = emit(parse(TEXT.format(CASES[case], d=d)), name="site", kind=kind)
    rows = report_rows(kernel, targets)
    assert rows
    return [r for r in rows if r["error"] or r["over_limit"] or r["stack"] or r["spills"]]


@pytest.mark.parametrize("kind", SERVED)
def test_default_tiles_do_not_spill_on_hopper(kind: str) -> None:
    assert spills(64, "causal", kind, ("sm_90",)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("d", [64, 128])
def test_default_tiles_do_not_spill(d: int, case: str, kind: str) -> None:
    assert spills(d, case, kind, TARGETS) == []


def test_four_weights_share_the_work_of_drawing_them() -> None:
    text = TEXT.format(CASES["causal"], d=64)
    turns = []
    for spec in (parse(text), parse(text.replace(" dropout(0.1)", ""))):
        row = report_rows(emit(spec, name="site"), ("sm_80",))[0]
        turns.append(row["loop_instructions"])
    weights = row["block_m"] * row["block_n"] // (32 * row["warps"])
    assert 10 < (turns[0] - turns[1]) / weights < 25  # a counter takes about 70
