"""Edits of a graph: nodes with types, equal calls once, sizes from the inputs, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from attnc import expr as E
from attnc.editing import Builder, erase, fake_mode_of
from attnc.errors import RewriteError
from attnc.sizes import dim

aten = torch.ops.aten
X, Y = torch.randn(3, 5), torch.randn(5, 7)


def trace(f, *args: Tensor, symbolic: bool = False) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(f, tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)(*args)


def export(f, *args: Tensor) -> fx.Graph:
    class Module(torch.nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return f(*xs)

    return torch.export.export(Module(), args, strict=False).graph


def output(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "output")


def targets(graph: fx.Graph) -> list[str]:
    return [n.target.__name__ for n in graph.nodes if n.op == "call_function"]


def inputs(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


# ---------------------------------------------------------------- building


def test_a_new_node_has_a_value_a_stamp_and_the_origin_of_its_neighbour():
    graph = export(lambda x: x.softmax(-1), X)
    softmax = next(n for n in graph.nodes if n.op == "call_function")
    build = Builder(graph).before(softmax, {"match": "here"})
    node = build.call(aten.mul.Tensor, inputs(graph)[0], 2.0)
    assert node.meta["val"].shape == (3, 5)
    assert node.meta["attnc"] == {"match": "here"}
    assert node.meta["stack_trace"] == softmax.meta["stack_trace"]
    assert node.next is softmax


def test_equal_calls_are_made_once():
    module = trace(lambda x: x.softmax(-1), X)
    x = inputs(module.graph)[0]
    build = Builder(module.graph).before(output(module.graph))
    first = build.call(aten.mul.Tensor, x, 2)
    assert build.call(aten.mul.Tensor, x, 2) is first
    assert build.call(aten.mul.Tensor, x, 2.0) is not first
    assert build.call(aten.mul.Tensor, x, 3) is not first


def test_an_equal_call_that_comes_too_late_is_made_again():
    module = trace(lambda x: (x + 1) * 2, X)
    first, second = (n for n in module.graph.nodes if n.op == "call_function")
    build = Builder(module.graph)
    late = build.before(second).call(aten.neg.default, inputs(module.graph)[0])
    early = build.before(first).call(aten.neg.default, inputs(module.graph)[0])
    assert early is not late
    assert early < first < late


def test_an_equal_call_that_was_erased_is_made_again():
    module = trace(lambda x: x + 1, X)
    build = Builder(module.graph).before(output(module.graph))
    gone = build.call(aten.neg.default, inputs(module.graph)[0])
    module.graph.erase_node(gone)
    assert not build.call(aten.neg.default, inputs(module.graph)[0])._erased


def test_sizes_come_from_the_inputs():
    module = trace(lambda x, y: (x @ y).reshape(-1), X, Y, symbolic=True)
    graph = module.graph
    build = Builder(graph).before(output(graph))
    x, y = inputs(graph)
    (s, t), u = map(dim, x.meta["val"].shape), dim(y.meta["val"].shape[1])
    wanted = E.add(E.mul(E.integer(3), E.mul(s, u)), E.neg(t), E.integer(4))
    assert build.knows(wanted)
    node = build.size(wanted)
    made = {n for n in graph.nodes if n.meta.get("attnc_top")}
    assert node in made
    assert all(n < next(m for m in graph.nodes if m.op == "call_function" and m not in made) for n in made)
    output(graph).args = (node,)
    graph.lint()
    module.recompile()
    assert module(torch.randn(4, 6), torch.randn(6, 9)) == 3 * 4 * 9 - 6 + 4
    assert build.size(E.integer(7)) == 7


def test_sizes_are_still_made_first_when_the_first_node_is_gone():
    module = trace(lambda x, y: (x * 2, y * 3), X, Y, symbolic=True)
    graph = module.graph
    first, second = (n for n in graph.nodes if n.op == "call_function")
    build = Builder(graph).before(second)
    s, t = (dim(n) for n in inputs(graph)[0].meta["val"].shape)
    one = build.size(s)
    output(graph).args = ((second,),)
    erase(graph, [first])
    product = build.size(E.mul(s, t))
    output(graph).args = ((one, product, second),)
    graph.lint()
    module.recompile()
    assert module(torch.randn(4, 6), Y)[:2] == (4, 24)


def test_a_size_that_nothing_has_is_refused():
    build = Builder(trace(lambda x: x + 1, X).graph)
    assert not build.knows(E.size("nowhere"))
    with pytest.raises(RewriteError, match="size nowhere is no polynomial of the sizes of the inputs"):
        build.size(E.size("nowhere"))


def test_a_size_of_a_neighbour_is_read_there():
    def nonzero_rows(x: Tensor) -> Tensor:
        return x.nonzero() * 2

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nonzero_rows(x)

    graph = torch.export.export(Module(), (X,), strict=False, dynamic_shapes=({0: Dim.AUTO},)).graph
    found = next(n for n in graph.nodes if "nonzero" in n.name)
    unbacked = dim(found.meta["val"].shape[0])
    build = Builder(graph).before(output(graph))
    assert not build.knows(unbacked)
    assert build.knows(unbacked, found)
    assert build.size(unbacked, found).target is aten.sym_size.int


def test_views_that_change_nothing_are_not_made():
    module = trace(lambda x: x + 1, X)
    x = inputs(module.graph)[0]
    build = Builder(module.graph).before(output(module.graph))
    sizes = (E.integer(3), E.integer(5))
    assert build.reshape(x, sizes) is x
    assert build.expand(x, sizes) is x
    assert build.permute(x, (0, 1)) is x
    steps = (
        ("reshape", (E.integer(5), E.integer(3))),
        ("select", (0, E.integer(1))),
        ("slice", (0, E.ZERO, E.ONE)),
    )
    assert build.apply(x, steps).meta["val"].shape == (1,)
    with pytest.raises(AssertionError, match="unknown view step 'twist'"):
        build.apply(x, (("twist", ()),))


def test_a_graph_without_types_is_refused():
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(RewriteError, match="expected a graph traced with fake tensors"):
        fake_mode_of(graph)


# ---------------------------------------------------------------- erasing


def after_erasing(graph: fx.Graph, name: str, **kwargs) -> list[str]:
    """Make the output read the first input, erase what is called ``name`` and return what is left."""
    root = next(n for n in graph.nodes if n.name == name)
    end = output(graph)
    end.args = ((inputs(graph)[0],),)
    erase(graph, [root], **kwargs)
    graph.lint()
    return targets(graph)


def test_dropout_and_asserts_do_not_keep_anything():
    def f(x: Tensor, y: Tensor) -> Tensor:
        w = torch.nn.functional.dropout((x @ y).double().softmax(-1), 0.3, True)
        return w.to(torch.float32)

    graph = export(f, X, Y)
    assert "_assert_tensor_metadata.default" in targets(graph)
    last = output(graph).args[0][0]
    assert after_erasing(graph, last.name) == []


def test_what_others_read_stays():
    graph = trace(lambda x, y: (((x @ y) * 2).exp(), (x @ y).sum()), X, Y).graph
    root = output(graph).args[0][0]
    output(graph).args = ((output(graph).args[0][1],),)
    gone = erase(graph, [root])
    assert sorted(gone) == ["exp", "matmul", "mul"]
    assert targets(graph) == ["matmul.default", "sum.default"]


def test_readers_that_nobody_reads_go_with_their_own_sources():
    def f(x: Tensor, y: Tensor) -> Tensor:
        w = x @ y
        w + y.exp().sum()
        return w.softmax(-1)

    graph = export(f, X, Y)
    assert "add.Tensor" in targets(graph)
    assert after_erasing(graph, output(graph).args[0][0].name) == []


def test_named_nodes_and_inputs_stay():
    graph = trace(lambda x, y: (x @ y).exp(), X, Y).graph
    assert after_erasing(graph, "exp", keep=frozenset({"matmul"})) == ["matmul.default"]
    assert len(inputs(graph)) == 2


def test_writes_to_memory_of_the_dead_go_and_others_stay():
    def own(x: Tensor, y: Tensor) -> Tensor:
        w = x @ y
        w.mul_(2.0)
        w.view(-1).add_(1.0)
        return w.exp()

    def of_an_input(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2.0)
        return (x @ y).exp()

    def read_elsewhere(x: Tensor, y: Tensor) -> Tensor:
        w = x @ y
        w.mul_(2.0)
        return w.exp() + 0 * w.sum()

    graph = export(own, X, Y)
    assert after_erasing(graph, "exp") == []
    graph = export(of_an_input, X.clone(), Y)
    assert after_erasing(graph, "exp") == ["mul_.Tensor"]
    graph = export(read_elsewhere, X, Y)
    total = next(n for n in graph.nodes if n.name == "sum_1")
    exp = next(n for n in graph.nodes if n.name == "exp")
    output(graph).args = ((total,),)
    for user in list(exp.users):
        graph.erase_node(user)
    erase(graph, [exp])
    assert "mul_.Tensor" in targets(graph)
