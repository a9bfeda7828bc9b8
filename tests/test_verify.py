from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnc.capture.alias import op_name
from attnc.errors import VerifyError
from attnc.verify.model import LARGEST_ORACLE
from attnc.verify.sites import SiteToCheck, check_model, check_sites, cropped_inputs, record

AUTO = torch.export.Dim.AUTO
MIN = torch.finfo(torch.float32).min
HEADS, DEPTH = 2, 8


class Attention(nn.Module):
    """Attention whose q, k and v are the nodes mul, mul_1 and mul_2, and whose last node is the site's."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, q, k, v, mask):
        return self.attend(q * 1.0, k * 1.0, v * 1.0, mask)


@cache
def spelled(fill=MIN, scale=DEPTH**-0.5):
    def attend(q, k, v, mask):
        scores = q @ k.transpose(-1, -2) * scale
        return torch.softmax(scores + (1.0 - mask[:, None, None, :].to(q.dtype)) * fill, -1) @ v

    return attend


@cache
def filled(fill, scale=DEPTH**-0.5):
    def attend(q, k, v, mask):
        scores = q @ k.transpose(-1, -2) * scale
        return torch.softmax(scores.masked_fill(mask[:, None, None, :] == 0, fill), -1) @ v

    return attend


@cache
def fused(fill=MIN, scale=DEPTH**-0.5):
    def attend(q, k, v, mask):
        zero = torch.zeros((), dtype=q.dtype)
        added = zero.masked_fill(mask[:, None, None, :] == 0, fill).expand(-1, -1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, added, scale=scale)

    return attend


@cache
def with_empty(attend, value):
    """Return ``attend`` with ``value`` in rows whose mask hides every key."""

    def changed(q, k, v, mask):
        out = attend(q, k, v, mask)
        return torch.where((mask == 0).all(-1)[:, None, None, None], value, out)

    return changed


def tensors(length=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, HEADS, length, DEPTH, generator=g).to(dtype) for _ in range(3))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length // 2 + 1 :] = 0
    return q, k, v, mask


def trace(module, inputs, dynamic=False):
    shapes = tuple({i: AUTO for i, n in enumerate(x.shape) if n > 1} for x in inputs) if dynamic else None
    return torch.export.export(module, inputs, strict=False, dynamic_shapes=shapes).graph


def output_of(graph):
    return next(n for n in graph.nodes if n.op == "output").args[0][0].name


@cache
def traced(attend, length, dtype):
    return trace(Attention(attend), tensors(length, dtype))


BOUNDARY = ("mul", "mul_1", "mul_2", "mask")


def site_of(a, b, **fields):
    fields = {"boundary": BOUNDARY, "mask_leaves": ("mask",), "query": ("mul",), **fields}
    return SiteToCheck("site", output_of(a), output_of(b), **fields)


def named_values(inputs):
    return dict(zip(("q", "k", "v", "mask"), inputs, strict=True))


def check(old, new, *, length=6, dtype=torch.float32, given=None, gradients=False, **site):
    """Check one site whose original and rewritten forms are two functions of (q, k, v, mask)."""
    a, b = traced(old, length, dtype), traced(new, length, dtype)
    values = named_values(tensors(length, dtype)) if given is None else given
    return check_sites(a, b, [site_of(a, b, **site)], values or None, gradients=gradients)[0]


# ---------------------------------------------------------------- the SAME rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_rewrite_passes(dtype):
    fill = max(-1e4, torch.finfo(dtype).min)
    found = check(spelled(fill), fused(fill), dtype=dtype)
    assert found.ok, found
    assert 0 < found.error <= found.tolerance
    assert found.gradients is None


def test_tolerance_is_a_few_units_of_the_dtype():
    low = check(spelled(-1e4), spelled(-1e4))
    high = check(spelled(), spelled(), dtype=torch.bfloat16)
    assert low.ok
    assert high.ok
    # Where every key is hidden, a fill of -1e4 rounds scores to units of 2**-10.
    assert low.tolerance < 4 * 2**-10 * float(tensors()[2].abs().max())
    assert high.tolerance < 1e2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_scale_fails(dtype):
    found = check(spelled(-1e4), fused(-1e4, scale=1.1 * DEPTH**-0.5), dtype=dtype)
    assert not found.ok
    assert found.error > found.tolerance
    assert str(dtype).removeprefix("torch.") in found.reason


@pytest.mark.parametrize("fill", [MIN, -1e9, -math.inf])
def test_wrong_values_in_empty_rows_fail_in_that_variant_only(fill):
    right = filled(fill)
    assert check(right, right).ok
    found = check(right, with_empty(filled(fill), 0.0))
    assert not found.ok
    assert found.variant == "empty-row (zeros)"


def hides(attend):
    """Return ``attend`` for a mask that says what to hide."""
    return lambda q, k, v, mask: attend(q, k, v, 1 - mask)


def test_polarity_of_the_mask_does_not_matter():
    *qkv, mask = tensors()
    found = check(
        hides(filled(MIN)), hides(with_empty(filled(MIN), 0.0)), given=named_values((*qkv, 1 - mask))
    )
    assert (found.ok, found.variant) == (False, "empty-row (ones)")


def test_nan_rows_that_coincide_pass_and_others_fail():
    good = check(filled(-math.inf), with_empty(fused(-1e9), math.nan))
    assert good.ok, good
    bad = check(filled(-math.inf), fused(-math.inf))  # SDPA gives zeros where softmax gives NaN
    assert not bad.ok
    assert "NaN" in bad.reason
    assert bad.variant == "empty-row (zeros)"


def test_an_error_in_the_rewritten_region_is_a_failed_check_with_the_error_in_a_line():
    inputs = tensors()
    a, b = (trace(Attention(filled(MIN)), inputs) for _ in range(2))
    softmax = next(n for n in b.nodes if op_name(n) == "softmax")
    softmax.args = (softmax.args[0], 9)
    found = check_sites(a, b, [site_of(a, b)], named_values(inputs), gradients=False)[0]
    assert (found.ok, found.variant) == (False, "real")
    assert "IndexError" in found.reason
    assert "\n" not in found.reason


def test_other_shapes_and_dtypes_fail():
    wide = check(filled(MIN), lambda *x: filled(MIN)(*x).double())
    assert "expected float32" in wide.reason
    assert "found float64" in wide.reason
    assert not check(filled(MIN), lambda *x: filled(MIN)(*x).transpose(1, 2)).ok


def test_a_bounded_site_is_measured_and_never_judged():
    found = check(spelled(), fused(scale=0.3), bounded=True, gradients=True)
    assert found.ok
    assert found.error > 1e-2
    assert found.tolerance == math.inf
    assert found.variant == "real"


def test_bugs_of_the_caller_raise():
    graph = traced(spelled(), 6, torch.float32)
    site = SiteToCheck("s", "nowhere", output_of(graph), ("mul",), (), ())
    with pytest.raises(ValueError, match="nowhere"):
        check_sites(graph, graph, [site], None, gradients=False)


# ---------------------------------------------------------------- gradients


def test_correct_gradients_pass():
    def other(q, k, v, mask):
        return (v.transpose(-1, -2) @ weights(q, k, mask).transpose(-1, -2)).transpose(-1, -2)

    def weights(q, k, mask):
        scores = (q * DEPTH**-0.5) @ k.transpose(-1, -2) + (mask[:, None, None, :] == 0) * MIN
        low = scores - scores.amax(-1, True)
        return torch.exp(low - torch.logsumexp(low, -1, True))

    found = check(spelled(), other, gradients=True)
    assert found.ok, found
    assert found.gradients is not None
    assert 0 < found.gradients <= 1


def test_a_fill_in_place_of_the_scores_has_other_gradients_than_one_added():
    assert check(spelled(), filled(MIN)).ok
    assert not check(spelled(), filled(MIN), gradients=True).ok


def plain(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-1, -2) * DEPTH**-0.5, -1) @ v


def flash(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("length", [1, 2, 5, 64])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_a_fused_backward_passes_whatever_the_logits(length, size):
    q, *rest = tensors(length)
    found = check(plain, flash, length=length, given=named_values((size * q, *rest)), gradients=True)
    assert found.ok, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fact about the CPU kernel")
@pytest.mark.parametrize("fill", [MIN, -1e9])
def test_wrong_gradients_of_empty_rows_fail(fill):
    assert check(spelled(fill), fused(fill)).ok, "outputs agree"
    found = check(spelled(fill), fused(fill), gradients=True)
    assert not found.ok
    assert found.variant == "empty-row (zeros)"
    assert "gradients" in found.reason
    assert found.gradients is not None
    assert found.gradients > 1e3


def test_a_missing_gradient_fails():
    found = check(spelled(), lambda q, k, v, mask: spelled()(q, k.detach(), v, mask), gradients=True)
    assert not found.ok
    assert "gradients" in found.reason


def test_nothing_is_asked_where_the_original_gradient_is_not_finite():
    def careful(q, k, v, mask):
        empty = (mask == 0).all(-1)[:, None]
        out = filled(-math.inf)(q, k, v, torch.where(empty, 1, mask))
        return torch.where(empty[:, :, None, None], math.nan, out)

    found = check(filled(-math.inf), careful, gradients=True)
    assert found.ok, found


def test_gradients_are_asked_for_what_trains_only():
    class Biased(nn.Module):
        def __init__(self, fast):
            super().__init__()
            self.w = nn.Parameter(torch.ones(DEPTH))
            self.fast = fast

        def forward(self, q, v):
            q, v = q * self.w, v * 1.0
            if self.fast:
                v = v.detach()
            return torch.softmax(q @ q.transpose(-1, -2), -1) @ v

    q, _, v, _ = tensors()
    a, b = (trace(Biased(fast), (q, v)) for fast in (False, True))
    site = site_of(a, b, boundary=("mul", "mul_1"), mask_leaves=())
    values = {"p_w": nn.Parameter(torch.ones(DEPTH)), "q": q, "v": v}
    assert check_sites(a, b, [site], values, gradients=True)[0].ok, "v does not depend on the parameter"
    values["v"] = v.requires_grad_()
    assert not check_sites(a, b, [site], values, gradients=True)[0].ok


# ---------------------------------------------------------------- float masks


def eager_added(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-1, -2) * DEPTH**-0.5 + mask, -1) @ v


def sdpa_added(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, scale=DEPTH**-0.5)


@pytest.fixture(scope="module")
def float_mask():
    inputs = (*tensors()[:3], torch.zeros(2, 1, 6, 6))
    a, b = (trace(Attention(f), inputs) for f in (eager_added, sdpa_added))
    return a, b, named_values(inputs)


def test_a_row_of_minus_infinity_tells_softmax_from_sdpa(float_mask):
    a, b, values = float_mask
    found = check_sites(a, b, [site_of(a, b)], values, gradients=False)[0]
    assert (found.ok, found.variant) == (False, "empty-row (-inf)")
    assert check_sites(b, b, [site_of(b, b)], values, gradients=False)[0].ok


def test_a_float_mask_that_is_a_weight_is_never_varied(float_mask):
    a, b, values = float_mask
    assert check_sites(a, b, [site_of(a, b)], values, gradients=False, constants=["mask"])[0].ok


def test_a_mask_computed_from_data_is_varied_only_if_it_hides_something():
    def site(value):
        inputs = (*tensors()[:3], torch.full((2, 1, 6, 6), value))
        a, b = (
            trace(Attention(lambda *x, f=f: f(*x[:3], x[3] * 1.0)), inputs) for f in (eager_added, sdpa_added)
        )
        fields = {"boundary": (*BOUNDARY[:3], "mul_3"), "mask_leaves": ("mul_3",)}
        return check_sites(a, b, [site_of(a, b, **fields)], named_values(inputs), gradients=False)[0]

    assert site(-3.0).ok
    assert site(-1e4).ok, "rows of finite fills agree"


# ---------------------------------------------------------------- unknown inputs and sizes


def test_sites_are_checked_on_random_values_where_inputs_are_unknown():
    found = check(spelled(), fused(), given={})
    assert found.ok, found
    found = check(spelled(), fused(scale=0.36), given={})
    assert (found.ok, found.variant) == (False, "random")


def test_sizes_other_than_the_traced_ones_are_taken_from_the_values():
    a, b = (trace(Attention(f), tensors(6), dynamic=True) for f in (spelled(), fused()))
    values = named_values(tensors(9))
    assert check_sites(a, b, [site_of(a, b)], values, gradients=False)[0].ok
    assert check_sites(a, b, [site_of(a, b)], None, gradients=False)[0].ok
    values.pop("q")
    assert check_sites(a, b, [site_of(a, b)], values, gradients=False)[0].ok, (
        "q takes its size from the others"
    )


class Deep(nn.Module):
    """Layers of attention between linear maps."""

    def __init__(self, attends):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(DEPTH, DEPTH) for _ in attends)
        self.attends = attends

    def forward(self, x, mask):
        for layer, attend in zip(self.inner, self.attends, strict=True):
            x = attend(layer(x), layer(x), layer(x), mask) + x
        return x


def deep(*attends):
    torch.manual_seed(0)
    module = Deep(attends)
    inputs = torch.randn(2, HEADS, 6, DEPTH), tensors()[3]
    graph = trace(module, inputs)
    values = {"x": inputs[0], "mask": inputs[1]}
    for name, weight in module.named_parameters():
        values["p_" + name.replace(".", "_")] = weight
    return graph, values


def deep_sites(a, b):
    """Return the sites of ``a`` and what took their place in ``b``: what is added to x, layer by layer."""
    outs = [
        [n.args[0].name for n in g.nodes if op_name(n) == "add" and n.args[1].name in ("x", "add")]
        for g in (a, b)
    ]
    linears = [n.name for n in a.nodes if op_name(n) == "linear"]
    return [
        SiteToCheck(f"layer {i}", x, y, (*linears[3 * i : 3 * i + 3], "mask"), ("mask",), (linears[3 * i],))
        for i, (x, y) in enumerate(zip(*outs, strict=True))
    ]


def test_equal_layers_are_checked_in_full_once():
    right, wrong = filled(MIN), with_empty(filled(MIN), 0.0)
    a, values = deep(right, right)
    calls = []
    same = check_sites(a, a, deep_sites(a, a), values, gradients=False, progress=lambda *x: calls.append(x))
    assert [(c.id, c.ok) for c in same] == [("layer 0", True), ("layer 1", True)]
    assert same[1].variant == "real"
    assert calls == [("verify", 0.0), ("verify", 0.5)]
    for layers in ((right, wrong), (wrong, wrong), (wrong, right)):
        b, _ = deep(*layers)
        checks = check_sites(a, b, deep_sites(a, b), values, gradients=False)
        assert [c.ok for c in checks] == [layer is right for layer in layers]


def test_a_name_that_went_to_another_node_is_not_mistaken_for_the_old_one():
    def old(q, k, v, mask):
        return filled(MIN)(q, k, v, mask) * torch.ones(6, 1)

    def new(q, k, v, mask):
        return filled(MIN)(q, k, v, mask) / torch.full((6, 1), 2.0) * 2.0

    a, b = (copy.deepcopy(traced(f, 6, torch.float32)) for f in (old, new))
    (ones,) = (n.name for n in a.nodes if op_name(n) == "ones")
    (twos,) = (n for n in b.nodes if op_name(n) == "full")
    twos.name = ones
    assert check_sites(a, b, [site_of(a, b)], named_values(tensors()), gradients=False)[0].ok


# ---------------------------------------------------------------- record


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_record_gives_the_values_that_a_run_has_and_runs_no_more_than_needed():
    graph, values = deep(filled(MIN), filled(MIN))
    linears = [n.name for n in graph.nodes if op_name(n) == "linear"]
    with Counted() as counted:
        found = record(graph, values, [linears[0]])
    assert list(found) == [linears[0]]
    first = next(p for n, p in values.items() if n.endswith("0_weight"))
    assert torch.allclose(found[linears[0]], F.linear(values["x"], first, values["p_inner_0_bias"]))
    assert not [n for n in counted.names if "softmax" in n]


def test_record_runs_nothing_for_floats_behind_unknown_inputs():
    graph, values = deep(filled(MIN), filled(MIN))
    linears = [n.name for n in graph.nodes if op_name(n) == "linear"]
    with Counted() as counted:
        found = record(graph, {n: v for n, v in values.items() if n != "x"}, linears)
    assert not [n for n in counted.names if "mm" in n or "softmax" in n]
    assert {v.shape for v in found.values()} == {torch.Size([2, HEADS, 6, DEPTH])}
    again = record(graph, None, linears)
    assert all(torch.equal(found[n], again[n]) for n in linears), "the same name is drawn the same"
    assert not torch.equal(found[linears[0]], found[linears[1]])
    other = record(graph, None, linears, seed=1)
    assert not torch.equal(found[linears[0]], other[linears[0]])


def test_record_draws_masks_that_show_something_in_every_row():
    graph = traced(spelled(), 6, torch.float32)
    mask = record(graph, None, ["mask"])["mask"]
    assert mask.dtype == torch.int64
    assert set(mask.unique().tolist()) == {0, 1}
    assert bool((mask.sum(-1) > 0).all())


def test_record_leaves_inputs_and_random_state_alone():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            x.add_(1.0)
            return torch.dropout(self.norm(x), 0.5, True) * 2.0

    module = Careless()
    x = torch.randn(3, 4)
    exported = torch.export.export(module, (x.clone(),), strict=False)
    graph = exported.graph
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    targets = [s.target for s in exported.graph_signature.input_specs]
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {n: state.get(t, x) for n, t in zip(names, targets, strict=True)}
    before = {n: v.detach().clone() for n, v in values.items()}
    random = torch.random.get_rng_state()
    out = next(n for n in graph.nodes if n.op == "output").args[0][-1].name
    first = record(graph, values, [out, names[-1]])
    assert torch.equal(record(graph, values, [out])[out], first[out])
    assert all(torch.equal(before[n], v) for n, v in values.items())
    assert torch.equal(first[names[-1]], x)
    assert torch.equal(random, torch.random.get_rng_state())


def test_record_refuses_sizes_that_nobody_knows():
    class Picked(nn.Module):
        def forward(self, x):
            return x[x > 0] * 2.0

    graph = trace(Picked(), (torch.randn(5),))
    last = output_of(graph)
    with pytest.raises(VerifyError, match="known"):
        record(graph, None, [last])


# ---------------------------------------------------------------- whole models


@dataclass
class Answer:
    score: torch.Tensor
    ids: torch.Tensor


class Model(nn.Module):
    def __init__(self, step=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.step = step

    def forward(self, x, scale=None):
        y = torch.dropout(self.norm(self.inner(x)), 0.1, self.training) + self.step
        return Answer(y, y.argmax(-1)), {"again": (y * 2, None)}


def test_equal_models_pass_and_are_left_as_they_were():
    model, x = Model().train(), torch.randn(4, 8)
    before = copy.deepcopy(model.state_dict())
    found = check_model(model, Model().train(), (x,), bounded=False)
    assert found["ok"], found
    assert (found["outputs"], found["unequal"], found["max_error"], found["cosine"]) == (2, 0, 0.0, 1.0)
    assert 0 < found["own_error"] < found["tolerance"]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_models_that_differ_fail_unless_bounded():
    model, x = Model().eval(), torch.randn(4, 8)
    found = check_model(model, Model(1e-3).eval(), (x,), bounded=False)
    assert not found["ok"]
    assert found["max_error"] == pytest.approx(2e-3, rel=1e-3)
    assert found["relative"] < 1e-2
    assert 0.999 < found["cosine"] < 1
    bounded = check_model(model, Model(1e-3).eval(), (x,), bounded=True)
    assert bounded["ok"]
    assert bounded["max_error"] == found["max_error"]


def test_cosine_is_that_of_the_worst_batch_row():
    first = torch.eye(3)
    second = first.clone()
    second[2] = torch.tensor([1.0, 0.0, 0.0])
    found = check_model(lambda: first, lambda: second, bounded=True)
    assert found["cosine"] == 0
    assert found["relative"] == 1


def test_values_that_are_nan_in_one_model_only_fail_even_bounded():
    x = torch.tensor([1.0, math.nan])
    assert check_model(lambda: x, lambda: x.clone(), bounded=False)["ok"]
    found = check_model(lambda: x, lambda: x.nan_to_num(), bounded=True)
    assert not found["ok"]
    assert "1 values" in found["reason"]
    assert not check_model(lambda: x, lambda: x[None], bounded=True)["ok"]


def test_a_model_without_fp64_has_a_note_and_no_tolerance():
    class Typed(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32, "only float32"
            return x + 1

    x = torch.randn(3)
    found = check_model(Typed(), Typed(), (x,), bounded=False)
    assert found["ok"]
    assert found["tolerance"] is None
    assert "only float32" in found["note"]
    assert "no nn.Module" in check_model(lambda x: x, lambda x: x, (x,), bounded=False)["note"]
    big = nn.Linear(LARGEST_ORACLE // 4096, 1024, device="meta")
    big.forward = lambda x: x
    assert "GiB" in check_model(big, lambda x: x, (x,), bounded=False)["note"]


def test_cropped_inputs_crop_axes_of_one_symbol_together():
    ids, mask = torch.zeros(4, 10), torch.ones(4, 10)
    dims = {0: {0: "s0", 1: "s1"}, 1: {0: "s2", 1: "s1"}}
    found = {
        name: (a[0].shape, k["mask"].shape) for name, a, k in cropped_inputs((ids,), {"mask": mask}, dims)
    }
    assert found == {
        "s0=1": ((1, 10), (4, 10)),
        "s0=3": ((3, 10), (4, 10)),
        "s1=1": ((4, 1), (4, 1)),
        "s1=9": ((4, 9), (4, 9)),
        "s2=1": ((4, 10), (1, 10)),
        "s2=3": ((4, 10), (3, 10)),
        "s0=1,s2=1": ((1, 10), (1, 10)),
        "s0=3,s2=3": ((3, 10), (3, 10)),
    }
    assert list(cropped_inputs((torch.zeros(1),), None, {0: {0: "s0"}})) == []
    assert [n for n, *_ in cropped_inputs((torch.zeros(2),), None, {0: {0: "s0"}})] == ["s0=1"]


def test_cropped_inputs_refuse_axes_that_do_not_exist_or_differ():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="axis 2"):
        list(cropped_inputs((x,), None, {0: {2: "s0"}}))
    with pytest.raises(ValueError, match="leaf 1"):
        list(cropped_inputs((x,), None, {1: {0: "s0"}}))
    with pytest.raises(ValueError, match="4 and 3"):
        list(cropped_inputs((x,), None, {0: {0: "s0", 1: "s0"}}))
