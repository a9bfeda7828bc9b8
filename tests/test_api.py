"""The public surface on small transformers.

Both doors, masks, training, forms, put-back, what is kept and why.
"""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import torch
from torch import nn

import attnc
from attnc.api import session

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EPS = torch.finfo(torch.float32).eps


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **{"attn_implementation": "eager", **DRY, **options})
    return transformers.BertModel(config).eval()


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, attn_implementation="eager", use_cache=False, **options
    )
    return transformers.LlamaModel(config).eval()


def batch(b, n, mask=None):
    ids = torch.randint(1, 97, (b, n), generator=torch.Generator().manual_seed(b * 1000 + n))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(b, n, dtype=torch.long) if mask is None else mask.clone(),
    }


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def own_error(model, inputs):
    """The model's own rounding error, against itself in fp64.

    (where transformers' fp64 minimum overflows its fp32 softmax, it says nothing).
    """
    return (
        (hidden(model, inputs) - hidden(copy.deepcopy(model).double(), inputs))
        .nan_to_num()
        .abs()
        .max()
        .item()
    )


def assert_same(model, fast, inputs):
    want, got = hidden(model, inputs), hidden(fast, inputs)
    assert torch.equal(want.isnan(), got.isnan())
    unit = EPS * want.nan_to_num().abs().max().item()
    # both round: results differ by at most the sum of their errors, ours being at most twice the model's own
    assert (want - got).nan_to_num().abs().max().item() <= 3 * own_error(model, inputs) + 4 * unit


@pytest.fixture(scope="module")
def ragged():
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return mask


@pytest.fixture(scope="module")
def fast_bert(ragged):
    model = bert()
    return model, attnc.optimize(model, (), batch(2, 11, ragged), cost_model=False)


def test_sites_are_found_lifted_rewritten_and_certified(fast_bert):
    _, fast = fast_bert
    sites = json.loads(fast.report.to_json())["sites"]
    assert [s["status"] for s in sites] == ["rewritten"] * 2
    assert {s["mask"] for s in sites} == {"padding(key)"}
    assert all(s["error"] <= s["tolerance"] and s["contract"] == "SAME" for s in sites)
    assert sites[1]["module"] == "encoder.layer.1.attention.self"
    assert "modeling_bert.py" in sites[0]["source"]


def test_other_sizes_give_the_models_outputs(fast_bert):
    model, fast = fast_bert
    for b, n in ((2, 11), (3, 7), (1, 5), (5, 1), (1, 1), (2, 64)):
        assert_same(model, fast, batch(b, n))


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_thousand_random_masks_give_the_models_outputs(make):
    model = make()
    example = torch.ones(4, 13, dtype=torch.long)
    example[0, :5] = 0
    fast = attnc.optimize(model, (), batch(4, 13, example), cost_model=False)
    assert {s.status for s in fast.report.sites} == {"rewritten"}
    g = torch.Generator().manual_seed(7)
    for round_ in range(10):
        n = 5 + 3 * round_
        lengths = torch.randint(0, n + 1, (100,), generator=g)
        place = torch.arange(n)[None, :]
        right, left = place < lengths[:, None], place >= n - lengths[:, None]
        random = torch.rand(100, n, generator=g) < 0.6
        kind = torch.arange(100)[:, None] % 3
        mask = torch.where(kind == 0, right, torch.where(kind == 1, left, random)).long()
        mask[0] = 0  # a row that sees nothing
        assert_same(model, fast, batch(100, n, mask))


def test_left_padded_causal_model_keeps_causality_by_flag(fast_bert):
    model = llama()
    fast = attnc.optimize(model, (), {"input_ids": batch(2, 9)["input_ids"]}, cost_model=False)
    assert {s.mask for s in fast.report.sites} == {"causal"}
    calls = [
        n
        for n in session(fast).outcomes[0].runtime.graph.nodes
        if "scaled_dot_product_attention" in str(n.target)
    ]
    assert len(calls) == 2
    assert all(n.args[5] is True and n.args[3] is None for n in calls), (
        "causal must be the flag, without a mask tensor"
    )
    assert all(n.kwargs["enable_gqa"] for n in calls), "grouped keys must not be expanded"
    assert not any("softmax" in str(n.target) for n in session(fast).outcomes[0].runtime.graph.nodes)


