"""Spellings of one meaning are found to be one spec.

And what only looks like attention is refused by name.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnc.ir import AttentionSpec
from tests.corpus import CASES, DISTINCT, MISSES, Case, make_inputs
from tests.rewriting import Forward, Traced, exported, only_spec, traced

EXPORTED = (
    "einsum_then_view",
    "grouped_by_expand",
    "causal_by_triu_added",
    "causal_and_padding",
    "packed_chunk",
    "sink_per_head",
    "normalized_after_the_values",
    "window_partition",
)
# Only the number of heads says how many share a key: with every size free they are not found.
NEEDS_FIXED_HEADS = ("grouped_by_five_axes", "grouped_by_broadcast", "one_key_head", "fused_call")


def assert_facts(spec: AttentionSpec, case: Case) -> None:
    kinds = " ".join(type(step).__name__.lower() for step in spec.scores)
    group = {"g": DISTINCT.g, "h": DISTINCT.h, "1": 1}[case.group]
    found = (spec.mask.describe(), kinds, spec.group_size, str(spec.norm))
    assert found == (case.mask, case.steps, group, case.norm), str(spec)
    if case.scale is not None:
        assert spec.scale == pytest.approx(case.scale, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_spelling_is_found(name):
    case = CASES[name]
    assert_facts(only_spec(traced(case.f, make_inputs(case))), case)


@pytest.mark.parametrize("name", EXPORTED)
def test_spelling_is_found_in_an_exported_program(name):
    case = CASES[name]
    assert_facts(only_spec(exported(Forward(case.f), make_inputs(case))), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in EXPORTED])
def test_every_spelling_is_found_in_an_exported_program(name):
    test_spelling_is_found_in_an_exported_program(name)


@pytest.mark.parametrize("name", ["einsum_bshd", "causal_from_the_end", "padding_by_inverted_mask", "bmm"])
def test_spelling_is_found_with_free_sizes(name):
    case = CASES[name]
    spec = only_spec(exported(Forward(case.f), make_inputs(case), dynamic=True))
    assert_facts(spec, case)
    assert any(isinstance(n, str) for n in (*spec.q.shape, *spec.k.shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(NEEDS_FIXED_HEADS)])
def test_every_spelling_is_found_with_free_sizes(name):
    case = CASES[name]
    spec = only_spec(exported(Forward(case.f), make_inputs(case), dynamic=True))
    assert spec.mask.describe() == case.mask
    assert str(spec.norm) == case.norm


REFUSED = {
    "softmax_over_queries": "query-axis-softmax",
    "softmax_over_heads": "softmax-over-shared-axis",
    "softmax_over_batch": "softmax-over-shared-axis",
    "talking_heads_after": "talking-heads",
    "linear_attention": "linear-attention",
    "router": "weights-gated-by-key",
    "weights_times_a_mask": "weights-gated-by-key",
    "two_value_contractions": "several-value-contractions",
    "last_column_dropped": "sink-not-found",
    "first_column_dropped": "keys-not-summed",
    "divided_by_sums_of_other_rows": "no-value-contraction",
    "result_divided_by_sums_of_columns": "keys-not-summed",
    "floor_of_the_division": "no-value-contraction",
    "values_added_to_a_residual": "values-added",
    "weights_times_themselves": "weights-squared",
    "weights_rounded_to_integers": "weights-edited",
    "features_repeated": "repeated-features",
    "weights_renormalized": "no-value-contraction",
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_miss_is_refused_with_its_reason(name):
    case = MISSES[name]
    found, missed = traced(case.f, make_inputs(case)).detect()
    assert not found
    assert REFUSED[name] in [miss.code for miss, _ in missed]
    assert all(miss.why and miss.node for miss, _ in missed)


def test_near_misses_that_are_found_after_all_are_attention_of_another_kind():
    """The rest of the collection has a meaning that a spec can say; tests/test_meaning.py runs them."""
    rest = {
        "talking_heads_before",
        "weights_times_a_gate",
        "differential",
        "sum_plus_two",
        "sigmoid_weights",
        "fill_that_hides_nothing",
        "shift_inside_a_gain",
        "shift_inside_the_softcap",
        "mask_inside_the_softcap",
        "bias_after_a_mild_mask",
        "two_masks_of_different_depth",
        "scores_plus_scores",
        "scores_times_scores",
        "softmax_of_products_with_values",
        "less_the_maximum_of_each_column",
        "less_the_maximum_of_other_rows",
        "only_the_largest_scores",
        "mask_in_a_rounded_counter",
        "mask_by_remainder_of_negatives",
        "mask_by_unsigned_difference",
        "mask_by_a_running_count",
        "mask_shifted_before_it_is_replaced",
    }
    assert set(MISSES) == {*REFUSED, *rest}


# ---------------------------------------------------------------- what a site says about itself


class Block(nn.Module):
    """Two attentions in one module, one of them returning its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.second = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.view(2, 5, 3, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        first = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        y = self.second(first.transpose(1, 2).flatten(2)).view(2, 5, 3, 4).transpose(1, 2)
        weights = (y @ y.transpose(-2, -1) * 0.5).softmax(-1)
        return weights @ y, weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out = self.layers[0](x)
        again = out[0].transpose(1, 2).flatten(2)
        return (*out, *self.layers[1](again))


@pytest.fixture(scope="module")
def model() -> Traced:
    return exported(Model().eval(), (torch.randn(2, 5, 12),))


def test_sites_are_named_by_module_in_order(model):
    found, missed = model.detect()
    assert [x.match.site.id for x in found] == ["layers.0", "layers.0#2", "layers.1", "layers.1#2"]
    assert not missed
    assert all(x.match.site.source.startswith("Block test_sites.py:") for x in found)


def test_detection_is_repeatable(model):
    first, second = (model.detect()[0] for _ in range(2))
    assert [str(x.match.spec) for x in first] == [str(x.match.spec) for x in second]
    assert [x.operands for x in first] == [x.operands for x in second]


def test_weights_that_are_returned_are_reported_as_escapes(model):
    found, _ = model.detect()
    assert [bool(x.match.escapes) for x in found] == [False, True, False, True]
    assert all("softmax" in name for x in found for name in x.match.escapes)


def test_a_region_covers_what_lies_between_operands_and_output(model):
    first = model.detect()[0][0]
    nodes = {n.name: n for n in model.work.nodes}
    assert first.match.output in first.match.region
    assert first.anchor in first.match.region
    assert not {r.source for r in first.operands.values()} & first.match.region
    for name in first.match.region - {first.match.output}:
        assert {u.name for u in nodes[name].users} <= first.match.region


def test_grouped_keys_are_read_before_they_are_copied():
    case = CASES["grouped_by_repeat_interleave"]
    t = traced(case.f, make_inputs(case))
    found, _ = t.detect()
    nodes = {n.name: n for n in t.work.nodes}
    assert nodes[found[0].operands["k"].source].op == "placeholder"
    assert found[0].match.spec.k.shape == (DISTINCT.b, DISTINCT.h, DISTINCT.t, DISTINCT.d)


@pytest.mark.parametrize("name", ["one_key_head_for_all", "one_key_head_by_einsum"])
def test_one_head_of_keys_for_all_leaves_the_batch_a_batch(name):
    case = CASES[name]
    spec = only_spec(traced(case.f, make_inputs(case)))
    assert spec.q.shape[:2] == (DISTINCT.b, DISTINCT.h)
    assert spec.k.shape == (DISTINCT.b, 1, DISTINCT.t, DISTINCT.d)


def test_a_product_with_a_weight_is_no_scores_contraction():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(4, 12))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.query.T).softmax(1).transpose(1, 2) @ x

    found, missed = exported(Pool(), (torch.randn(2, 5, 12),)).detect()
    assert not found
    assert [miss.code for miss, _ in missed] == ["no-scores"]


