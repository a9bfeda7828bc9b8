"""What is read computes what ONNX's own evaluator computes, at sizes that the reader did not know."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import sympy
import torch
from onnx.reference import ReferenceEvaluator
from torch import fx

from attnc.codegen.onnx.reading import Reading, read
from attnc.codegen.onnx.reading.reader import size_in_file, unread
from attnc.errors import CodegenError

SIZES = {"B": 2, "S": 5, "T": 3}


def model_of(inputs: str, body: str, out: str = "float[N] out", opset: int = 18) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "other" : 1]> g ({inputs}) => ({out}) {{ {body} }}'
    )


class Run(fx.Interpreter):
    """Run what was read; sizes that the file computes come from the sizes of the inputs."""

    def __init__(self, reading: Reading, sizes: dict[str, int]) -> None:
        super().__init__(fx.GraphModule({}, reading.graph))
        self.sizes = {
            sympy.Symbol(s, positive=True, integer=True): sizes[n] for s, n in reading.names.items()
        }

    def run_node(self, n: fx.Node) -> Any:
        if n.target is size_in_file:
            return int(n.meta["val"].node.expr.subs(self.sizes))
        return super().run_node(n)


def feeds_of(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    g, out = np.random.default_rng(0), {}
    for value in proto.graph.input:
        shape = [d.dim_value or SIZES[d.dim_param] for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        x = (
            g.standard_normal(shape)
            if dtype.kind == "f"
            else g.integers(0, 2 if dtype.kind == "b" else 3, shape)
        )
        out[value.name] = x.astype(dtype)
    return out


def check(proto: onnx.ModelProto) -> Reading:
    reading = read(ir.serde.deserialize_model(proto))
    assert not reading.unread, reading.unread
    feeds = feeds_of(proto)
    with np.errstate(invalid="ignore"):
        expected = ReferenceEvaluator(proto).run(None, feeds)[0]
    given = [
        torch.from_numpy(feeds[reading.links[n.name].name])
        if n.name in reading.links and reading.links[n.name].name in feeds
        else reading.tensors[n.name]
        for n in reading.graph.nodes
        if n.op == "placeholder"
    ]
    (found,) = Run(reading, SIZES).run(*given)
    assert tuple(found.shape) == tuple(np.shape(expected))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    return reading


X = "float[B,S,4] x"
QK = "float[B,4,S,8] q, float[B,4,T,8] k"
CASES = {
    "matmul": ("float[B,S,4] x, float[4,3] y", "out = MatMul(x, y)"),
    "matmul-vector": ("float[B,S,4] x, float[4] y", "out = MatMul(x, y)"),
    "gemm": ("float[S,4] x, float[3,4] y, float[3] c", "out = Gemm<transB=1,alpha=0.5,beta=2.0>(x, y, c)"),
    "gemm-no-bias": ("float[4,S] x, float[4,3] y", "out = Gemm<transA=1,alpha=0.5>(x, y)"),
    "einsum": (QK, 'out = Einsum<equation="bhqd,bhkd->bhqk">(q, k)'),
    "transpose": (QK, "out = Transpose<perm=[0,2,1,3]>(q)"),
    "transpose-all": (X, "out = Transpose(x)"),
    "softmax": (X, "out = Softmax<axis=1>(x)"),
    "log-softmax": (X, "out = LogSoftmax(x)"),
    "sub-from-number": (X, "c = Constant<value_float=1.0>() out = Sub(c, x)"),
    "number-over": (X, "c = Constant<value_float=2.0>() out = Div(c, x)"),
    "number-of-rank-1": ("float[S] x", "c = Constant<value=float[1,1] {3.0}>() out = Mul(x, c)"),
    "pow": (X, "c = Constant<value_float=2.0>() out = Pow(x, c)"),
    "greater-than-number": (X, "c = Constant<value_float=0.5>() m = Greater(x, c) out = Cast<to=1>(m)"),
    "number-less-than": (X, "c = Constant<value_float=0.5>() m = Less(c, x) out = Cast<to=1>(m)"),
    "where-fill": (
        "bool[B,1,4] m, float[B,S,4] x",
        "c = Constant<value_float=-3.0>() out = Where(m, c, x)",
    ),
    "where-other-fill": (
        "bool[B,1,4] m, float[B,S,4] x",
        "c = Constant<value_float=-3.0>() out = Where(m, x, c)",
    ),
    "where-fill-broadcasts-up": (
        "bool[4] m, float[4] x",
        "c = Constant<value=float[1,1] {2.0}>() out = Where(m, c, x)",
    ),
    "int-division": ("int64[S] x", "c = Constant<value_int=2>() d = Div(x, c) out = Cast<to=1>(d)"),
    "mod": ("int64[S] x", "c = Constant<value_int=2>() d = Mod(x, c) out = Cast<to=1>(d)"),
    "clip": (X, "lo = Constant<value_float=-0.5>() hi = Constant<value_float=0.5>() out = Clip(x, lo, hi)"),
    "max-of-three": (
        "float[S,4] x, float[4] y, float[1] z",
        "out = Max(x, y, z)",
    ),
    "reduce-max": (X, "a = Constant<value_ints=[-1]>() out = ReduceMax<keepdims=1>(x, a)"),
    "reduce-mean-13": (X, "out = ReduceMean<axes=[1],keepdims=0>(x)", 13),
    "reduce-all": (X, "out = ReduceSum<keepdims=0>(x)"),
    "logsumexp": (X, "a = Constant<value_ints=[-1]>() out = ReduceLogSumExp<keepdims=0>(x, a)"),
    "l2": (X, "a = Constant<value_ints=[-1]>() out = ReduceL2(x, a)"),
    "layer-norm": (
        "float[B,S,4] x, float[4] w, float[4] b",
        "out = LayerNormalization<epsilon=0.01>(x, w, b)",
    ),
    "reshape-zero-and-rest": (X, "s = Constant<value_ints=[0,-1,2,2]>() out = Reshape(x, s)"),
    "reshape-by-shape": (
        "float[B,S,8] x",
        "s = Shape(x) z = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>() b = Gather(s, z)"
        " n = Gather(s, one) h = Constant<value_ints=[2]>() d = Constant<value_ints=[-1]>()"
        " to = Concat<axis=0>(b, n, h, d) out = Reshape(x, to)",
    ),
    "reshape-by-product": (
        "float[B,S,8] x",
        "s = Shape<start=0,end=2>(x) n = ReduceProd<keepdims=1>(s) d = Constant<value_ints=[8]>()"
        " to = Concat<axis=0>(n, d) out = Reshape(x, to)",
    ),
    "flatten": ("float[B,S,2,4] x", "out = Flatten<axis=2>(x)"),
    "flatten-tail": ("float[B,S,T] x", "out = Flatten<axis=1>(x)"),
    "flatten-all": ("float[B,S] x", "out = Flatten<axis=0>(x)"),
    "unsqueeze": (X, "a = Constant<value_ints=[0,-1]>() out = Unsqueeze(x, a)"),
    "unsqueeze-11": (X, "out = Unsqueeze<axes=[1,2]>(x)", 11),
    "squeeze": ("float[B,1,S,1] x", "a = Constant<value_ints=[1]>() out = Squeeze(x, a)"),
    "squeeze-all-ones": ("float[4,1,S,1] x", "out = Squeeze(x)"),
    "expand-grouped-heads": (
        "float[B,2,S,4] k",
        "a = Constant<value_ints=[2]>() u = Unsqueeze(k, a) s = Shape(k) zero = Constant<value_ints=[0]>()"
        " two = Constant<value_ints=[2]>() b = Gather(s, zero) n = Gather(s, two)"
        " h = Constant<value_ints=[2]>() g = Constant<value_ints=[3]>() d = Constant<value_ints=[4]>()"
        " to = Concat<axis=0>(b, h, g, n, d) e = Expand(u, to) t = Constant<value_ints=[0,6,-1,4]>()"
        " out = Reshape(e, t)",
    ),
    "expand-of-torchscript": (
        "float[1,1,S] x, float[B,4] y",
        "s = Shape<start=0,end=1>(y) m = Constant<value_ints=[-1]>() m2 = Constant<value_ints=[-1]>()"
        " want = Concat<axis=0>(s, m, m2) three = Constant<value_ints=[3]>()"
        " ones = ConstantOfShape<value=int64[1] {1}>(three) neg = Constant<value_int=-1>()"
        " minus = Mul(ones, neg) same = Equal(want, minus) to = Where(same, ones, want) out = Expand(x, to)",
    ),
    "tile": ("float[S,4] x", "r = Constant<value_ints=[2,3]>() out = Tile(x, r)"),
    "slice": (
        X,
        "a = Constant<value_ints=[1,1]>() e = Constant<value_ints=[9223372036854775807,-1]>()"
        " ax = Constant<value_ints=[1,2]>() st = Constant<value_ints=[2,1]>() out = Slice(x, a, e, ax, st)",
    ),
    "slice-to-a-size": (
        "float[S,4] x, float[1,64] table",
        "s = Shape<start=0,end=1>(x) z = Constant<value_ints=[0]>() ax = Constant<value_ints=[1]>()"
        " out = Slice(table, z, s, ax)",
    ),
    "slice-backwards": (
        "float[S,4] x",
        "a = Constant<value_ints=[-1]>() e = Constant<value_ints=[-9223372036854775807]>()"
        " ax = Constant<value_ints=[1]>() st = Constant<value_ints=[-1]>() out = Slice(x, a, e, ax, st)",
    ),
    "split": ("float[S,6] x", "p = Constant<value_ints=[2,4]>() y, out = Split<axis=-1>(x, p)"),
    "split-equal": ("float[S,6] x", "y, out = Split<axis=1,num_outputs=2>(x)"),
    "split-11": ("float[S,6] x", "y, out = Split<axis=1,split=[2,4]>(x)", 11),
    "concat": ("float[B,S,4] x, float[B,T,4] y", "out = Concat<axis=1>(x, y)"),
    "gather-one": (X, "i = Constant<value_int=0>() out = Gather<axis=1>(x, i)"),
    "gather-rows": ("float[9,4] t, int64[B,S] i", "out = Gather(t, i)"),
    "gather-axis": ("float[B,9] t, int64[S] i", "out = Gather<axis=1>(t, i)"),
    "gather-elements": ("float[B,9] t, int64[B,S] i", "out = GatherElements<axis=1>(t, i)"),
    "gather-nd": ("float[4,9] t, int64[S,T,2] i", "out = GatherND(t, i)"),
    "trilu": ("float[S,S] x", "k = Constant<value_int=1>() out = Trilu<upper=1>(x, k)"),
    "tril": ("float[S,S] x", "out = Trilu<upper=0>(x)"),
    "cumsum": ("int64[B,S] x", "a = Constant<value_int=1>() c = CumSum(x, a) out = Cast<to=1>(c)"),
    "range": (
        "float[S,4] x",
        "s = Shape<start=0,end=1>(x) n = Squeeze(s) z = Constant<value_int=0>() o = Constant<value_int=1>()"
        " r = Range(z, n, o) out = Cast<to=1>(r)",
    ),
    "constant-of-shape": (
        "float[S,T] x",
        "s = Shape(x) out = ConstantOfShape<value=float[1] {-2.0}>(s)",
    ),
    "size-in-arithmetic": (
        "int64[S] x",
        "s = Shape(x) y = Sub(s, x) out = Cast<to=1>(y)",
    ),
    "size-as-scalar": (
        "float[S,4] x",
        "s = Shape<start=0,end=1>(x) n = Squeeze(s) r = Mul(n, n) out = Cast<to=1>(r)",
    ),
    "pad": (X, "p = Constant<value_ints=[0,1,0,0,2,0]>() out = Pad(x, p)"),
    "conv": ("float[B,3,8,8] x, float[4,3,2,2] w", "out = Conv<strides=[2,2],pads=[1,0,0,1]>(x, w)"),
    "nan-to-zero": (
        "float[B,S] x",
        "l = Log(x) n = IsNaN(l) z = Constant<value_float=0.0>() out = Where(n, z, l)",
    ),
    "erf": (X, "out = Erf(x)"),
    "dropout": (X, "out = Dropout(x)"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_computes_the_same(name: str) -> None:
    inputs, body, *opset = CASES[name]
    check(model_of(inputs, body, opset=int(opset[0]) if opset else 18))


def test_softmax_before_opset_13_runs_over_all_later_axes_as_one() -> None:
    proto = model_of("float[B,3,4] x", "out = Softmax<axis=1>(x)", opset=11)
    reading = read(ir.serde.deserialize_model(proto))
    x = torch.from_numpy(feeds_of(proto)["x"])
    (found,) = Run(reading, SIZES).run(x)
    torch.testing.assert_close(found, x.flatten(1).softmax(1).view_as(x))


def test_shape_arithmetic_leaves_no_calls() -> None:
    inputs, body = CASES["reshape-by-shape"]
    reading = check(model_of(inputs, body))
    names = [
        str(n.target) for n in reading.graph.nodes if n.op == "call_function" and n.target is not size_in_file
    ]
    assert names == ["aten.reshape.default"]


def test_sizes_with_two_names_that_meet_become_one() -> None:
    reading = read(ir.serde.deserialize_model(model_of("float[B,S] x, float[B,T] y", "out = Add(x, y)")))
    assert reading.equal in ({"S": "T"}, {"T": "S"})
    assert not reading.unread
    (out,) = [n for n in reading.graph.nodes if n.op == "call_function"]
    assert len(set(map(str, out.meta["val"].shape))) == 2


def test_unknown_operator_stays_opaque_with_the_shape_the_file_says() -> None:
    proto = model_of("float[B,S] x", "y = other.Thing(x) out = Exp(y)", "float[B,S] out")
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B", "S"])
    proto.graph.value_info.append(y)
    reading = read(ir.serde.deserialize_model(proto))
    assert reading.unread == {"other.Thing": (1, "it is not in the standard domain")}
    targets = [n.target for n in reading.graph.nodes if n.op == "call_function"]
    assert targets == [unread, torch.ops.aten.exp.default]


def test_without_a_shape_what_follows_is_opaque_too() -> None:
    proto = model_of("float[B,S] x", "y = other.Thing(x) out = Exp(y)", "float[B,S] out")
    reading = read(ir.serde.deserialize_model(proto))
    assert set(reading.unread) == {"other.Thing", "Exp"}


def test_input_without_shape_is_one_clear_error() -> None:
    proto = model_of("float[B,S] x", "out = Exp(x)")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(CodegenError, match=r"input 'x'.*number of axes.*no shape"):
        read(ir.serde.deserialize_model(proto))


def test_graph_inside_of_a_node_keeps_what_it_reads_alive() -> None:
    body = (
        "e = Exp(x) c = ReduceMax<keepdims=0>(x) z = Constant<value_float=0.0>() b = Greater(c, z)"
        " out = If (b) <then_branch = t () => (float[B,S] y) { y = Neg(e) },"
        " else_branch = f () => (float[B,S] w) { w = Abs(e) }>"
    )
    reading = read(ir.serde.deserialize_model(model_of("float[B,S] x", body, "float[B,S] out")))
    (exp,) = [n for n in reading.graph.nodes if n.target is torch.ops.aten.exp.default]
    assert [u.target for u in exp.users] == [unread]


CHUNKS = (
    "s = Shape(x) i = Constant<value_ints=[0]>() b = Gather(s, i) j = Constant<value_ints=[1]>()"
    " n = Gather(s, j) e = Constant<value_ints=[8]>() t = Div(n, e) to = Concat<axis=0>(b, t, e)"
)


def test_size_that_is_parted_into_chunks_is_a_multiple() -> None:
    body = f"{CHUNKS} out = Reshape(x, to)"
    reading = read(ir.serde.deserialize_model(model_of("float[B,S] x", body)))
    assert {n: str(other) for n, other in reading.equal.items()} == {"S": "8 * (S/8)"}
    assert not reading.unread


def test_size_of_which_a_sum_meets_a_number_is_a_number() -> None:
    body = f"{CHUNKS} y = Reshape(x, to) a = Slice(y, j, m, j) out = Add(a, k)"
    inputs = "float[B,S] x, float[6,8] k"
    body = body.replace(" y = ", " m = Constant<value_ints=[-1]>() y = ")
    reading = read(ir.serde.deserialize_model(model_of(inputs, body)))
    assert {n: str(other) for n, other in reading.equal.items()} == {"S": "8 * (S/8)", "S/8": "8"}
    assert not reading.unread


def test_size_that_a_reshape_fixes_is_a_number() -> None:
    body = "s = Constant<value_ints=[6,4]>() out = Reshape(x, s)"
    reading = read(ir.serde.deserialize_model(model_of("float[B,3,4] x", body)))
    assert reading.equal == {"B": 2}
    assert not reading.unread


def test_weight_that_a_caller_may_replace_has_no_known_values() -> None:
    proto = model_of("float[2] c, float[B,2] x", "out = Mul(x, c)")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(2, 3.0, np.float32), "c"))
    reading = read(ir.serde.deserialize_model(proto))
    assert reading.tensors == {"c": None}


def test_operator_without_a_rule_keeps_the_shape_that_onnx_infers() -> None:
    body = "k = Constant<value_ints=[2]>() v, i = TopK<axis=-1>(x, k) out = Exp(v)"
    reading = read(ir.serde.deserialize_model(model_of("float[B,5] x", body)))
    assert set(reading.unread) == {"TopK"}
    (exp,) = [n for n in reading.graph.nodes if n.target is torch.ops.aten.exp.default]
    batch, two = exp.meta["val"].shape
    assert (reading.names[str(batch)], two) == ("B", 2)


def test_length_that_a_stored_table_limits_is_a_condition() -> None:
    inputs, body = CASES["slice-to-a-size"]
    reading = read(ir.serde.deserialize_model(model_of(inputs, body)))
    assert reading.assumed == ("S <= 64",)


def test_what_small_constants_make_is_a_constant() -> None:
    body = "a = Constant<value_float=16.0>() b = Sqrt(a) c = Div(x, b) lo = Neg(b) out = Clip(c, lo, b)"
    reading = check(model_of("float[B,S] x", body))
    (clamp,) = [n for n in reading.graph.nodes if n.target is torch.ops.aten.clamp.default]
    assert clamp.args[1:] == (-4.0, 4.0)


def test_size_that_meets_a_sum_of_sizes_leaves_the_node_opaque() -> None:
    body = "c = Concat<axis=0>(x, y) out = Add(c, z)"
    reading = read(ir.serde.deserialize_model(model_of("float[S,4] x, float[T,4] y, float[B,4] z", body)))
    assert set(reading.unread) == {"Add"}
    assert not reading.equal


def test_sizes_that_the_file_writes_as_expressions_are_those_of_the_inputs() -> None:
    proto = model_of("float[B,S] x", "y = other.Thing(x) out = Exp(y)", "float[B,S] out")
    name = "S - Mod(S, 4) + 2*B"
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [name]))
    reading = read(ir.serde.deserialize_model(proto))
    assert sorted(reading.names.values()) == ["B", "S"]


def test_size_that_is_negative_for_small_inputs_leaves_the_shape_unknown() -> None:
    proto = model_of("float[B,S] x", "y = other.Thing(x) out = Exp(y)", "float[B,S] out")
    proto.graph.value_info.append(
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["S - 900"])
    )
    assert set(read(ir.serde.deserialize_model(proto)).unread) == {"other.Thing", "Exp"}
