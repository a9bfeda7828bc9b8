from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnc.capture.alias import op_name
from attnc.region import Dataflow, Region, widen
from attnc.rounding import FILL, Rounding
from attnc.verify.record import record

AUTO = torch.export.Dim.AUTO


def trace(module, *inputs, dynamic=True):
    shapes = tuple({i: AUTO for i, n in enumerate(x.shape) if n > 1} for x in inputs) if dynamic else None
    return torch.export.export(module, inputs, strict=False, dynamic_shapes=shapes).graph


def output_of(graph):
    return next(n for n in graph.nodes if n.op == "output").args[0][0].name


def named(graph, op):
    return [n.name for n in graph.nodes if n.op == "call_function" and op_name(n) == op]


class Attention(nn.Module):
    def forward(self, x, mask):
        q, k, v = x * 1.0, x * 2.0, x * 3.0
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        n = x.shape[-2]
        causal = torch.ones(n, n).tril().bool()
        scores = scores.masked_fill(~(causal & mask[:, None, None, :]), torch.finfo(torch.float32).min)
        return torch.softmax(scores, -1) @ v


@pytest.fixture(scope="module")
def attention():
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    return trace(Attention(), x, mask), x, mask


def region_of(graph):
    return Region(graph, output_of(graph), (*named(graph, "mul"), "mask"))


def values_of(graph, region, **inputs):
    return record(graph, inputs, (*region.inputs, *region.needs))


def test_region_runs_what_lies_behind_its_boundary(attention):
    graph, x, mask = attention
    region = region_of(graph)
    assert region.inputs == ("mul", "mul_1", "mul_2", "mask")
    assert not set(region.inputs) & {n.name for n in region.nodes}
    assert torch.equal(region.run(values_of(graph, region, x=x, mask=mask)), Attention()(x, mask))


def test_needs_are_what_does_not_depend_on_the_boundary(attention):
    graph, _, _ = attention
    region = region_of(graph)
    flow = Dataflow(graph)
    below = flow.depends_on_values({flow.node(n) for n in region.inputs})
    assert region.needs
    assert not {flow.node(n) for n in region.needs} & below
    assert all(n in below for n in region.nodes)


def test_sizes_of_inputs_are_computed_in_the_region():
    class Mean(nn.Module):
        def forward(self, x):
            y = x * 2.0
            return y.sum(1) / y.shape[1]

    graph = trace(Mean(), torch.ones(3, 5))
    region = Region(graph, output_of(graph), named(graph, "mul"))
    values = values_of(graph, region, x=torch.ones(2, 7))
    assert torch.equal(region.run(values), torch.full((2,), 2.0))


def test_fp64_runs_every_floating_dtype_wide():
    class Casts(nn.Module):
        def forward(self, x):
            y = x * 1.0
            low = torch.softmax(y, -1, dtype=torch.float32).to(torch.bfloat16).float()
            made = torch.full((4,), 1 / 3, dtype=torch.bfloat16) + torch.zeros(4) + torch.arange(4.0) / 3
            return low + made

    x = torch.randn(2, 4, dtype=torch.bfloat16)
    graph = trace(Casts(), x, dynamic=False)
    region = Region(graph, output_of(graph), named(graph, "mul"))
    values = values_of(graph, region, x=x)
    exact = region.run(values, dtype=torch.float64)
    assert exact.dtype == torch.float64
    true = torch.softmax(x.double(), -1)
    offset = exact - true
    assert float((offset - offset[:1]).abs().max()) < 1e-15, "rounded somewhere on the way"
    assert region.run(values).dtype == torch.float32


def test_fp64_keeps_a_fill_absorbing():
    class Filled(nn.Module):
        def forward(self, x):
            return torch.softmax(x * 1.0 + -1e9, -1)

    x = torch.randn(2, 5)
    graph = trace(Filled(), x, dynamic=False)
    region = Region(graph, output_of(graph), ("x",))
    plain = torch.softmax(x.double() - 1e9, -1)
    assert float((plain - 0.2).abs().max()) > 1e-3, "in fp64 the number itself absorbs nothing"
    assert torch.allclose(region.run({"x": x}, dtype=torch.float64), torch.full((2, 5), 0.2).double())
    assert torch.equal(region.run({"x": x}), Filled()(x))


def test_widen_enlarges_fills_and_nothing_else():
    x = torch.tensor([1.5, -torch.inf, torch.nan, FILL, -1e9, torch.finfo(torch.float32).min])
    wide = widen(x)
    assert wide.dtype == torch.float64
    assert torch.equal(wide[:3].nan_to_num(7.0), x[:3].double().nan_to_num(7.0))
    assert bool((wide[3:].abs() > 1e90).all())
    assert bool(wide[3:].isfinite().all())
    counts = torch.arange(3)
    assert widen(counts) is counts


def test_gradients_flow_in_both_precisions(attention):
    graph, x, mask = attention
    region = region_of(graph)
    fixed = values_of(graph, region, x=x, mask=mask)
    grads = []
    for dtype in (None, torch.float64):
        q = x.to(dtype or x.dtype).clone().requires_grad_()
        region.run({**fixed, "mul": q}, dtype=dtype).square().sum().backward()
        assert q.grad is not None
        grads.append(q.grad)
    assert grads[1].dtype == torch.float64
    assert float((grads[0] - grads[1]).abs().max()) < 1e-4 * float(grads[1].abs().max())


