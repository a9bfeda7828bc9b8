"""The result of optimize: the user's class, tensors and calls, run by captured programs where valid."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import attnc.result
from attnc.capture.key import being_traced
from attnc.capture.whole import capture_export, make_backend
from attnc.errors import AttncError, CaptureError
from attnc.result import clone_module, make_result
from attnc.result_ladder import Doors

aten = torch.ops.aten

# Dynamo and export warn about their own internals; no test here is about those.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)


@dataclass
class Notes:
    """The part of a report that the result needs."""

    warnings: list[str] = field(default_factory=list)


@dataclass
class Builder:
    """Capture, negate every linear so that a run of the program shows, and keep what was captured."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    dynamic: Any = "auto"
    edit: bool = True

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
        self.calls.append((args, kwargs))
        captured = capture_export(model, args, kwargs, dynamic_shapes=self.dynamic)
        for node in [n for n in captured.graph.nodes if self.edit and n.target is aten.linear.default]:
            with captured.graph.inserting_after(node):
                negated = captured.graph.call_function(aten.neg.default, (node,))
            negated.meta = dict(node.meta)
            node.replace_all_uses_with(negated, delete_user_cb=lambda user, new=negated: user is not new)
        assert captured.exported is not None
        return captured.exported


class Reply(NamedTuple):
    out: torch.Tensor
    scale: float


