"""Capture at both doors: links hold values, edits take effect, the user's model stays as it was."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from attnc.capture.whole import (
    Captured,
    capture_export,
    capture_exported,
    capture_graph_module,
    make_backend,
)
from attnc.errors import CaptureError

aten = torch.ops.aten

# Dynamo and export warn about their own internals; no test here is about those.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self, size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, s, d))


class Stack(nn.Module):
    def __init__(self, layers: int = 1, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.drop(layer(x))
        return x


def negate_linears(captured: Captured) -> bool:
    """Negate every linear found in ``work``, edited in ``graph`` through the links: visible in any output."""
    nodes = {n.name: n for n in captured.graph.nodes}
    found = [n for n in list(captured.work.nodes) if n.target is aten.linear.default]
    for copy_ in found:
        node = nodes[captured.links[copy_.name]]
        with captured.graph.inserting_after(node):
            negated = captured.graph.call_function(aten.neg.default, (node,))
        negated.meta = dict(node.meta)
        node.replace_all_uses_with(negated, delete_user_cb=lambda user, new=negated: user is not new)
    return bool(found)


def negated(model: nn.Module) -> nn.Module:
    """Return what ``negate_linears`` makes of ``model``, spelled with weights."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.neg_()
            module.bias.data.neg_()
    return other


def assert_links_hold(captured: Captured, model: nn.Module, args: tuple[Any, ...]) -> None:
    """Run both graphs; every link must join equal values, read from the original at the end of its run."""
    program = captured.exported
    assert program is not None

    def inputs(graph: fx.Graph) -> list[Any]:
        weights = {n: t for n, t in captured.tensors.items()}
        users = dict(zip(captured.user_inputs, args, strict=True))
        buffers = {k: v for k, v in model.state_dict().items()}
        values = []
        for node in graph.nodes:
            if node.op == "placeholder":
                value = users.get(node.name, weights.get(node.name))
                value = buffers[captured.fqn[node.name]] if value is None else value
                values.append(value.detach().clone())
        return values

    seen = []
    for graph, root in ((captured.graph, captured.owner), (captured.work, captured.work.owning_module)):
        run = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        with torch.no_grad():
            run.run(*inputs(graph))
        seen.append({n.name: v for n, v in run.env.items()})
    original, work = seen
    for a, b in captured.links.items():
        torch.testing.assert_close(work[a], original[b], rtol=0, atol=0, msg=f"{a} -> {b}")


class InPlace(nn.Module):
    """Writes to views, bases, slices and buffers, and reads before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.linear(x)
        self.count.add_(1)
        early.view(-1, 2, 2).mul_(2)
        late = early + 1
        filled = early.masked_fill_(late > 0, 0.5)
        table = torch.zeros_like(filled)
        table[:, 0] = 1
        return self.norm(filled + late + table + torch.tensor([1.0, 2.0, 3.0, 4.0])).relu_()


class SquareTranspose(nn.Module):
    """The copy writes ``v`` back into its base through a view of the same shape as ``v``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = x + 1
        v = base.transpose(0, 1)
        w = v.add_(torch.arange(16.0).view(4, 4))
        return w * 2 + base


class WithoutGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            table = (x.cos() + 1).contiguous()
        return self.linear(x) * table


class DropoutAlias(nn.Module):
    """Dropout in eval returns its input itself, and its schema does not say so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x * 2
        b = nn.functional.dropout(a, 0.5, training=False)
        c = a + 1
        b.add_(3)
        return a + c


MODELS = {
    "attention": (Stack, (3, 5, 8)),
    "in place": (InPlace, (3, 4)),
    "square transpose": (SquareTranspose, (4, 4)),
    "without grad": (WithoutGrad, (3, 4)),
    "dropout alias": (DropoutAlias, (3, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_link_joins_equal_values_to_the_end_of_the_run(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    captured = capture_export(model, (x,))
    assert_links_hold(captured, model, (x,))
    assert captured.links


def test_links_lead_to_what_a_rewrite_needs() -> None:
    captured = capture_export(Stack().eval(), (torch.randn(3, 5, 8),))
    work = [
        n for n in captured.work.nodes if n.op != "output" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    unlinked = [n.name for n in work if n.name not in captured.links]
    copies = [
        n for n in unlinked if "clone" not in n
    ]  # one original became clone and view; the view is linked
    assert copies == []


def test_values_written_later_are_not_linked() -> None:
    captured = capture_export(InPlace().eval(), (torch.randn(3, 4),))
    linked = set(captured.links.values())
    assert not linked & {"linear", "view", "mul_", "zeros_like", "b_count", "batch_norm"}
    assert {"masked_fill_", "gt", "relu_", "x"} <= linked


class KeysInParts(nn.Module):
    """Puts the keys together by writes into an empty tensor, reads them, and may write to them again."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again

    def forward(self, q: torch.Tensor, plain: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
        k = q.new_empty(q.shape)
        k[..., :6] = plain
        k[..., 6:] = turned
        out = nn.functional.scaled_dot_product_attention(q, k, plain, is_causal=True, scale=0.25)
        return out + k.mul_(2).sum() if self.again else out


@pytest.mark.parametrize("again", [False, True])
def test_keys_written_in_parts_are_linked_to_what_a_fused_call_reads(again: bool) -> None:
    args = (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6), torch.randn(2, 1, 5, 2))
    model = KeysInParts(again)
    captured = capture_export(model, args, dynamic_shapes=None)
    assert_links_hold(captured, model, args)
    call = next(n for n in captured.work.nodes if "scaled_dot_product" in str(n.target))
    assert (call.args[1].name in captured.links) == (not again)


