"""What feeds q and k is named by what it computes, in any spelling, and look-alikes are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnc.capture.whole import capture_export
from attnc.passes.analyze.operands import Namer
from attnc.passes.detect import detect
from tests.corpus import CASES, make_inputs
from tests.passes.analyze.operands import spellings as S
from tests.rewriting import traced

X = (2, 12, 32)


def names(model: nn.Module, *args: Tensor, dynamic: bool = False) -> dict[str, str]:
    """Return the names of the one site of a module, captured with the values of its weights."""
    captured = capture_export(model, args, {}, dynamic_shapes="auto" if dynamic else None)
    found, missed = detect(captured.work, captured.tensors)
    assert len(found) == 1, missed
    return Namer(captured.work, captured.tensors).names(found[0])


def traced_names(model: nn.Module, *args: Tensor) -> dict[str, str]:
    """Return the names of the one site of a module, traced and not exported."""
    weights = dict(model.named_parameters())

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(weights, values, strict=False))
        return torch.func.functional_call(model, given, values[len(weights) :])

    graph = traced(call, (*weights.values(), *args)).work
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    tensors = dict(zip(inputs, weights.values(), strict=False))
    found, missed = detect(graph, tensors)
    assert len(found) == 1, missed
    return Namer(graph, tensors).names(found[0])


def both(text: str) -> dict[str, str]:
    return {"q": text, "k": text}


SAME = (
    (S.half_by_rotate_half, S.half_by_two_products, S.half_in_float32, S.complex_parts),
    (
        S.interleaved_by_slices, S.interleaved_by_stacked_halves, S.interleaved_by_view,
        S.interleaved_in_place, S.complex_polar,
    ),
)  # fmt: skip


@pytest.mark.parametrize("group", SAME)
def test_spellings_of_one_rotation_compute_the_same(group):
    x = torch.randn(2, 3, 12, S.D)
    t = S.angles(12)
    first = torch.arange(S.HALF) if group is SAME[0] else torch.arange(0, S.D, 2)
    second = first + (S.HALF if group is SAME[0] else 1)
    expected = torch.empty_like(x)
    expected[..., first] = x[..., first] * t.cos() - x[..., second] * t.sin()
    expected[..., second] = x[..., second] * t.cos() + x[..., first] * t.sin()
    for f in group:
        torch.testing.assert_close(f(x), expected, msg=f.__name__)


@pytest.mark.parametrize("f", S.ROTATIONS, ids=lambda f: f.__name__)
def test_rotation_is_named(f):
    assert traced_names(S.Attend(f), torch.randn(X)) == both(S.ROTATIONS[f])


@pytest.mark.parametrize("f", [S.half_by_rotate_half, S.complex_polar, S.partial])
def test_rotation_is_named_with_free_sizes_and_behind_grouped_heads(f):
    assert names(S.Attend(f, grouped=True), torch.randn(X), dynamic=True) == both(S.ROTATIONS[f])


@pytest.mark.parametrize("f", S.NORMS, ids=lambda f: f.__name__)
def test_norm_is_named(f):
    assert traced_names(S.Attend(f), torch.randn(X)) == both(S.NORMS[f])


@pytest.mark.parametrize("f", S.LOOK_ALIKES, ids=lambda f: f.__name__)
def test_look_alike_is_not_named(f):
    assert traced_names(S.Attend(f), torch.randn(X)) == {}


def test_rotation_that_is_written_into_slices_is_named():
    assert names(S.Attend(S.interleaved_in_place), torch.randn(X)) == both("rope(interleaved)")


class Gained(nn.Module):
    """Norm with a gain (Gemma adds one to it) before or after the rotation."""

    def __init__(self, norm, rotate, first: bool) -> None:
        super().__init__()
        self.norm, self.rotate, self.first = norm, rotate, first
        self.gain = nn.Parameter(torch.randn(S.D))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return self.rotate(self.norm(x) * (1 + self.gain))
        return self.norm(self.rotate(x)) * self.gain


@pytest.mark.parametrize("norm", [S.rms_upcast, S.layer_by_hand, S.unit, S.rms_module])
@pytest.mark.parametrize("rotate", [S.half_by_rotate_half, S.interleaved_by_view, S.partial])
def test_norm_stands_before_or_after_the_rotation(norm, rotate):
    n, r = S.NORMS[norm], S.ROTATIONS[rotate]
    assert traced_names(S.Attend(Gained(norm, rotate, True)), torch.randn(X)) == both(f"{n}, {r}")
    assert traced_names(S.Attend(Gained(norm, rotate, False)), torch.randn(X)) == both(f"{r}, {n}")


def test_norm_over_all_heads_says_so():
    class Wide(S.Attend):
        def forward(self, x: Tensor) -> Tensor:
            q, k = (S.rms(f(x)) for f in (self.q, self.k))
            q, k, v = (t.view(*x.shape[:2], 4, S.D).transpose(1, 2) for t in (q, k, self.v(x)))
            return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    assert traced_names(Wide(S.rms), torch.randn(X)) == both("rms-norm over all heads")


class Sections(S.Attend):
    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        self.f = lambda t: S.sections(t, places)
        return super().forward(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sections_of_three_position_axes_are_counted(dynamic):
    args = torch.randn(X), torch.arange(36).reshape(3, 12)
    assert names(Sections(S.rms), *args, dynamic=dynamic) == both("m-rope(half, sections 2+3+3)")


class Tables(S.Attend):
    """Rotate by tables that ``make`` gives; ``trained`` makes them weights."""

    def __init__(self, cos: Tensor, sin: Tensor, trained: bool = False) -> None:
        super().__init__(self.turn)
        for name, table in (("cos", cos), ("sin", sin)):
            if trained:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)

    def turn(self, x: Tensor) -> Tensor:
        n = x.shape[-2]
        return x * self.cos[:n] + S.rotate_half(x) * self.sin[:n]


def test_tables_are_believed_for_what_they_hold():
    t = S.angles(40).repeat(1, 2)
    x = torch.randn(X)
    assert names(Tables(t.cos(), t.sin()), x, dynamic=True) == both("rope(half)")
    assert names(Tables(t.cos(), 1.01 * t.sin()), x) == {}
    assert names(Tables(t.cos().roll(1, -1), t.sin()), x) == {}
    assert names(Tables(t.cos(), t.sin(), trained=True), x) == {}


def test_tables_that_the_caller_gives_are_said_to_be_unchecked():
    class Given(S.Attend):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            self.f = lambda t: t * cos + S.rotate_half(t) * sin
            return super().forward(x)

    t = S.angles(12).repeat(1, 2)
    assert names(Given(S.rms), torch.randn(X), t.cos(), t.sin()) == both("rope(half, unchecked tables)")


def test_complex_table_in_a_buffer():
    class Cis(S.Attend):
        def __init__(self) -> None:
            super().__init__(self.turn)
            t = S.angles(40)
            self.register_buffer("cis", torch.polar(torch.ones_like(t), t))

        def turn(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], S.HALF, 2))
            return torch.view_as_real(z * self.cis[: x.shape[-2]]).flatten(-2)

    assert names(Cis(), torch.randn(X), dynamic=True) == both("rope(interleaved)")


def test_only_one_side_may_be_rotated():
    class OneSide(S.Attend):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t(x).view(*x.shape[:2], 4, S.D).transpose(1, 2) for t in (self.q, self.k, self.v))
            return torch.softmax(S.half_by_rotate_half(q) @ k.transpose(-1, -2), -1) @ v

    assert traced_names(OneSide(S.rms), torch.randn(X)) == {"q": "rope(half)"}


def test_layers_are_read_once_and_named_alike():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            f = (Gained(S.rms, S.half_by_rotate_half, True) for _ in range(6))
            self.layers = nn.ModuleList(S.Attend(g) for g in f)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).transpose(1, 2).flatten(2)[..., :32]
            return x

    captured = capture_export(Layers(), (torch.randn(X),), {}, dynamic_shapes=None)
    found, _ = detect(captured.work, captured.tensors)
    namer = Namer(captured.work, captured.tensors)
    assert [namer.names(f) for f in found] == [both("rms-norm, rope(half)")] * 6
    assert len(namer._known) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_corpus_without_rotations_has_no_names(name):
    graph = traced(CASES[name].f, make_inputs(CASES[name])).work
    found, _ = detect(graph, {})
    namer = Namer(graph, {})
    assert [namer.names(f) for f in found] == [{}] * len(found)
