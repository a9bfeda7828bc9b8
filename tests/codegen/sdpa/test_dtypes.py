"""Values in half precision beside scores computed in fp32: one call in fp32, its result rounded again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnc

pytestmark = pytest.mark.filterwarnings("ignore")


class NormalizedInFp32(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (F.normalize(x.float(), dim=-1) for x in (q, k))
        return (q @ k.mT * 10).softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_widened_for_the_call(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(2, 3, n, 8, generator=g).to(dtype) for n in (7, 9, 9))
    model = NormalizedInFp32()
    fast = attnc.optimize(model, args, cost_model=False)
    (site,) = fast.report.sites
    assert (site.status, site.backend) == ("rewritten", "sdpa"), site.reason
    got, want = fast(*args), model(*args)
    assert got.dtype == dtype
    limit = (
        2 * torch.finfo(dtype).eps * args[2].abs().max().item()
    )  # of the model's weights and of its result
    torch.testing.assert_close(got, want, rtol=0, atol=limit)