def test_a_value_out_of_a_higher_order_call_is_linked_through_its_user() -> None:
    class UnderAutocast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = x.cos() + 1
            return y * x

    captured = capture_export(UnderAutocast(), (torch.randn(3, 4),))
    calls = [n for n in captured.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    assert calls, "this test needs a model whose export holds a higher-order call"
    outputs = {u.name for call in calls for u in call.users}
    assert outputs & set(captured.links.values())


def test_weights_are_the_live_tensors_by_name() -> None:
    model = InPlace().eval()
    captured = capture_export(model, (torch.randn(3, 4),))
    by_name = {captured.fqn[p]: t for p, t in captured.tensors.items() if p in captured.fqn}
    assert by_name["linear.weight"] is model.linear.weight
    assert by_name["norm.running_mean"] is model.norm.running_mean
    assert by_name["count"] is None, "the program writes to it: its value is no constant"
    constants = [t for p, t in captured.tensors.items() if p not in captured.fqn]
    assert any(t is not None and t.tolist() == [1.0, 2.0, 3.0, 4.0] for t in constants)
    assert captured.user_inputs == ("x",)
    assert captured.fqn.keys() <= captured.tensors.keys()


def test_sizes_that_cannot_vary_are_listed() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    assert capture_export(model, (torch.randn(3, 5, 8),)).static == ("input dim 2 == 8",)
    assert capture_export(model, (torch.randn(1, 5, 8),)).static == ("input dim 0 == 1", "input dim 2 == 8")
    fixed = capture_export(model, (torch.randn(3, 5, 8),), dynamic_shapes=None)
    assert fixed.static == ("input dim 0 == 3", "input dim 1 == 5", "input dim 2 == 8")
    batch = torch.export.Dim("batch")
    given = capture_export(model, (torch.randn(3, 5, 8),), dynamic_shapes={"input": {0: batch}})
    assert given.static == ("input dim 1 == 5", "input dim 2 == 8")


class WantsNumbers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x.shape[0], int):
            raise TypeError("sizes must be numbers")
        return x * x.shape[0]


def test_sizes_are_fixed_with_a_warning_where_free_ones_fail() -> None:
    captured = capture_export(WantsNumbers(), (torch.randn(3, 4),))
    assert captured.static == ("x dim 0 == 3", "x dim 1 == 4")
    assert len(captured.warnings) == 1
    assert "sizes must be numbers" in captured.warnings[0]


def test_an_edited_program_stays_valid_runs_saves_and_loads(tmp_path: Path) -> None:
    model, x = Stack().eval(), torch.randn(3, 5, 8)
    captured = capture_export(model, (x,))
    assert negate_linears(captured)
    program = captured.exported
    assert program is not None
    assert program.graph is captured.graph
    captured.owner.recompile()
    program.validate()
    torch.testing.assert_close(program.module()(x), negated(model)(x))
    torch.export.save(program, tmp_path / "m.pt2")
    again = torch.export.load(tmp_path / "m.pt2")
    torch.testing.assert_close(again.module()(torch.randn(4, 7, 8)).shape, torch.Size((4, 7, 8)))
    torch.testing.assert_close(again.module()(x), negated(model)(x))


def test_a_users_program_is_captured_and_stays_as_it_was(tmp_path: Path) -> None:
    model, x = Stack().eval(), torch.randn(3, 5, 8)
    program = torch.export.export(model, (x,), strict=False)
    before = str(program.graph)
    captured = capture_exported(program)
    assert_links_hold(captured, model, (x,))
    negate_linears(captured)
    captured.owner.recompile()
    assert captured.exported is not None
    torch.testing.assert_close(captured.exported.module()(x), negated(model)(x))
    assert str(program.graph) == before
    torch.testing.assert_close(program.module()(x), model(x))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = capture_exported(torch.export.load(tmp_path / "m.pt2"))
    assert set(loaded.links) == set(captured.links)


