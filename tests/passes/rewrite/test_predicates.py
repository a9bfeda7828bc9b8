"""Conditions emitted as graph nodes are the conditions, element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.corpus import CASES, make_inputs, positions, scaled
from tests.rewriting import rounding, traced

NEG = float("-inf")

MASKS = {
    "documents": lambda i, j, ids, valid: ids[:, None, :, None] == ids[:, None, None, :],
    "documents and causal": lambda i, j, ids, valid: (
        (ids[:, None, :, None] == ids[:, None, None, :]) & (j <= i)
    ),
    "other documents": lambda i, j, ids, valid: (ids[:, None, :, None] != ids[:, None, None, :]) | (i == j),
    "document order": lambda i, j, ids, valid: ids[:, None, :, None] >= ids[:, None, None, :] - 1,
    "positions and data": lambda i, j, ids, valid: j <= ids[:, None, :, None] * 2 + 1,
    "both ends valid": lambda i, j, ids, valid: (
        (valid[:, None, :, None] > 0) & (valid[:, None, None] > 0) | (i == j)
    ),
    "lengths": lambda i, j, ids, valid: j < valid.sum(-1)[:, None, None, None] + 1,
    "shifted data": lambda i, j, ids, valid: (valid[:, None, None] > 0) | (j < 2),
    "small integers": lambda i, j, ids, valid: (
        ids.to(torch.uint8)[:, None, :, None] >= ids.to(torch.uint8)[:, None, None]
    ),
    "nothing but data": lambda i, j, ids, valid: (valid > 0)[:, None, None, :] | (ids == 0)[:, None, :, None],
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "free"])
def test_a_computed_mask_is_the_one_of_the_model(name, symbolic):
    def attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        w = scaled(q, k)
        keep = MASKS[name](*positions(w), ids, valid)
        return w.masked_fill(~keep, NEG).softmax(-1) @ v

    args = (*make_inputs(CASES["same_document"]), make_inputs(CASES["causal_and_padding"])[-1])
    t = traced(attention, args, symbolic=symbolic)
    found, missed = t.detect()
    assert len(found) == 1, missed
    t.rewrite(found)
    expected = attention(*args)
    torch.testing.assert_close(t.run(*args), expected, rtol=0, atol=rounding(args, 30), equal_nan=True)
