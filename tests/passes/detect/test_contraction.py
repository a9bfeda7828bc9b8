"""Contractions as labels: each spelling computes what its labels say, and look-alikes are none."""

from __future__ import annotations

import string
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnc.passes.detect.contraction import Contraction, contraction
from tests.rewriting import traced

SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "matmul": (lambda a, b: a @ b, (2, 3, 5), (2, 5, 7)),
    "matmul_5d": (lambda a, b: a @ b, (2, 1, 11, 3, 5), (4, 1, 5, 7)),
    "bmm": (torch.bmm, (2, 3, 5), (2, 5, 7)),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.zeros(2, 3, 7), a, b, beta=0), (2, 3, 5), (2, 5, 7)),
    "addmm": (lambda a, b: torch.addmm(torch.zeros(3, 7), a, b, beta=0, alpha=1), (3, 5), (5, 7)),
    "mm": (torch.mm, (3, 5), (5, 7)),
    "linear": (F.linear, (2, 3, 5), (7, 5)),
    "einsum": (lambda a, b: torch.einsum("bqd,kbd->kbq", a, b), (2, 3, 5), (7, 2, 5)),
    "einsum_dots": (lambda a, b: torch.einsum("...qd,...kd->...qk", a, b), (2, 4, 3, 5), (4, 7, 5)),
    "einsum_implicit": (lambda a, b: torch.einsum("...qd,...dk", a, b), (2, 4, 3, 5), (2, 4, 5, 7)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([2], [0])), (2, 3, 5), (5, 7)),
    "tensordot_two": (lambda a, b: torch.tensordot(a, b, dims=([2, 0], [0, 2])), (2, 3, 5), (5, 7, 2)),
    "mul_sum": (lambda a, b: (a[:, :, None] * b[:, None]).sum(-1), (2, 3, 5), (2, 7, 5)),
    "mul_sum_keepdim": (
        lambda a, b: (a[:, :, None] * b[:, None]).sum(-1, keepdim=True),
        (2, 3, 5),
        (2, 7, 5),
    ),
    "mul_sum_of_one_row": (lambda a, b: (a[:, :, None] * b[:, None]).sum(-1), (2, 1, 5), (2, 7, 5)),
    "mul_sum_of_one_column": (lambda a, b: (a[:, :, None] * b[:, None]).sum(-1), (2, 3, 5), (2, 1, 5)),
    "mul_sum_over_one": (lambda a, b: (a[..., None] * b[..., None, :, :]).sum(-2), (2, 3, 1), (2, 1, 5)),
    "inner": (torch.inner, (3, 5), (7, 5)),
    "mul_sum_broadcast": (lambda a, b: (a[..., None] * b).sum(2), (3, 5), (2, 1, 5, 7)),
}


def found(f: Callable[[Tensor, Tensor], Tensor], *sizes: tuple[int, ...]) -> list[Contraction]:
    args = tuple(torch.randn(s, dtype=torch.float32) for s in sizes)
    return [c for n in traced(f, args).work.nodes if (c := contraction(n)) is not None]


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_labels_say_what_is_computed(name):
    f, m, n = SPELLINGS[name]
    (c,) = found(f, m, n)
    a, b = torch.randn(m), torch.randn(n)
    sizes = {x: int(s.args[0][0][1]) for x, s in c.sizes().items()}
    left, right = (side.meta["val"].shape for side in (c.lhs, c.rhs))
    lhs = a.reshape(left).expand([sizes[x] for x in c.left])
    rhs = b.reshape(right).expand([sizes[x] for x in c.right])
    letters = dict(zip(dict.fromkeys(c.left + c.right + c.out), string.ascii_letters, strict=False))
    ones = [x for x in c.out if x not in sizes]
    spelled = ["".join(letters[x] for x in side) for side in (c.left, c.right, c.out)]
    if not ones:
        expected = torch.einsum(f"{spelled[0]},{spelled[1]}->{spelled[2]}", lhs, rhs)
        torch.testing.assert_close(f(a, b), c.alpha * expected)
    else:
        short = "".join(letters[x] for x in c.out if x not in ones)
        expected = torch.einsum(f"{spelled[0]},{spelled[1]}->{short}", lhs, rhs)
        torch.testing.assert_close(f(a, b).flatten(), expected.flatten())


@pytest.mark.parametrize(
    ("f", "m", "n"),
    [
        (lambda a, b: (a * b).sum(-1), (2, 3, 5), (2, 3, 5)),
        (lambda a, b: (a[:, :, None] * b[:, None]).sum(2), (2, 3, 5), (2, 7, 5)),
        (lambda a, b: (a * b).sum(-1), (2, 1, 5), (2, 1, 5)),
        (lambda a, b: (a.unsqueeze(1) * b).sum(-1), (2, 1, 5), (2, 1, 1, 5)),
        (lambda a, b: (a[:, :, None] + b[:, None]).sum(-1), (2, 3, 5), (2, 7, 5)),
        (lambda a, b: (a * a).sum(-1) + b, (2, 3, 5), (2, 3)),
        (lambda a, b: F.linear(a, b, torch.ones(7)), (2, 3, 5), (7, 5)),
        (lambda a, b: torch.einsum("bij,bjk->k", a, b), (2, 3, 5), (2, 5, 7)),
    ],
    ids=[
        "inner_product",
        "one_sided_sum",
        "product_of_rows",
        "one_inserted_axis",
        "sum_of_sums",
        "square",
        "biased_layer",
        "summed_out",
    ],
)
def test_look_alikes_are_none(f, m, n):
    assert found(f, m, n) == []
