"""However a mask is built, its closed form is found, and keeps the pairs that the construction keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc.ir import Match
from attnc.masks import Dense, Grid, Mask, integers
from attnc.passes.detect import detect
from tests.passes.detect.masks.constructions import CONSTRUCTIONS, Construction, Sizes
from tests.rewriting import Forward, exported, only_spec, rounding

NEG = float("-inf")


def data(name: str, n: Sizes) -> Tensor:
    g = torch.Generator().manual_seed(n.sq)
    if name == "lengths":
        return torch.randint(1, n.sk, (n.b,), generator=g)
    if name == "pairs":
        return torch.rand(n.sq, n.sk, generator=g) < 0.6
    return torch.randint(0, 3, (n.b, n.sk), generator=g)


def attention(c: Construction):
    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        w = q @ k.transpose(-1, -2)
        keep = c.build(Sizes(q.shape[0], q.shape[2], k.shape[2]), *more)
        return w.masked_fill(~keep.bool(), NEG).softmax(-1) @ v

    return run


def arguments(c: Construction, n: Sizes) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(n.b, 3, m, 4, dtype=torch.float64, generator=g) for m in (n.sq, n.sk, n.sk))
    return (q, k, v, *(data(name, n) for name in c.data))


def sizes(c: Construction, symbolic: bool) -> list[Sizes]:
    """Return the traced sizes, then others where lengths are free: odd ones, short and long."""
    if c.length is not None:
        return [Sizes(2, c.length, c.length)]
    return [Sizes(2, 10, 14), *([Sizes(3, 7, 9), Sizes(2, 15, 16)] if symbolic else [])]


CASES = [(n, s) for n, c in CONSTRUCTIONS.items() for s in (False, True) if not (s and c.length)]


@pytest.mark.parametrize(
    ("name", "symbolic"), CASES, ids=[f"{n}-{'free' if s else 'fixed'}" for n, s in CASES]
)
def test_the_closed_form_is_found_and_keeps_the_same_pairs(name, symbolic):
    c = CONSTRUCTIONS[name]
    first, *others = sizes(c, symbolic)
    t = exported(Forward(attention(c)), arguments(c, first), dynamic=symbolic)
    mask = only_spec(t).mask
    assert mask.describe() == c.form
    if not mask.operands:
        for n in (first, *others):
            kept = c.build(n).bool().expand(n.b, 1, n.sq, n.sk)
            assert torch.equal(written_out(mask, n), kept), n
        return
    found, _ = t.detect()
    t.rewrite(found)
    for n in (first, *others):
        args = arguments(c, n)
        expected = attention(c)(*args)
        torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, 8), equal_nan=True)


def written_out(mask: Mask, n: Sizes) -> Tensor:
    return mask.keep(Grid(n.sq, n.sk, torch.device("cpu"), {}, n.b)).expand(n.b, 1, n.sq, n.sk)


def test_document_ids_are_rows_and_never_a_matrix():
    c = CONSTRUCTIONS["documents_and_causal"]
    spec = only_spec(exported(Forward(attention(c)), arguments(c, Sizes(2, 10, 14))))
    assert [(o.axes, o.dtype) for o in spec.captured] == [("bk", torch.int64), ("bq", torch.int64)]
    assert set(integers(spec.mask)) == {o.name for o in spec.captured}


def test_a_mask_that_is_causal_at_one_length_only_is_not_called_causal():
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        keep = (j <= i) & (i - j < 12)  # a window that is wider than the traced length
        return (q @ k.mT).masked_fill(~keep, NEG).softmax(-1) @ v

    args = tuple(torch.randn(2, 3, 10, 4) for _ in range(3))
    for dynamic in (False, True):
        assert str(only_spec(exported(Forward(f), args, dynamic=dynamic)).mask) == "window(left=11,right=0)"


def test_a_form_that_was_computed_says_that_it_holds_at_these_sizes():
    c = CONSTRUCTIONS["own_key_by_computing"]
    found, _ = exported(Forward(attention(c)), arguments(c, Sizes(2, 16, 16))).detect()
    assert [t.endswith("has the sizes it had") for t in found[0].match.conditions] == [True]


def test_values_are_never_guessed():
    """A tensor that happens to be causal at run time stays what it is: data."""
    args = (*(torch.randn(2, 3, 6, 4) for _ in range(3)), torch.ones(6, 6, dtype=torch.bool).tril())

    def f(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep, NEG).softmax(-1) @ v

    assert isinstance(only_spec(exported(Forward(f), args)).mask, Dense)


class Stored(torch.nn.Module):
    """A causal mask in a buffer of a fixed size, of which a part is read (nanoGPT, GPT-2)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", mask.view(1, 1, 16, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, n = q @ k.mT, q.shape[2]
        part = self.bias[:, :, :n, :n]
        return w.masked_fill(part == 0, NEG).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
def test_a_stored_triangle_is_causal_and_one_pair_off_is_not(dynamic):
    args = tuple(torch.randn(2, 3, 10, 4) for _ in range(3))
    triangle = torch.ones(16, 16).tril()
    for mask, causal in (
        (triangle, True),
        (triangle.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)), False),
    ):
        found = sites_of(Stored(mask), args, dynamic)
        assert [m.spec.mask.describe() for m in found] == (["causal"] if causal else ["dense"])
        assert bool(found[0].conditions) == causal


def sites_of(model: Stored, args: tuple[Tensor, ...], dynamic: bool) -> list[Match]:
    t = exported(model, args, dynamic=dynamic)
    found, missed = detect(t.work, {name: model.bias for name in t.tensors})
    assert not missed
    return [f.match for f in found]