class Writes(nn.Module):
    def forward(self, x, mask):
        y = x * 1.0
        z = y + 1.0
        first = z[0]
        first.zero_()
        z.masked_fill_(mask, -5.0)
        return z * 2.0


def test_writes_in_place_belong_to_the_region_and_spare_the_given_values():
    x, mask = torch.randn(3, 4), torch.eye(3, 4).bool()
    graph = trace(Writes(), x, mask, dynamic=False)
    for boundary in (("mul", "mask"), ("add", "mask")):
        region = Region(graph, output_of(graph), boundary)
        given = x.clone() if boundary[0] == "mul" else x + 1
        before = given.clone()
        assert torch.equal(region.run({boundary[0]: given, "mask": mask}), Writes()(x, mask))
        assert torch.equal(given, before)


def test_writes_to_what_does_not_depend_on_the_boundary_are_not_lost():
    class Table(nn.Module):
        def forward(self, x):
            table = torch.ones(3, 4)
            table[0].mul_(7.0)
            return x * 1.0 + table

    x = torch.randn(3, 4)
    graph = trace(Table(), x, dynamic=False)
    region = Region(graph, output_of(graph), ("x",))
    values = values_of(graph, region, x=x)
    assert torch.equal(region.run(values), Table()(x))
    assert torch.equal(region.run(values), Table()(x)), "the second run starts from the same values"


def test_no_grad_sub_graphs_run_in_fp64_as_well():
    class Switched(nn.Module):
        def forward(self, x):
            y = x * 1.0
            with torch.no_grad():
                z = (y / 3).to(torch.float32) * 7
            return y + z

    x = torch.randn(4)
    exported = torch.export.export(Switched(), (x,), strict=False)
    graph = exported.graph
    assert any("wrap_with_set_grad_enabled" in str(n.target) for n in graph.nodes)
    region = Region(graph, output_of(graph), ("mul",))
    exact = region.run({"mul": x}, dtype=torch.float64)
    assert float((exact - (x.double() + x.double() / 3 * 7)).abs().max()) < 1e-15
    assert torch.equal(region.run({"mul": x}), Switched()(x))


def test_a_wrong_name_or_value_is_named(attention):
    graph, x, mask = attention
    with pytest.raises(ValueError, match="nowhere"):
        Region(graph, output_of(graph), ("nowhere",))
    with pytest.raises(ValueError, match="is not"):
        Region(graph, "mul", ("mul_1",))
    region = region_of(graph)
    with pytest.raises(ValueError, match="mul_1"):
        region.run({"mul": x, "mul_2": x, "mask": mask})
    with pytest.raises(ValueError, match="float16"):
        region.run({}, dtype=torch.float16)


def test_rounding_moves_results_by_about_one_unit_and_masks_not_at_all(attention):
    graph, x, mask = attention
    region = region_of(graph)
    values = values_of(graph, region, x=x, mask=mask)
    values["mask"] = mask & False  # every row is empty: only fills are left, and they are not rounded
    exact = region.run(values, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    rounding = Rounding(eps, torch.Generator().manual_seed(0), frozenset(["mask"]))
    moved = (region.run(values, dtype=torch.float64, rounding=rounding) - exact).abs().max()
    # One rounding of the weights and one of each sum over six keys: sqrt(6) + 3 halves of a unit.
    assert 0 < float(moved) < (math.sqrt(6) + 3) * eps / 2 * float((3 * x).abs().max())


def test_rounding_of_the_same_seed_is_the_same(attention):
    graph, x, mask = attention
    region = region_of(graph)
    values = values_of(graph, region, x=x, mask=mask)
    runs = [
        region.run(values, dtype=torch.float64, rounding=Rounding(1e-3, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_key_is_equal_for_equal_layers_and_differs_with_a_constant():
    class Two(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.second = second

        def forward(self, x):
            y = x * 1.0
            a = torch.softmax(y / 2.0, -1) + 0.0
            z = a * 1.0
            return torch.softmax(z / self.second, -1) + 0.0

    def keys(second):
        graph = trace(Two(second), torch.randn(2, 3), dynamic=False)
        (a, b), (y, z) = named(graph, "softmax"), named(graph, "mul")
        return Region(graph, a, (y,)).key({y: "in"}), Region(graph, b, (z,)).key({z: "in"})

    assert keys(2.0)[0] == keys(2.0)[1]
    assert keys(3.0)[0] != keys(3.0)[1]


def test_a_mask_chosen_between_two_numbers_runs_in_fp64():
    from tests.rewriting import traced

    def mask(keep: Tensor) -> Tensor:
        return torch.where(keep, 0.0, torch.finfo(torch.float32).min) * 1

    keep = torch.tensor([[True, False]])
    graph = traced(mask, (keep,)).graph
    out = next(n.name for n in graph.nodes if "mul" in n.name)
    region = Region(graph, out, [next(n.name for n in graph.nodes)])
    value = region.run({region.inputs[0]: keep}, dtype=torch.float64)
    assert value.dtype == torch.float64
    assert value[0, 0] == 0
    assert value[0, 1] < torch.finfo(torch.float32).min