def test_a_symbolically_traced_module_is_captured() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    traced = fx.symbolic_trace(model)
    before = traced.code
    captured = capture_graph_module(traced, (x,))
    assert captured.door == "graph"
    negate_linears(captured)
    captured.owner.recompile()
    assert captured.exported is not None
    torch.testing.assert_close(captured.exported.module()(x), torch.relu(-model[0](x)))
    assert traced.code == before


class FailsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Linear(7, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


def test_a_failing_forward_gives_its_own_error_and_where() -> None:
    with pytest.raises(CaptureError, match=r"in layers\.1 \(Linear, linear\.py:\d+\)") as info:
        capture_export(FailsInside(), (torch.randn(2, 8),))
    assert "mat1 and mat2 shapes cannot be multiplied" in str(info.value)
    assert "float32[2, 8]" in str(info.value)
    # Only running it shows this one: tracing does not look at values.
    with pytest.raises(CaptureError, match=r"index out of range in self"):
        capture_export(nn.Sequential(nn.Embedding(4, 2)), (torch.tensor([9]),))


def test_a_forward_that_runs_but_cannot_be_followed_is_told_apart() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(CaptureError, match="its forward runs, but could not be captured as one graph"):
        capture_export(Reads(), (torch.ones(2, 3),))


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "words"),
    [
        (lambda x: x, (), None, "expected a torch.nn.Module, found function"),
        (nn.Identity(), torch.ones(1), None, "expected args as a tuple, found Tensor"),
        (nn.Identity(), (), 3, "expected kwargs as a dict, found int"),
    ],
)
def test_inputs_that_are_none_get_a_clear_error(model: Any, args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        capture_export(model, args, kwargs)


def test_capture_leaves_model_inputs_and_random_state_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random, value = torch.get_rng_state(), x.clone()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    marks = set(dir(x))
    capture_export(model, (x,))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, value)
    assert set(dir(x)) == marks
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


# The Dynamo door.


def gradients(model: nn.Module, x: torch.Tensor, run: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = run(x)
    (out**2).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("then", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_edits_take_effect_forward_and_backward_at_changing_sizes(then: str) -> None:
    model = Stack()
    doors: list[Captured] = []

    def rewrite(captured: Captured) -> bool:
        doors.append(captured)
        return negate_linears(captured)

    fast = torch.compile(model, backend=make_backend(rewrite, then, declined=pytest.fail))
    reference = negated(model)
    for shape in ((2, 5, 8), (3, 6, 8), (4, 9, 8)):
        x = torch.randn(shape)
        out, grads = gradients(model, x, fast)
        expected, expected_grads = gradients(reference, x, reference)
        # Same operations in the same order: only the sign of weights differs, which is exact.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert grads.keys() == expected_grads.keys()
        for name, g in grads.items():
            torch.testing.assert_close(-g, expected_grads[name], rtol=1e-4, atol=1e-5)
    assert len(doors) == 2, "one static piece, then one with free sizes"
    captured = doors[0]
    assert captured.door == "dynamo"
    assert captured.work is captured.graph
    live = {captured.fqn[p]: t for p, t in captured.tensors.items()}
    assert live["layers.0.qkv.weight"] is model.layers[0].qkv.weight
    assert len(captured.user_inputs) == 1
    assert len(doors[1].user_inputs) > 1, "free sizes come as inputs"


def test_an_unchanged_graph_goes_on_as_dynamo_made_it() -> None:
    seen: dict[str, Any] = {}

    def spy(gm: fx.GraphModule, inputs: Any) -> Any:
        seen["gm"], seen["run"] = gm, make_backend(lambda c: False)(gm, inputs)
        return seen["run"]

    model, x = Stack(), torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.compile(model, backend=spy)(x), model(x))
    assert seen["run"].__self__ is seen["gm"]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_pieces_around_a_graph_break_are_each_rewritten() -> None:
    model, x = Broken(), torch.randn(2, 5, 8)
    names: list[set[str]] = []

    def rewrite(captured: Captured) -> bool:
        names.append(set(captured.fqn.values()))
        return negate_linears(captured)

    torch.testing.assert_close(torch.compile(model, backend=make_backend(rewrite))(x), negated(model)(x))
    layer = ("qkv.weight", "qkv.bias", "out.weight", "out.bias")
    assert names == [{f"{part}.{n}" for n in layer} for part in ("first", "second")]


def test_train_and_eval_are_captured_apart() -> None:
    model, x = Stack(drop=0.5), torch.randn(2, 5, 8)
    fast = torch.compile(model, backend=make_backend(negate_linears))
    reference = negated(model)
    for mode in (True, False):
        model.train(mode), reference.train(mode)
        torch.manual_seed(3)
        out = fast(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, reference(x))


def test_ambient_autocast_is_kept() -> None:
    model, x = Stack(), torch.randn(2, 5, 8)
    fast = torch.compile(model, backend=make_backend(negate_linears))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), negated(model)(x), rtol=0, atol=0)