class Small(nn.Module):
    """One linear, so that its program gives ``-linear(x)`` where the class's forward gives ``linear(x)``."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(drop)
        self.label = "mine"

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0, **extra: Any
    ) -> Reply:
        """Apply the linear."""
        if "unknown" in extra:
            raise TypeError("unknown")
        y = self.drop(self.linear(x))
        return Reply(y if mask is None else y * mask.unsqueeze(-1), scale)


def make(model: nn.Module | None = None, build: Any = None, **keywords: Any) -> tuple[Any, Any, Notes, Any]:
    torch.manual_seed(0)
    model = Small().eval() if model is None else model
    notes, build = Notes(), build or Builder()
    return model, make_result(model, build, report=notes, **keywords), notes, build


def test_the_result_is_the_users_class_on_the_users_tensors() -> None:
    model, fast, notes, _ = make()
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    fast(torch.randn(3, 4))
    assert type(fast) is Small
    assert fast.label == "mine"
    assert fast.report is notes
    assert list(fast.state_dict()) == list(model.state_dict())
    for name, p in model.named_parameters():
        assert fast.get_parameter(name) is p
        assert p.grad is None
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before
    assert fast.linear is not model.linear
    assert notes.warnings == []


def test_programs_run_and_one_serves_many_sizes_and_ways_to_call() -> None:
    model, fast, _, build = make()
    x, mask = torch.randn(3, 4), torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(fast(x).out, -model(x).out)
    torch.testing.assert_close(fast(torch.ones(7, 4)).out, -model(torch.ones(7, 4)).out)
    fast(x=x), fast(x, None), fast(mask=None, x=x)
    assert len(build.calls) == 1
    for reply in (fast(x, mask), fast(x, mask=mask), fast(mask=mask, x=x)):
        torch.testing.assert_close(reply.out, -model(x, mask).out)
        assert type(reply) is Reply
    assert len(build.calls) == 2


def test_numbers_are_part_of_the_program() -> None:
    _, fast, _, build = make()
    x = torch.randn(3, 4)
    assert [fast(x, scale=s).scale for s in (2.0, 3.0, 2.0)] == [2.0, 3.0, 2.0]
    assert len(build.calls) == 2


def test_a_size_of_one_is_captured_by_itself() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] == 1 else x * 3

    _, fast, _, build = make(Branches())
    for n in (4, 1, 5, 1):
        assert fast(torch.ones(n, 2))[0, 0] == (2 if n == 1 else 3)
    assert len(build.calls) == 2


def test_relations_between_sizes_that_tracing_relied_on_are_checked() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            a = x * 2 if x.shape[0] % 2 == 0 else x * 3
            return a.sum() + (y * 10 if x.shape[0] == y.shape[0] else y * 20).sum() + (x.shape[0] > 8)

    model, fast, _, build = make(Branches())
    for n, m in ((4, 4), (6, 6), (5, 5), (4, 6), (10, 10), (4, 8)):
        x, y = torch.ones(n), torch.ones(m)
        assert fast(x, y) == model(x, y), (n, m)
    assert len(build.calls) == 3  # even and equal; odd and equal; even and different


def test_fixed_sizes_are_checked() -> None:
    model, fast, _, build = make(build=Builder(dynamic=None))
    for n in (3, 5, 3):
        torch.testing.assert_close(fast(torch.ones(n, 4)).out, -model(torch.ones(n, 4)).out)
    assert len(build.calls) == 2


def test_a_wrong_call_raises_what_the_class_raises() -> None:
    model, fast, _, _ = make()
    for args, kwargs in (((), {}), ((torch.ones(2, 4), None, 3), {}), ((torch.ones(2, 4),), {"x": 1})):
        with pytest.raises(TypeError) as expected:
            model(*args, **kwargs)
        with pytest.raises(TypeError) as found:
            fast(*args, **kwargs)
        assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        fast(torch.ones(2, 5))
    torch.testing.assert_close(fast(torch.ones(2, 4)).out, -model(torch.ones(2, 4)).out)


def test_extra_keywords_reach_the_forward() -> None:
    _, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x, b=1, a=2), fast(x, a=2, b=1)
    assert len(build.calls) == 1
    with pytest.raises(TypeError, match="unknown"):
        fast(x, unknown=1)


def test_train_and_eval_are_two_programs_and_dropout_draws_the_same_numbers() -> None:
    model, fast, _, build = make(Small(drop=0.5))
    x = torch.randn(3, 4)
    for mode in (True, False, True):
        model.train(mode), fast.train(mode)
        torch.manual_seed(5)
        expected, state = model(x).out, torch.get_rng_state()
        torch.manual_seed(5)
        torch.testing.assert_close(fast(x).out, -expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(build.calls) == 2


def test_batch_norm_in_training_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    reference = copy.deepcopy(model)
    _, fast, _, _ = make(model, Builder(edit=False))
    for i in range(2):
        x = torch.randn(5, 4)
        torch.testing.assert_close(fast(x), reference(x))
        assert model[1].num_batches_tracked == i + 1
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)


def test_a_functional_program_writes_its_new_values_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    reference = copy.deepcopy(model)

    def build(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
        captured = capture_export(m, args, kwargs)
        assert captured.exported is not None
        return captured.exported.run_decompositions({})

    _, fast, _, _ = make(model, build)
    for i in range(2):
        x = torch.randn(5, 4)
        torch.testing.assert_close(fast(x), reference(x))
        assert model[1].num_batches_tracked == i + 1
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)


def test_gradients_reach_the_shared_parameters() -> None:
    model, fast, _, _ = make()
    x = torch.randn(3, 4)
    (-model(x).out).pow(2).sum().backward()
    expected = model.linear.weight.grad.clone()
    model.zero_grad()
    fast(x).out.pow(2).sum().backward()
    torch.testing.assert_close(model.linear.weight.grad, expected)


def test_programs_read_the_live_weights() -> None:
    model, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x)
    fast.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    torch.testing.assert_close(fast(x).out, -model(x).out)
    fast.linear.weight = nn.Parameter(torch.eye(4))
    torch.testing.assert_close(fast(x).out, -(x + model.linear.bias))
    swapped = {"linear.weight": torch.zeros(4, 4), "linear.bias": torch.ones(4)}
    torch.testing.assert_close(torch.func.functional_call(fast, swapped, (x,)).out, -torch.ones(3, 4))
    assert len(build.calls) == 1


def test_a_change_of_dtype_captures_again_and_back_does_not() -> None:
    model, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x)
    reference = copy.deepcopy(model)
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.float32)):
        out = fast.to(dtype)(x.to(dtype)).out
        assert out.dtype is dtype
        torch.testing.assert_close(out, -reference.to(dtype)(x.to(dtype)).out)
        assert len(build.calls) == min(i + 2, 3)


def test_a_replaced_submodule_captures_again() -> None:
    model, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x)
    fast.linear = nn.Linear(4, 6)
    assert fast(x).out.shape == (3, 6)
    torch.testing.assert_close(fast(x).out, -fast.linear(x))
    assert len(build.calls) == 2
    fast.linear.bias = None
    torch.testing.assert_close(fast(x).out, -fast.linear(x))
    assert model.linear.out_features == 4


def test_autocast_is_captured_apart() -> None:
    model, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = fast(x).out, -model(x).out
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected)
    assert fast(x).out.dtype is torch.float32
    assert len(build.calls) == 2


def test_inference_mode_and_no_grad_use_the_same_program() -> None:
    model, fast, _, build = make()
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            x = torch.randn(3, 4)
            torch.testing.assert_close(fast(x).out, -model(x).out)
    assert len(build.calls) == 1


def test_hooks_on_submodules_are_called_by_the_original_forward() -> None:
    model, fast, notes, _ = make()
    x, seen = torch.randn(3, 4), []
    fast(x)
    hook = fast.linear.register_forward_hook(lambda m, a, out: seen.append(out))
    torch.testing.assert_close(fast(x).out, model(x).out)
    assert len(seen) == 1
    assert len(notes.warnings) == 1
    assert "linear has hooks" in notes.warnings[0]
    hook.remove()
    torch.testing.assert_close(fast(x).out, -model(x).out)


def test_hooks_on_the_module_itself_run_once_around_the_program() -> None:
    model = Small().eval()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda m, a: seen.append("in"))
    model.register_forward_hook(lambda m, a, out: seen.append("out"))
    _, fast, _, _ = make(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(fast(x).out, -model.linear(x))
    assert seen == ["in", "out"]


def test_arguments_no_program_can_take_run_the_original() -> None:
    class Cache:
        used = 0

    class Uses(Small):
        def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
            if cache is not None:
                cache.used += 1
            return self.linear(x)

    model, fast, notes, build = make(Uses().eval())
    x, cache = torch.randn(3, 4), Cache()
    for _ in range(2):
        torch.testing.assert_close(fast(x, cache), model.linear(x))
    assert cache.used == 2
    assert build.calls == []
    assert notes.warnings == ["a call with an argument of type Cache runs the original forward"]
    torch.testing.assert_close(fast(x), -model.linear(x))


def test_a_builder_may_leave_a_kind_of_call_alone() -> None:
    model, fast, notes, _ = make(build=lambda m, a, k: None)
    torch.testing.assert_close(fast(torch.ones(3, 4)).out, model(torch.ones(3, 4)).out)
    assert notes.warnings == []


class ReadsValues(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = self.linear(x)
        return y if x.sum().item() > 0 else y * 2


def test_a_failed_capture_runs_the_original_and_says_so_once() -> None:
    model, fast, notes, build = make(ReadsValues().eval())
    for sign in (1, -1):
        torch.testing.assert_close(fast(sign * torch.ones(3, 4)), model(sign * torch.ones(3, 4)))
    assert len(build.calls) == 1
    assert len(notes.warnings) == 1
    assert "the original forward runs, because capture failed" in notes.warnings[0]


def test_a_failed_capture_can_fall_back_to_pieces() -> None:
    pieces = []
    backend = make_backend(lambda captured: pieces.append(captured) is not None)
    model, fast, notes, _ = make(ReadsValues().eval(), fallback=Doors(backend))
    torch.testing.assert_close(fast(torch.ones(3, 4)), model(torch.ones(3, 4)))
    assert any("linear.weight" in piece.fqn.values() for piece in pieces)
    assert "compiled piece by piece" in notes.warnings[0]


def test_the_number_of_programs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnc.result, "MAX_PROGRAMS", 3)
    model, fast, notes, build = make(build=Builder(dynamic=None))
    for n in range(2, 8):
        out, expected = fast(torch.ones(n, 4)).out, model(torch.ones(n, 4)).out
        torch.testing.assert_close(out, -expected if n < 5 else expected)
    assert len(build.calls) == 3
    assert len(notes.warnings) == 1


def test_a_copy_keeps_the_programs_and_its_own_weights() -> None:
    model, fast, _, build = make()
    x = torch.randn(3, 4)
    fast(x)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.linear.weight.zero_()
    torch.testing.assert_close(other(x).out, -model.linear.bias.expand(3, 4))
    torch.testing.assert_close(fast(x).out, -model(x).out)
    assert len(build.calls) == 1
    twin = make_result(fast, build, report=Notes())
    torch.testing.assert_close(twin(x).out, -model(x).out)
    assert "report" in vars(twin)


def test_pickling_gives_a_clear_error_and_state_dicts_do_not() -> None:
    _, fast, _, _ = make()
    with pytest.raises(AttncError, match=r"an optimized Small cannot be pickled\n  try: attnc.save"):
        pickle.dumps(fast)
    pickle.dumps(fast.state_dict())


def test_an_outer_compile_traces_the_program() -> None:
    model, fast, notes, build = make()
    fast(torch.randn(3, 4))
    torch._dynamo.reset()
    outer = torch.compile(fast, backend="eager", fullgraph=True)
    for n in (3, 5):
        torch.testing.assert_close(outer(torch.ones(n, 4)).out, -model(torch.ones(n, 4)).out)
    never = make()[1]
    torch.testing.assert_close(
        torch.compile(never, backend="eager")(torch.ones(3, 4)).out, model(torch.ones(3, 4)).out
    )
    program = torch.export.export(fast, (torch.ones(3, 4),), strict=False)
    torch.testing.assert_close(program.module()(torch.ones(3, 4)).out, -model(torch.ones(3, 4)).out)
    assert len(build.calls) == 1
    assert notes.warnings == []


def test_threads_share_one_capture() -> None:
    model, fast, _, build = make()
    x, outs = torch.randn(3, 4), []
    threads = [threading.Thread(target=lambda: outs.append(fast(x).out.detach())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(build.calls) == 1
    for out in outs:
        torch.testing.assert_close(out, -model(x).out)


def test_a_thread_beside_an_export_is_not_traced() -> None:
    traced = []

    class Exported(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            traced.append(being_traced())
            beside = threading.Thread(target=lambda: traced.append(being_traced()))
            beside.start()
            beside.join()
            return x + 1

    torch.export.export(Exported(), (torch.ones(3, 4),), strict=False)
    assert traced[:2] == [True, False]


def test_nested_arguments_and_results() -> None:
    class Nested(Small):
        def forward(self, pair: tuple[torch.Tensor, dict[str, Any]]) -> dict[str, Any]:
            return {"y": [self.linear(pair[0]), None], "n": pair[1]["n"]}

    model, fast, _, build = make(Nested().eval())
    x = torch.randn(3, 4)
    for n in (1, 2):
        reply = fast((x, {"n": n}))
        torch.testing.assert_close(reply["y"][0], -model.linear(x))
        assert reply["y"][1] is None
        assert reply["n"] == n
    assert len(build.calls) == 2


def test_a_replaced_forward_is_refused() -> None:
    model = Small()
    model.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with pytest.raises(CaptureError, match="own forward, found one set on"):
        make_result(model, Builder(), report=Notes())


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    model = Small()
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match="expected a module that can be copied"):
        clone_module(model)


def test_a_clone_shares_plain_tensors_and_tied_weights() -> None:
    model = Small()
    model.table = torch.ones(3)
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.linear.weight
    clone = clone_module(model)
    assert clone.table is model.table
    assert clone.tied.weight is clone.linear.weight is model.linear.weight


def test_lazy_results_compile_at_the_first_call_at_any_size() -> None:
    torch._dynamo.reset()
    pieces = []

    def negate(captured: Any) -> bool:
        pieces.append(captured)
        for node in [n for n in captured.graph.nodes if n.target is aten.linear.default]:
            with captured.graph.inserting_after(node):
                negated = captured.graph.call_function(aten.neg.default, (node,))
            node.replace_all_uses_with(negated, delete_user_cb=lambda user, new=negated: user is not new)
        return True

    model, fast, _, _ = make(lazy=make_backend(negate))
    for n in (3, 5, 6):
        torch.testing.assert_close(fast(torch.ones(n, 4)).out, -model(torch.ones(n, 4)).out)
    assert len(pieces) == 2
    assert type(fast) is Small
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.linear.weight.zero_()
    torch.testing.assert_close(other(torch.ones(3, 4)).out, -model.linear.bias.expand(3, 4))
    with pytest.raises(AttncError, match="cannot be pickled"):
        pickle.dumps(fast)


# transformers


def tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 32, "attn_implementation": "eager",
    }  # fmt: skip
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1)).eval()


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -1] = 0
    return {"input_ids": torch.randint(1, 50, (batch, length)), "attention_mask": mask}


def test_bert_keeps_its_outputs_sizes_and_files(tmp_path: Path) -> None:
    model, fast, notes, build = make(tiny("bert"), Builder(edit=False))
    for size in ((2, 7), (3, 9)):
        inputs = tokens(*size)
        out, expected = fast(**inputs), model(**inputs)
        assert type(out) is type(expected)
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
        torch.testing.assert_close(
            fast(*inputs.values()).pooler_output, expected.pooler_output, rtol=0, atol=0
        )
    assert len(build.calls) == 1
    fast.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(**inputs).pooler_output, expected.pooler_output, rtol=0, atol=0)
    assert fast.config.hidden_size == 16
    assert notes.warnings == []


@pytest.mark.slow
def test_bert_gives_its_attentions_and_its_own_errors() -> None:
    model, fast, notes, build = make(tiny("bert"), Builder(edit=False))
    inputs = tokens(2, 7)
    expected = model(**inputs)
    weights = fast(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(weights, model(**inputs, output_attentions=True).attentions)
    torch.testing.assert_close(fast(**inputs).pooler_output, expected.pooler_output, rtol=0, atol=0)
    assert len(build.calls) == 2
    # Too long for its positions: the model's own error, and the program stays.
    with pytest.raises(RuntimeError, match=r"(?i)size|index|expand"):
        fast(**tokens(2, 40))
    assert notes.warnings == []


@pytest.mark.slow
def test_llama_returns_its_cache_and_generates() -> None:
    model, fast, notes, build = make(tiny("llama"), Builder(edit=False))
    inputs = tokens(2, 7)
    inputs["attention_mask"][:] = 1
    with torch.no_grad():
        out, expected = fast(**inputs), model(**inputs)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=0)
        assert type(out.past_key_values) is type(expected.past_key_values)
        captures = len(build.calls)
        step = {"input_ids": inputs["input_ids"][:, :1], "use_cache": True}
        torch.testing.assert_close(
            fast(**step, past_key_values=out.past_key_values).logits,
            model(**step, past_key_values=expected.past_key_values).logits,
        )
        # A cache that is passed in is written to, as by the original.
        assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 8
        assert len(build.calls) == captures
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(fast.generate(**inputs, **settings), model.generate(**inputs, **settings))
    reference = copy.deepcopy(model).double()
    torch.testing.assert_close(fast.double()(**inputs).logits, reference(**inputs).logits)
    assert all("Cache" in w for w in notes.warnings)
    assert len(build.calls) >= 2


@pytest.mark.slow
def test_llama_generates_in_lazy_mode() -> None:
    torch._dynamo.reset()
    model, fast, _, _ = make(tiny("llama"), lazy=make_backend(lambda captured: True))
    inputs = tokens(2, 7)
    inputs["attention_mask"][:] = 1
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(**inputs, **settings), model.generate(**inputs, **settings))
