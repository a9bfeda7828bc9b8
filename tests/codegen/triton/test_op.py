from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from attnc.codegen.triton import emit
from attnc.codegen.triton import op as ops
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.contest import Lengths, draw
from attnc.codegen.triton.op import replace_attends, triton_op_for
from attnc.errors import CodegenError, UnsupportedError
from attnc.ir import AttentionSpec
from attnc.printer import parse

SIZES = Lengths(2, 2, 100, 120)
NAMES = ("plain", "left_padded", "biases", "sink_logits", "packed")


class Site(torch.nn.Module):
    """A model of one site, whose inputs are all the tensors of a spec."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, tensors):
        return (self.operator(*tensors)[0],)


def lengths_of(spec: AttentionSpec) -> Lengths:
    return Lengths(2, 2, 120, 120) if "padding(query" in str(spec.mask) else SIZES


def on_a_gpu(spec: AttentionSpec, mode: FakeTensorMode) -> tuple[torch.Tensor, ...]:
    """Return tensors of a spec that hold no data and say that they are on a GPU."""
    with mode:
        return tuple(
            torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in draw(spec, lengths_of(spec), "cpu")
        )


@pytest.fixture
def gpu_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let triton believe that there is an H100, as far as its intermediate code goes."""
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns of its next default


def launches(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is triton_kernel_wrap.triton_kernel_wrapper_functional]


def decomposed(program: ExportedProgram) -> fx.Graph:
    """Return the graph that a compiler gets: what AOTAutograd makes of an exported program."""
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return aot_export_module(program.module(check_guards=False), values, trace_joint=False)[0].graph


