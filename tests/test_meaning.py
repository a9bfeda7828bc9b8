"""A rewritten program computes what the original does, in fp64, for every spelling of the corpus.

Sizes are all different primes, so that no axis can be taken for another by its length; and then all alike, so
that an axis that was taken for another shows in the values.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnc.passes.rewrite.apply import Rewriter
from tests.corpus import ALIKE, CASES, DISTINCT, MISSES, OTHER, Case, Sizes, make_inputs
from tests.rewriting import Forward, Traced, exported, rounding, traced

SYMBOLIC = (
    "bmm",
    "packed_split_heads",
    "window_partition",
    "causal_from_the_end",
    "causal_and_padding",
    "padding_by_lengths",
    "grouped_by_repeat_interleave",
    "cache_by_cat",
    "sink_per_head",
    "relative_table",
)


def assert_equal(found: Tensor, expected: Tensor, args: tuple[Tensor, ...], z: Sizes) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(args, z.d + z.t), equal_nan=True)


def rewritten(t: Traced) -> int:
    """Rewrite the sites of which nothing is read elsewhere; return how many."""
    found, _ = t.detect()
    live = [x for x in found if not x.match.escapes]
    t.rewrite(live)
    return len(live)


def attends(t: Traced) -> int:
    return sum(n.target is torch.ops.attnc.attend.default for n in t.graph.nodes)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("z", [DISTINCT, ALIKE], ids=["distinct", "alike"])
def test_spelling_computes_the_same_when_rewritten(name, z):
    case = CASES[name]
    args = make_inputs(case, z)
    t = traced(case.f, args)
    assert rewritten(t) == attends(t) == 1
    assert_equal(t.run(*args), case.f(*args), args, z)


@pytest.mark.parametrize("name", MISSES)
@pytest.mark.parametrize("z", [DISTINCT, ALIKE], ids=["distinct", "alike"])
def test_near_miss_computes_the_same_if_it_is_rewritten_at_all(name, z):
    case = MISSES[name]
    args = make_inputs(case, z)
    t = traced(case.f, args)
    rewritten(t)
    assert_equal(t.run(*args), case.f(*args), args, z)


def check_symbolic(case: Case) -> None:
    """Rewrite at one set of sizes, run at another."""
    t = traced(case.f, make_inputs(case, DISTINCT), symbolic=True)
    assert rewritten(t) == 1
    for z in (DISTINCT, OTHER):
        args = make_inputs(case, z)
        assert_equal(t.run(*args), case.f(*args), args, z)


@pytest.mark.parametrize("name", SYMBOLIC)
def test_spelling_computes_the_same_at_other_sizes(name):
    check_symbolic(CASES[name])


FIXED = ("grouped_by_five_axes", "grouped_by_broadcast", "one_key_head", "fused_call")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in SYMBOLIC and not n.startswith(FIXED)])
def test_every_spelling_computes_the_same_at_other_sizes(name):
    check_symbolic(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
def test_every_exported_spelling_computes_the_same_when_rewritten(name, dynamic):
    case = CASES[name]
    args = make_inputs(case)
    t = exported(Forward(case.f), args, dynamic=dynamic)
    count = rewritten(t)
    assert count == (0 if dynamic and name.startswith(FIXED) and "padding" not in name else 1)
    for z in (DISTINCT, OTHER) if dynamic else (DISTINCT,):
        inputs = make_inputs(case, z)
        assert_equal(t.run(*inputs), case.f(*inputs), inputs, z)


# ---------------------------------------------------------------- programs with more around the attention


class Layer(nn.Module):
    """A layer as people write it: in-place edits of the scores, dropout, a cache of positions."""

    def __init__(self, heads: int, width: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.q = nn.Linear(heads * width, heads * width)
        self.kv = nn.Linear(heads * width, 2 * kv_heads * width)
        self.out = nn.Linear(heads * width, heads * width)
        self.register_buffer("positions", torch.arange(64))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        b, s, c = x.shape
        q = self.q(x).view(b, s, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, self.kv_heads, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        n = self.heads // self.kv_heads
        k, v = (y[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2) for y in (k, v))
        w = torch.matmul(q, k.transpose(-2, -1))
        w.mul_(self.width**-0.5)
        i = torch.arange(s)
        hide = (i[None] > i[:, None])[None, None] | ~valid[:, None, None]
        w.masked_fill_(hide, torch.finfo(w.dtype).min)
        w = nn.functional.dropout(w.softmax(-1), 0.1, self.training)
        return x + self.out((w @ v).transpose(1, 2).reshape(b, s, c))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(6, 5, 3) for _ in range(2)])

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, valid)
        return x


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
def test_a_model_with_edits_in_place_computes_the_same(dynamic):
    torch.manual_seed(0)
    model = Tower().double().eval()
    x, valid = torch.randn(2, 7, 30, dtype=torch.float64), torch.ones(2, 7, dtype=torch.bool)
    valid[0, :3], valid[1, 5:] = False, False
    t = exported(model, (x, valid), dynamic=dynamic)
    assert rewritten(t) == attends(t) == 2
    left = {n.target for n in t.graph.nodes}
    assert not left & {
        torch.ops.aten.softmax.int,
        torch.ops.aten.masked_fill_.Scalar,
        torch.ops.aten.matmul.default,
    }
    with torch.no_grad():
        expected, found = model(x, valid), t.run(x, valid)
    # Eight sums of 30 terms follow one another; each may turn the last bits of values of size 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * 30 * 10 * torch.finfo(torch.float64).eps)


def test_scores_written_after_the_softmax_has_read_them_are_no_concern():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.transpose(-2, -1)
        out = w.softmax(-1) @ v
        w.mul_(2.0)
        return out + w.sum()

    args = make_inputs(CASES["no_scale"])
    t = exported(Forward(attention), args)
    rewritten(t)
    assert_equal(t.run(*args), attention(*args), args, DISTINCT)


def test_an_operand_written_before_the_output_is_not_read_too_late():
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        w = (q @ k.transpose(-2, -1)).softmax(-1)
        k.zero_()
        return w @ v + k.sum()

    args = make_inputs(CASES["no_scale"])
    t = exported(Forward(attention), args)
    found, _ = t.detect()
    editor = Rewriter(t.graph, t.work, t.links)
    live = [x for x in found if not x.match.escapes and editor.blocked(x) is None]
    t.rewrite(live)
    assert_equal(t.run(*args), attention(*args), args, DISTINCT)
