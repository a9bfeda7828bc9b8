"""Constant tensors are fitted exactly or not at all, and the fit extends to the index it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnc import expr as E
from attnc.passes.detect.masks.fit import fit
from tests.test_masks import evaluate

i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]


def swin(rows: int, columns: int, side: int, shift: int) -> Tensor:
    """Return the mask of shifted windows as Swin builds it, ``[windows, side**2, side**2]``."""
    height, width = rows * side, columns * side
    image = torch.zeros(1, height, width, 1)
    count = 0
    cuts = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for y in cuts:
        for x in cuts:
            image[:, y, x, :] = count
            count += 1
    windows = image.view(1, rows, side, columns, side, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side)
    difference = windows[:, None] - windows[:, :, None]
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


FITTED = {
    "constant": torch.full((3, 4), 2.5),
    "positions": torch.arange(3, 40, 3),
    "float positions": torch.arange(9).float() - 4,
    "chunk numbers": torch.arange(12) // 4,
    "remainders": torch.arange(12) % 5,
    "digits": (torch.arange(24) // 2) % 3 * 7 + 1,
    "steps": torch.tensor([0, 0, 0, 5, 5, 1, 1, 1]),
    "few floats": torch.tensor([0.0, 0.0, -1e4, -1e4, -1e4]),
    "relative positions": i - j + 11,
    "grid": 12 * i + 2 * j,
    "lower triangle": torch.ones(12, 12).tril()[None, None],
    "lower triangle, integers": torch.ones(12, 12, dtype=torch.uint8).tril(),
    "lower triangle with an offset": torch.ones(12, 12, dtype=torch.bool).tril(2),
    "causal, added": torch.full((12, 12), float("-inf")).triu(1),
    "window": (i - j < 3) & (j <= i),
    "chunks": i // 4 == j // 4,
    "causal chunks": (i // 4 == j // 4) & (j <= i),
    "blocks": j // 3 <= i // 3,
    "strides": (i - j) % 4 == 0,
    "not the diagonal": i != j,
    "pieces of different lengths": torch.bucketize(i, torch.tensor([3, 8]))
    == torch.bucketize(j, torch.tensor([3, 8])),
    "shifted windows": swin(3, 2, 4, 2),
    "shifted windows, wide": swin(2, 4, 3, 1),
}


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_has_every_element(name):
    t = FITTED[name]
    found = fit(t)
    assert found is not None
    index = [E.index(f"i{d}", E.integer(n)) for d, n in enumerate(t.shape)]
    value = found(index)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in t.shape)).view(-1, t.dim()).tolist():
        env = {f"i{d}": p for d, p in enumerate(place)}
        assert number(value, env) == float(t[tuple(place)])


def number(e: E.Expr, env: dict[str, int]) -> float:
    if e.op == "const":
        return e.args[0]
    if e.op == "where":
        return number(e.args[1] if evaluate(e.args[0], env, {}) else e.args[2], env)
    return float(evaluate(e, env, {}))


NEAR = {
    "one pair off": torch.ones(12, 12)
    .tril()
    .index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(1.0)),
    "noise": torch.randn(12, generator=torch.Generator().manual_seed(0)).cumsum(0),
    "random pairs": torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.5,
    "not a number": torch.full((3,), float("nan")),
    "slopes": 2.0 ** -torch.arange(1.0, 40.0),
    "shifted windows, one pair off": swin(3, 2, 4, 2).index_put(
        (torch.tensor(1), torch.tensor(2), torch.tensor(3)), torch.tensor(-100.0)
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_differs_anywhere_has_no_fit(name):
    assert fit(NEAR[name]) is None


def test_tensors_without_values_have_no_fit():
    assert fit(torch.empty(4, 4, device="meta")) is None
    assert fit(torch.empty(0, 4)) is None