def exported(operator, spec: AttentionSpec, tensors) -> ExportedProgram:
    """Return the program of one site whose batch and lengths may vary."""
    operands = (spec.q, spec.k, spec.v, *spec.captured)
    shapes = tuple(
        {at: Dim.AUTO if size in ("b", "sq", "sk") else None for at, size in enumerate(o.shape)}
        for o in operands
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(Site(operator), (tensors,), strict=False, dynamic_shapes=(shapes,))


@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_sees_the_launch_and_nothing_that_waits_for_the_gpu(name, corpus, gpu_target) -> None:
    spec = canonical(corpus[name])
    operator = triton_op_for(spec, "sm_90")
    tensors = on_a_gpu(spec, FakeTensorMode(shape_env=ShapeEnv()))
    program = exported(operator, spec, tensors)
    assert [n.target for n in program.graph.nodes].count(operator._opoverload) == 1
    graph = decomposed(program)
    (launch,) = launches(graph)
    assert sorted(launch.kwargs["tensors_to_clone"]) == ["lse_ptr", "out_ptr"]  # inputs are not written to
    calls = {n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    names = {call.overloadpacket.__name__ for call in calls}
    assert names <= {"empty", "expand", "view", "sym_size", "sym_stride", "_assert_tensor_metadata"}
    for moving in ("sq", "sk", "q_b"):  # not the lengths it was traced with
        assert isinstance(launch.kwargs["kwargs"][moving], fx.Node), moving
    assert isinstance(launch.kwargs["grid"][0][0], fx.Node)


def test_no_launch_of_the_corpus_looks_at_data(corpus) -> None:
    for name, found in corpus.items():
        spec = canonical(found)
        tensors = on_a_gpu(spec, FakeTensorMode())
        module, operator = ops._traceable(emit(spec, name="attend"), "sm_90"), triton_op_for(spec)
        with tensors[0].fake_mode:  # raises where a value is asked for
            out, lse = module.attend(*tensors)
            rule = operator(*tensors)
        assert out.shape == (*tensors[0].shape[:3], spec.v.shape[3]), name
        assert (out.dtype, lse.dtype) == (spec.q.dtype, torch.float32), name
        assert (out.stride(), lse.stride()) == tuple(x.stride() for x in rule), name
        assert (out.dtype, lse.dtype) == tuple(x.dtype for x in rule), name


def test_the_test_above_can_fail() -> None:
    with FakeTensorMode(), pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        torch.empty(3, device="cuda").sum().item()


def test_one_operator_per_kernel_and_architecture(corpus) -> None:
    spec = corpus["left_padded"]
    operator = triton_op_for(spec)
    assert triton_op_for(canonical(spec)) is operator
    assert triton_op_for(parse(str(spec).replace("pad)", "other)").replace("pad=", "other="))) is operator
    assert triton_op_for(spec, "sm_90") is not operator
    assert triton_op_for(parse(str(spec).replace("scale(0.125)", "scale(0.5)"))) is not operator
    key = emit(spec, name="attend").key
    assert operator._opoverload._schema.name == f"attnc::attend_{key}"
    assert triton_op_for(spec, "sm_90")._opoverload._schema.name == f"attnc::attend_{key}_sm_90"


def test_every_tensor_is_an_argument_of_its_own(corpus) -> None:
    for name in NAMES:
        schema = triton_op_for(corpus[name])._opoverload._schema
        assert {str(a.type) for a in schema.arguments} == {"Tensor"}
        assert len(schema.arguments) == 3 + len(corpus[name].captured)


def test_torch_knows_whose_kernel_an_operator_starts(corpus) -> None:
    from torch._library.triton import get_triton_kernels_for_op

    operator = triton_op_for(corpus["causal"])
    (kernel,) = get_triton_kernels_for_op(operator._opoverload._schema.name)
    assert kernel.fn.__name__ == "attend_kernel"


def test_what_no_kernel_serves_is_refused(corpus) -> None:
    double = parse(str(corpus["causal"]).replace("float32", "float64"))
    with pytest.raises(UnsupportedError, match="expected q, k, v in one of float16"):
        triton_op_for(double)
    with pytest.raises(CodegenError, match=r"expected one of sm_80, .* found 'sm_17'"):
        triton_op_for(corpus["causal"], "sm_17")


def test_tensors_that_do_not_fit_the_kernel_are_refused_without_data(corpus) -> None:
    operator = triton_op_for(corpus["causal"])
    with FakeTensorMode():
        q, k, narrow = (torch.empty(1, h, 5, d, device="cuda") for h, d in ((4, 32), (2, 32), (2, 16)))
        for tensors in ((q, narrow, k), (q, k, narrow), (q, q, q)):
            with pytest.raises(ValueError, match="expected the heads and head sizes of"):
                operator(*tensors)


@pytest.mark.parametrize("name", ["plain", "biases", "sink_logits"])
def test_opcheck_on_the_cpu(name: str, corpus) -> None:
    spec = wide(corpus[name])
    tensors = draw(canonical(spec), Lengths(1, 2, 5, 7), "cpu")
    grads = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
    torch.library.opcheck(triton_op_for(spec)._opoverload, tuple(grads))


def wide(spec: AttentionSpec) -> AttentionSpec:
    return parse(str(spec).replace("float16", "float32"))


def test_gradients_and_vmap_are_those_of_attend(corpus) -> None:
    spec = canonical(corpus["biases"])
    operator, text = triton_op_for(spec), str(spec)

    def attend(q, k, v, *captured):
        return torch.ops.attnc.attend(q, k, v, list(captured), text)

    results = []
    for call in (operator, attend):
        tensors = [
            x.requires_grad_() if x.is_floating_point() else x for x in draw(spec, Lengths(2, 1, 5, 7), "cpu")
        ]
        out, lse = call(*tensors)
        (out.square().sum() + lse.sum()).backward()
        mapped = torch.vmap(call, in_dims=(0, None, None, None, None, None))(
            tensors[0][None].detach(), *tensors[1:]
        )
        results.append([out, lse, *(x.grad for x in tensors if x.is_floating_point()), *mapped])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_tangents_are_those_of_attend(corpus) -> None:
    spec = canonical(corpus["left_padded"])
    operator = triton_op_for(spec, "sm_90")
    q, k, v, *captured = draw(spec, SIZES, "cpu")
    results = []
    for call in (
        lambda q: operator(q, k, v, *captured),
        lambda q: torch.ops.attnc.attend(q, k, v, captured, str(spec)),
    ):
        gradient = torch.func.grad(lambda q, f=call: torch.func.jvp(lambda q: f(q)[1].sum(), (q,), (q,))[1])
        results.append((torch.func.jvp(call, (q,), (q,)), gradient(q)))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)
    assert results[0][0][1][0].abs().sum() > 0


def test_a_gradient_is_computed_only_where_it_is_asked_for(corpus) -> None:
    q, k, v, *captured = draw(canonical(corpus["biases"]), Lengths(1, 1, 5, 7), "cpu")
    out, _ = triton_op_for(corpus["biases"])(q, k.requires_grad_(), v, *captured)
    out.sum().backward()
    assert k.grad is not None
    assert (q.grad, v.grad, captured[0].grad) == (None, None, None)


def graph_of(spec: AttentionSpec, tensors) -> ExportedProgram:
    def attend(q, k, v, *captured):
        return torch.ops.attnc.attend(q, k, v, list(captured), str(spec))

    return exported(attend, spec, tensors)


@pytest.mark.parametrize("name", ["plain", "left_padded"])
def test_attend_nodes_become_operators_of_their_kernels(name: str, corpus) -> None:
    spec = canonical(wide(corpus[name]))
    tensors = draw(spec, SIZES, "cpu")
    program = graph_of(spec, tensors)
    want = program.module()(tensors)[0]
    assert replace_attends(program.graph, "sm_90") == {"triton": 1, "attend": 0}
    program.graph_module.recompile()
    program.validate()
    targets = [n.target for n in program.graph.nodes]
    assert triton_op_for(spec, "sm_90")._opoverload in targets
    assert torch.ops.attnc.attend.default not in targets
    assert torch.equal(program.module()(tensors)[0], want)


def test_head_sizes_that_a_spec_leaves_free_are_those_of_the_tensors(corpus) -> None:
    spec = canonical(corpus["causal"])
    program = graph_of(spec.with_head_sizes("d", "e"), draw(spec, SIZES, "cpu"))
    assert replace_attends(program.graph) == {"triton": 1, "attend": 0}
    assert triton_op_for(spec)._opoverload in [n.target for n in program.graph.nodes]


def test_attend_nodes_that_no_kernel_serves_stay_and_are_named(corpus, caplog) -> None:
    spec = canonical(corpus["causal"])
    double = tuple(x.double() for x in draw(spec, SIZES, "cpu"))
    program = graph_of(spec, double)
    assert replace_attends(program.graph) == {"triton": 0, "attend": 1}
    assert "stays attnc::attend: expected dtypes and head sizes" in caplog.text
    other = parse(str(spec).replace("float32", "float64"))
    program = graph_of(other, double)
    assert replace_attends(program.graph) == {"triton": 0, "attend": 1}
    assert "expected q, k, v in one of float16" in caplog.text


class Capped(torch.nn.Module):
    """Attention that SDPA does not have, beside one that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(48, 144)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (9, 16)).transpose(1, 2).chunk(3, 1)
        scores = 3.0 * torch.tanh(q @ k.mT / 3.0)
        return torch.softmax(scores, -1) @ v + torch.softmax(q @ k.mT * 0.25, -1) @ v


def test_packages_hold_plain_aten_or_kernels_and_nothing_of_ours() -> None:
    import attnc
    from attnc.session import session

    model, x = Capped().eval(), torch.randn(2, 11, 48)
    fast = attnc.optimize(model, (x,), cost_model=False)
    (program,) = session(fast).packages("sm_90")
    targets = [str(n.target) for n in program.graph.nodes]
    assert "attnc.attend.default" not in targets
    assert "aten.scaled_dot_product_attention.default" in targets
    assert next(t for t in targets if t.startswith("attnc.attend_")).endswith("_sm_90.default")
    torch.testing.assert_close(program.module()(x=x), model(x))
    assert [n for n in session(fast).attends[0].graph.nodes if n.target is torch.ops.attnc.attend.default]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "left_padded", "biases", "sink_logits"])
def test_compiled_and_replayed_on_a_gpu_it_equals_attend(name: str, corpus) -> None:
    spec = canonical(corpus[name])
    tensors = draw(spec, SIZES, "cuda")
    want = torch.ops.attnc.attend(*tensors[:3], list(tensors[3:]), str(spec))
    operator = triton_op_for(spec)
    compiled = torch.compile(lambda *x: operator(*x), fullgraph=True, dynamic=True)
    eps = torch.finfo(spec.q.dtype).eps
    for got in (operator(*tensors), compiled(*tensors), replayed(operator, tensors)):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=4 * eps, atol=4 * eps, equal_nan=True)


def replayed(operator, tensors):
    """Return what a CUDA graph of one call gives: capture fails where anything waits for the GPU."""
    operator(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operator(*tensors)
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.gpu
@pytest.mark.slow
def test_a_package_runs_without_attnc(tmp_path) -> None:
    import attnc
    from attnc.codegen.triton.picks import place_of
    from attnc.session import session

    model = Capped().eval().to("cuda", torch.float16)
    x = torch.randn(2, 11, 48, device="cuda", dtype=torch.float16)
    fast = attnc.optimize(model, (x,), cost_model=False)
    (program,) = session(fast).packages(place_of(x[:, None], x[:, None]).arch)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save({"x": x, "want": model(x).detach()}, tmp_path / "tensors.pt")
    code = (
        "import sys, torch; found = torch.load(sys.argv[2], weights_only=True);"
        "out = torch._inductor.aoti_load_package(sys.argv[1])(x=found['x']);"
        "torch.testing.assert_close(out, found['want'], rtol=1e-2, atol=1e-2);"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'attnc']"
    )
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "tensors.pt"], check=True)