def test_keyword_order_and_positional_calls_do_not_matter(fast_bert, ragged):
    model, fast = fast_bert
    inputs = batch(2, 11, ragged)
    want = hidden(model, inputs)
    backwards = dict(reversed(list(inputs.items())))
    again = attnc.optimize(
        model, (), {"token_type_ids": torch.zeros_like(ragged), **backwards}, cost_model=False
    )
    for got in (
        hidden(fast, backwards),
        hidden(again, inputs),
        hidden(again, {**backwards, "token_type_ids": torch.zeros_like(ragged)}),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with torch.no_grad():
        got = fast(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_model_is_not_changed_and_tensors_are_shared(ragged):
    model = bert()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    fast = attnc.optimize(model, (), batch(2, 11, ragged), cost_model=False)
    assert type(fast) is type(model)
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert fast.embeddings.word_embeddings.weight is model.embeddings.word_embeddings.weight
    assert "forward" not in vars(model)


@pytest.mark.parametrize("door", ["ahead", "lazy", "torch.compile"])
def test_gradients_are_the_models(door, ragged):
    model = bert().train()
    inputs = batch(2, 11, ragged)
    inputs["attention_mask"][0] = 0  # a query that sees nothing: the flash kernel's backward is wrong there
    twin = bert().train()
    fast = {
        "ahead": lambda: attnc.optimize(twin, (), inputs, cost_model=False),
        "lazy": lambda: attnc.optimize(twin, cost_model=False),
        "torch.compile": lambda: torch.compile(twin, backend="attnc", options={"cost_model": False}),
    }[door]()
    torch._dynamo.reset()
    oracle = bert().train().double()
    grads = []
    for m in (model, fast, oracle):
        m(**inputs).last_hidden_state.square().sum().backward()
        owner = twin if m is fast else m
        grads.append({n: p.grad.double() for n, p in owner.named_parameters() if p.grad is not None})
    want, got, exact = grads
    assert set(want) == set(got)
    largest = max(g.abs().max().item() for g in exact.values())
    own = max((want[n] - exact[n]).abs().max().item() for n in exact)
    ours = max((got[n] - exact[n]).abs().max().item() for n in exact)
    assert ours <= 3 * own + EPS * largest
    if door == "ahead":
        assert {s.status for s in fast.report.sites} == {"rewritten"}


def test_without_inputs_sizes_may_differ_between_calls():
    torch._dynamo.reset()
    model = bert()
    fast = attnc.optimize(model, cost_model=False)
    for b, n in ((2, 11), (3, 9), (1, 17)):
        assert_same(model, fast, batch(b, n))
    assert {s.status for s in fast.report.sites} == {"rewritten"}


class Broken(nn.Module):
    """A graph break between layers."""

    def __init__(self):
        super().__init__()
        self.model = bert()

    def forward(self, input_ids, attention_mask):
        x = self.model.embeddings(input_ids)
        hide = torch.where(attention_mask[:, None, None, :] == 0, torch.finfo(x.dtype).min, 0.0)
        for layer in self.model.encoder.layer:
            x = layer(x, hide)
            x = x[0] if isinstance(x, tuple) else x
            torch._dynamo.graph_break()
        return x


def test_a_graph_break_between_layers_costs_nothing(ragged):
    torch._dynamo.reset()
    model = Broken().eval()
    fast = attnc.optimize(model, cost_model=False)
    for inputs in (batch(2, 11, ragged), batch(3, 9)):
        with torch.no_grad():
            torch.testing.assert_close(fast(**inputs), model(**inputs), atol=1e-5, rtol=0)
    assert fast.report.sites
    assert {s.status for s in fast.report.sites} == {"rewritten"}


@pytest.mark.parametrize(("cost_model", "status"), [(True, "kept"), (False, "rewritten")])
def test_weights_that_are_returned_stay_and_the_report_says_so(cost_model, status):
    class Returns(nn.Module):
        def forward(self, q, k, v):
            w = torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1)
            return w @ v, w

    q = torch.randn(2, 3, 5, 16)
    model = Returns().eval()
    fast = attnc.optimize(model, (q, q, q), cost_model=cost_model)
    (site,) = fast.report.sites
    assert site.status == status
    assert "softmax is" in site.reason
    for found, expected in zip(fast(q, q, q), model(q, q, q), strict=True):
        torch.testing.assert_close(found, expected)


def test_dropout_in_training_keeps_the_site_and_evaluation_rewrites_it():
    model = bert(attention_probs_dropout_prob=0.1)
    fast = attnc.optimize(model, (), batch(2, 11), cost_model=False)
    assert {s.status for s in fast.report.sites} == {"rewritten"}
    trained = attnc.optimize(
        bert(attention_probs_dropout_prob=0.1).train(), (), batch(2, 11), cost_model=False
    )
    assert {s.status for s in trained.report.sites} == {"kept"}
    assert all("dropout" in s.reason for s in trained.report.sites)


def test_a_site_that_fails_verification_is_put_back(monkeypatch, ragged):
    module = importlib.import_module("attnc.codegen.sdpa.lower")
    real = module._plain
    calls = []

    def wrong(build, q, k, v, mask, causal, scale, grouped):
        calls.append(scale)
        return real(build, q, k, v, mask, causal, scale * (1.01 if len(calls) == 1 else 1.0), grouped)

    monkeypatch.setattr(module, "_plain", wrong)
    model = bert()
    inputs = {"input_ids": batch(2, 11)["input_ids"]}
    fast = attnc.optimize(model, (), inputs, cost_model=False)
    first, second = fast.report.sites
    assert first.status == "kept"
    assert "failed verification" in first.reason
    assert second.status == "rewritten"
    assert_same(model, fast, inputs)


def test_sliding_window_is_bounded_and_exact_at_full_width(ragged):
    model, inputs = bert(), batch(2, 11, ragged)
    wide = attnc.optimize(model, (), inputs, forms=attnc.SlidingWindow(window=64), cost_model=False)
    assert {(s.contract, s.form) for s in wide.report.sites} == {("BOUNDED", "sliding_window")}
    real = ragged.bool()
    torch.testing.assert_close(hidden(wide, inputs)[real], hidden(model, inputs)[real], atol=1e-5, rtol=0)
    errors = []
    for window in (1, 3, 6):
        fast = attnc.optimize(
            model, (), inputs, forms=attnc.SlidingWindow(window=window, sinks=1), cost_model=False
        )
        errors.append((hidden(fast, inputs) - hidden(model, inputs))[real].abs().max().item())
    assert errors[0] > errors[1] > errors[2] > 1e-6


@pytest.mark.parametrize(
    ("whole", "sparse"),
    [
        (attnc.Chunked(11), "chunked(size=4)"),
        (attnc.Neighborhood(11, 11), "neighborhood(grid=11, window=5)"),
        (attnc.S2(vertical=1), "s2(block=2, local=1, vertical=2)"),
    ],
)
def test_forms_over_positions_are_bounded_and_exact_where_they_hide_nothing(whole, sparse):
    model, inputs = bert(), batch(2, 11, torch.ones(2, 11, dtype=torch.int64))
    for form, exact in ((whole, True), (sparse, False)):
        fast = attnc.optimize(model, (), inputs, forms=form, dynamic_shapes=None, cost_model=False)
        name = attnc.parse_forms(form).at("x")[0].name
        assert {(s.contract, s.form, s.status) for s in fast.report.sites} == {("BOUNDED", name, "rewritten")}
        error = (hidden(fast, inputs) - hidden(model, inputs)).abs().max().item()
        assert (error < 1e-5) if exact else error > 1e-4
        assert all((s.error or 0.0) > 0.0 for s in fast.report.sites if not exact)


def test_a_form_that_does_not_fit_a_site_leaves_it_alone_with_a_reason():
    inputs = batch(2, 11, torch.ones(2, 11, dtype=torch.int64))
    form = attnc.Neighborhood((4, 4), (2, 2))
    fast = attnc.optimize(bert(), (), inputs, forms=form, dynamic_shapes=None, cost_model=False)
    assert {s.status for s in fast.report.sites} == {"kept"}
    assert all("are 16 tokens, the site has 11" in s.reason for s in fast.report.sites)


def test_forms_are_chosen_by_module_path(ragged):
    forms = {"encoder.layer.0.*": "sliding_window(window=2)", "*": "fused"}
    fast = attnc.optimize(bert(), (), batch(2, 11, ragged), forms=forms, cost_model=False)
    assert [s.form for s in fast.report.sites] == ["sliding_window", "fused"]
    assert attnc.parse_forms(session(fast).plan) == session(fast).forms


def test_w8a8_quantizes_the_projections_of_sites_or_all(ragged):
    model, inputs = bert(), batch(2, 11, ragged)
    some = attnc.optimize(model, (), inputs, forms=attnc.W8A8(), cost_model=False)
    assert len(some.report.linears) == 8
    assert "encoder.layer.0.intermediate.dense" not in [x["module"] for x in some.report.linears]
    every = attnc.optimize(model, (), inputs, forms=["w8a8(scope='all')"], cost_model=False)
    assert len(every.report.linears) == 13
    assert every.encoder.layer[0].attention.self.query.weight.dtype == torch.int8
    assert model.encoder.layer[0].attention.self.query.weight.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(hidden(every, inputs)[:, 0], hidden(model, inputs)[:, 0])
    assert cosine.min() > 0.98


def test_an_exported_program_and_a_graph_module_are_accepted(ragged):
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(q @ k.transpose(-2, -1) / 4.0, -1) @ v

    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    want = Attend()(q, k, v)
    program = torch.export.export(Attend(), (q, k, v), strict=False)
    for model in (program, torch.fx.symbolic_trace(Attend())):
        fast = attnc.optimize(model, (q, k, v), cost_model=False)
        assert [s.status for s in fast.report.sites] == ["rewritten"]
        torch.testing.assert_close(fast(q, k, v), want, atol=1e-6, rtol=0)


def test_inspect_changes_nothing_and_reports_the_same_sites(ragged):
    model = bert()
    report = attnc.inspect(model, (), batch(2, 11, ragged))
    assert len(report.sites) == 2
    assert "forward" not in vars(model)


def test_a_forward_that_fails_is_the_models_own_error_with_its_place():
    model = bert()
    with pytest.raises(attnc.CaptureError, match=r"embeddings"):
        attnc.optimize(model, (), {"input_ids": torch.full((2, 5), 5000)})


@pytest.mark.parametrize(
    ("forms", "words"),
    [
        (
            "flashy",
            "expected one of fused, chunked, neighborhood",
        ),
        ("sliding_window(window=0)", "window as a whole number of tokens >= 1, found 0"),
        ("sliding_window(window=2.5)", "found 2.5"),
        ("sliding_window(window=4, sinks=5)", "found sinks=5"),
        ({"encoder.layer.9.*": "fused"}, "encoder.layer.1.attention.self"),
    ],
)
def test_bad_forms_are_refused_with_what_exists(forms, words):
    with pytest.raises(attnc.RewriteError, match=words.replace("(", r"\(").replace(")", r"\)")):
        attnc.optimize(bert(), (), batch(2, 11), forms=forms)


def test_an_unknown_target_is_refused():
    with pytest.raises(attnc.RewriteError, match="cuda:sm_90"):
        attnc.optimize(bert(), (), batch(2, 11), target="tpu")