class Checkpointed(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x.sin()


def test_bodies_of_checkpointed_layers_are_rewritten_one_by_one() -> None:
    model, x = Checkpointed(), torch.randn(2, 5, 8)
    told: list[str] = []
    backend = make_backend(negate_linears, declined=told.append)
    out, grads = gradients(model, x, torch.compile(model, backend=backend))
    reference = negated(model)
    expected, expected_grads = gradients(reference, x, reference)
    torch.testing.assert_close(out, expected)
    for name, g in grads.items():
        torch.testing.assert_close(-g, expected_grads[name], rtol=1e-4, atol=1e-5)
    assert len(told) == 1
    assert "apart from the bodies" in told[0]


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        log[0] = self.seen
        return self.linear(x) * self.seen


def test_written_inputs_and_buffers_are_written_without_gradients() -> None:
    model = Counts()
    fast = torch.compile(model, backend=make_backend(negate_linears, declined=pytest.fail))
    x, log = torch.randn(2, 4), torch.zeros(3)
    with torch.no_grad():
        for i in (1, 2):
            torch.testing.assert_close(fast(x, log), -model.linear(x) * i)
            assert model.seen == i
            assert log.tolist() == [i, 0, 0]


def test_written_inputs_in_training_hand_the_graph_on_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    reference = copy.deepcopy(model)
    told: list[str] = []
    fast = torch.compile(model, backend=make_backend(negate_linears, declined=told.append))
    x = torch.randn(5, 4)
    out, grads = gradients(model, x, fast)
    expected, expected_grads = gradients(reference, x, reference)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)
    assert "writes to its inputs while gradients are recorded" in told[0]


class Constants(nn.Module):
    def forward(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, int]:
        return nn.functional.linear(x, torch.eye(4)) + torch.tensor([1.0, 2.0, 3.0, 4.0]), x.shape[0] * n


def test_constants_and_numbers_keep_the_calling_convention() -> None:
    fast = torch.compile(
        Constants(), backend=make_backend(negate_linears, declined=pytest.fail), dynamic=True
    )
    for rows, n in ((3, 2), (5, 7)):
        x = torch.randn(rows, 4)
        out, number = fast(x, n)
        torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 3.0, 4.0]) - x)
        assert number == rows * n


class EinsumView(nn.Module):
    """An einsum of one operand is a view, and its schema does not say so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x * 2
        torch.einsum("ij->ji", a).add_(5)
        return a


def test_writes_that_torch_would_lose_are_kept_or_refused() -> None:
    x, told = torch.randn(3, 4), []
    backend = make_backend(lambda captured: True, declined=told.append)
    torch.testing.assert_close(torch.compile(DropoutAlias(), backend=backend)(x), DropoutAlias()(x))
    assert told == []
    torch.testing.assert_close(torch.compile(EinsumView(), backend=backend)(x), EinsumView()(x))
    assert len(told) == 1
    assert "which torch loses track of" in told[0]
    with pytest.raises(
        CaptureError, match="einsum may return a view of its input, which the model then writes"
    ):
        capture_export(EinsumView(), (x,))


def test_an_unknown_next_stage_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"expected then to be one of .*'inductor'.*, found 'onnx'"):
        make_backend(negate_linears, "onnx")


def test_the_backend_is_found_by_name_and_takes_options(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}

    def dynamo_rewriter(**options: Any) -> Any:
        got.update(options)
        return negate_linears

    api = types.ModuleType("attnc.api")
    api.dynamo_rewriter = dynamo_rewriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attnc.api", api)
    model, x = Stack(), torch.randn(2, 5, 8)
    fast = torch.compile(model, backend="attnc", options={"then": "aot_eager", "forms": "fused"})
    torch.testing.assert_close(fast(x), negated(model)(x))
    assert got == {"forms": "fused"}


@pytest.mark.slow
def test_inductor_runs_what_was_rewritten_and_does_not_mistake_other_softmaxes() -> None:
    class Columns(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) / 4.0, dim=-2) @ v

    q, k, v = (torch.randn(2, 3, 5, 16) for _ in range(3))
    for rewrite in (lambda c: False, lambda c: True):
        torch._dynamo.reset()
        fast = torch.compile(Columns(), backend=make_backend(rewrite, "inductor"))
        torch.testing.assert_close(fast(q, k, v), Columns()(q, k, v))
    model, x = Stack(), torch.randn(2, 5, 8)
    fast = torch.compile(model, backend=make_backend(negate_linears, "inductor", mode="reduce-overhead"))
    torch.testing.assert_close(fast(x), negated(model)(x))
