"""Formulas mean the same in every backend that takes masks: graph nodes, flex, ONNX, kernel text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.codegen.flex.source import source
from attnc.codegen.sdpa.lower import _keep
from attnc.codegen.triton import tiles
from attnc.codegen.triton.emit import can_run
from attnc.codegen.triton.inputs import name_inputs
from attnc.editing import Builder
from attnc.ir import AttentionSpec, Operand
from attnc.mask_tiles import FULL, MIXED, SKIP, classify
from attnc.masks import Grid
from attnc.printer import parse_mask

B, H, SQ, SK = 2, 2, 12, 16
TEXTS = (
    "chunk(4)",
    "(causal & chunk(5))",
    "blocks(3)",
    "stride(3)",
    "stride(3,2)",
    "~stride(2)",
    "(causal | prefix(far))",
    "(causal & document(own,ids))",
    "{where(q%7<=3,2,5)==where(k%7<=3,2,5)}",
    "{(q-k)//3<=1}",
    "{k+5<=Sk-b*2}",
    "{(k+h)%2==0}",
    "{own[b,q]<=ids[b,k]+1}",
    "{Sk-Sq<=(k-q)*2}",
)
IDS = {"own": ("bq", (B, SQ)), "ids": ("bk", (B, SK)), "far": ("b", (B,))}


def spec_of(text: str) -> AttentionSpec:
    mask = parse_mask(text)
    q = Operand("q", "bhqd", (B, H, SQ, 8), torch.float32)
    k, v = (Operand(n, axes, (B, H, SK, 8), torch.float32) for n, axes in (("k", "bhkd"), ("v", "bhke")))
    captured = tuple(Operand(n, IDS[n][0], IDS[n][1], torch.int64) for n in mask.operands)
    return AttentionSpec(q, k, v, 1, mask=mask, captured=captured)


def tensors(spec: AttentionSpec) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    out = {o.name: torch.randn(o.shape, generator=g) for o in (spec.q, spec.k, spec.v)}
    ids = {o.name: torch.randint(0, 4, o.shape, generator=g) for o in spec.captured}
    return out | {n: x * 4 if n == "far" else x for n, x in ids.items()}


def expected(spec: AttentionSpec, data: dict[str, Tensor]) -> Tensor:
    return spec.mask.keep(Grid(SQ, SK, torch.device("cpu"), data, B, H)).expand(B, H, SQ, SK)


@pytest.mark.parametrize("text", TEXTS)
def test_graph_nodes(text):
    spec = spec_of(text)
    data = tensors(spec)
    names = ["q", "k", "v", *(o.name for o in spec.captured)]
    graph = make_fx(lambda *x: x[0] + 0, tracing_mode="fake")(*data.values()).graph
    inputs = dict(zip(names, (n for n in graph.nodes if n.op == "placeholder"), strict=True))
    output = next(n for n in graph.nodes if n.op == "output")
    build = Builder(graph).before(output)
    keep = _keep(build, spec.mask, inputs, inputs["q"], inputs["k"])
    output.args = (keep,)
    run = torch.fx.GraphModule({}, graph)
    found = run(*(data[n] for n in names))
    assert found.dim() == 4
    assert torch.equal(found.expand(B, H, SQ, SK), expected(spec, data))


@pytest.mark.parametrize("text", TEXTS)
def test_flex_text_and_tiles(text):
    spec = spec_of(text)
    data = tensors(spec)
    scope: dict = {}
    exec(source(spec), scope)
    lengths = torch.tensor([SQ, SK])
    _, mask_mod = scope["modifiers"](*(data[o.name] for o in spec.captured), lengths)
    b, h, q, k = (torch.arange(n) for n in (B, H, SQ, SK))
    whole = mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], k[None, :])
    keep = expected(spec, data)
    assert torch.equal(whole.expand(B, H, SQ, SK), keep)
    for block in (2, 4, 5):
        found = classify(spec.mask, SQ, SK, (block, block))
        for i in range(found.shape[0]):
            for j in range(found.shape[1]):
                tile = keep[..., i * block : (i + 1) * block, j * block : (j + 1) * block]
                one = int(found[i, j])
                assert one == MIXED or bool(tile.all()) == bool(tile.any()) == (one == FULL)


def test_flex_skips_what_chunks_hide():
    found = classify(parse_mask("(causal & chunk(4))"), 12, 12, (4, 4))
    assert found.tolist() == [[MIXED, SKIP, SKIP], [SKIP, MIXED, SKIP], [SKIP, SKIP, MIXED]]


class Truncated(int):
    """An integer as a kernel has it: division rounds towards zero, and the remainder has the sign of x."""

    def __floordiv__(self, n):
        return Truncated(math.trunc(int(self) / n))

    def __mod__(self, n):
        return Truncated(math.fmod(int(self), n))

    def __add__(self, n):
        return Truncated(int(self) + int(n))

    def __sub__(self, n):
        return Truncated(int(self) - int(n))

    def __mul__(self, n):
        return Truncated(int(self) * int(n))

    __rmul__ = __mul__


@pytest.mark.parametrize("text", TEXTS)
def test_kernel_text(text):
    spec = spec_of(text)
    assert can_run(spec) is None
    data = tensors(spec)
    inputs = name_inputs(spec)
    keep = expected(spec, data)
    names = {x.name: x for x in inputs}
    code = compile(tiles.keep(spec.mask, inputs), "keep", "eval")

    class Language:
        @staticmethod
        def where(c, a, b):
            return a if c else b

    for b, h, q, k in itertools.product(*map(range, (B, H, SQ, SK))):
        at = {"b": b, "q": q, "k": k}
        own = {n: Truncated(data[x.operand.name][tuple(at[a] for a in x.layout)]) for n, x in names.items()}
        numbers = {"batch": b, "head": h, "qi": q, "ki": k, "sq": SQ, "sk": SK}
        scope = {**{n: Truncated(x) for n, x in numbers.items()}, "tl": Language, **own}
        assert bool(eval(code, scope) & 1) == bool(keep[b, h, q, k])


@pytest.mark.parametrize("text", TEXTS)
def test_onnx_operators(text):
    ir = pytest.importorskip("onnx_ir")
    ort = pytest.importorskip("onnxruntime")
    from attnc.codegen.onnx.builder import Builder as OnnxBuilder
    from attnc.codegen.onnx.builder import onnx_dtype
    from attnc.codegen.onnx.masks import keep

    spec = spec_of(text)
    data = tensors(spec)
    values = {
        o.name: ir.Value(name=o.name, type=ir.TensorType(onnx_dtype(o.dtype)), shape=ir.Shape(o.shape))
        for o in (spec.q, spec.k, *spec.captured)
    }
    b = OnnxBuilder("mask")
    out = keep(b, spec.mask, values["q"], values["k"], values)
    graph = ir.Graph(list(values.values()), [out], nodes=b.nodes, opset_imports={"": 18}, name="mask")
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    read = {i.name for i in session.get_inputs()}
    (found,) = session.run(None, {n: x.numpy() for n, x in data.items() if n in read})
    assert torch.equal(torch.from_numpy(found).expand(B, H, SQ, SK), expected(spec, data))
