"""Operands in half precision whose scores are computed in fp32 are read where they are narrow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.rewriting import only_spec, traced

HALF, BRAIN, WIDE = torch.float16, torch.bfloat16, torch.float32


def randn(*shape: int, seed: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ARGS = (randn(2, 3, 7, 8, seed=1), randn(2, 3, 9, 8, seed=2), randn(2, 3, 9, 5, seed=3))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1).to(v.dtype) @ v


def dtypes(f, args=ARGS) -> tuple[torch.dtype, ...]:
    spec = only_spec(traced(f, args))
    return spec.q.dtype, spec.k.dtype, spec.v.dtype


@pytest.mark.parametrize(
    "f",
    [
        lambda q, k, v: attend(q.float(), k.float(), v),
        lambda q, k, v: attend(q.to(WIDE) * 0.5, k.type(WIDE), v),
        lambda q, k, v: attend(q.float(), k.transpose(1, 2).float().transpose(1, 2), v),
        lambda q, k, v: torch.einsum(
            "bhqk,bhke->bhqe", torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()).softmax(-1).half(), v
        ),
        lambda q, k, v: attend(q, k, v),
    ],
)
def test_operands_are_read_before_they_are_widened(f):
    assert dtypes(f) == (HALF, HALF, HALF)
    t = traced(f, ARGS)
    found, _ = t.detect()
    t.rewrite(found)
    got, want = t.run(*ARGS), f(*ARGS)
    assert got.dtype == HALF
    # weights and result are each rounded to half precision, by both
    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(HALF).eps * ARGS[2].abs().max().item())


def test_bfloat16_is_a_half_too():
    args = tuple(x.to(BRAIN) for x in ARGS)
    assert dtypes(lambda q, k, v: attend(q.float(), k.float(), v), args) == (BRAIN,) * 3


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        # what is computed in fp32 has no narrow place
        (lambda q, k, v: attend(F.normalize(q.float(), dim=-1), k.float(), v), (WIDE, WIDE, HALF)),
        (lambda q, k, v: attend(q.float(), k.float() + 0.1, v), (WIDE, WIDE, HALF)),
        # the result is fp32: half operands would round it
        (lambda q, k, v: attend(q.float(), k.float(), v.float()), (WIDE, WIDE, WIDE)),
        # scores in fp64, which a spec of half operands does not have
        (lambda q, k, v: attend(q.double(), k.double(), v), (torch.float64, torch.float64, HALF)),
        # another half precision than that of the values
        (
            lambda q, k, v: attend(q.to(BRAIN).float(), k.to(BRAIN).float(), v),
            (WIDE, WIDE, HALF),
        ),
    ],
)
def test_other_operands_are_read_as_they_are(f, wanted):
    assert dtypes(f) == wanted
