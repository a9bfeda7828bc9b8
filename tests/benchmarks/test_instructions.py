"""FlexAttention's kernel, written for a GPU that is not here, and the results beside ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.hints import DeviceProperties

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="what stands in for a GPU is private to torch 2.13")
def test_flex_attention_is_written_with_the_config_of_the_gpu():
    from flex_template import Call, render

    create = DeviceProperties.create
    call = Call(1, 2, 256, 128, torch.bfloat16, lambda make: (None, lambda b, h, m, n: m >= n))
    template = render(call, "sm_90")
    assert template.tiles == {"block_m": 128, "block_n": 64, "warps": 8, "stages": 3}
    assert "OUTPUT_LOGSUMEXP : tl.constexpr = True" in template.source
    mask = r"^ +(tmp\d+) = tmp\d+ >= tmp\d+\n +mask_mod_output = \1$"
    assert re.search(mask, template.source, re.MULTILINE)
    assert template.meta["signature"]["arg_Q"] == "*bf16"
    assert DeviceProperties.create == create