def test_upcast_of_the_softmax_is_noted():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.transpose(-2, -1) * 0.25
        return F.softmax(w, -1, dtype=torch.float32).to(q.dtype) @ v

    args = make_inputs(CASES["no_scale"], dtype=torch.bfloat16)
    spec = only_spec(traced(attention, args))
    assert str(spec.norm) == "softmax(upcast)"
    assert spec.q.dtype == torch.bfloat16


def test_a_number_that_depends_on_sizes_is_refused():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * (k.shape[2] * 0.5)).softmax(-1) @ v

    found, missed = traced(attention, make_inputs(CASES["no_scale"]), symbolic=True).detect()
    assert not found
    assert [miss.code for miss, _ in missed] == ["symbolic-number"]


def test_dropout_in_training_is_part_of_the_spec():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.25, training=True) @ v

    assert only_spec(traced(attention, make_inputs(CASES["no_scale"]))).dropout == 0.25


def test_learned_queries_behind_a_projection_attend_and_raw_ones_route():
    class Pool(nn.Module):
        def __init__(self, projected: bool) -> None:
            super().__init__()
            self.probe = nn.Parameter(torch.randn(1, 3, 8))
            self.q = nn.Linear(8, 8) if projected else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(self.probe) @ x.mT).softmax(-1) @ x.tanh()

    x = (torch.randn(2, 5, 8),)
    assert [len(exported(Pool(p), x).detect()[0]) for p in (True, False)] == [1, 0]


def test_attention_among_learned_tokens_is_found():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(1, 3, 8))
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(self.tokens) @ self.k(self.tokens).mT).softmax(-1) @ x

    assert len(exported(Tokens(), (torch.randn(2, 3, 8),)).detect()[0]) == 1


@pytest.mark.parametrize("mixed", [True, False])
def test_heads_mixed_by_a_layer_are_named_and_a_router_is_not(mixed):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT).permute(0, 2, 3, 1)
            weights = self.mix(scores).softmax(2).permute(0, 3, 1, 2)
            return weights @ v if mixed else weights.sum(-1)

    args = tuple(torch.randn(2, 4, 5, 8) for _ in range(3))
    found, missed = exported(Heads(), args).detect()
    assert not found
    assert [m.code for m, _ in missed] == (["talking-heads"] if mixed else [])
