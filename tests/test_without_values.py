"""Detection reads shapes and never weights: models without values give the same specs as real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnc
from tests.test_specs_of_models import bert, gpt2, llama, mistral

Build = Callable[[], nn.Module]


def inputs() -> dict[str, Any]:
    return {
        "input_ids": torch.ones(2, 11, dtype=torch.long),
        "attention_mask": torch.ones(2, 11, dtype=torch.long),
    }


def specs(model: nn.Module, kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    return [(s.status, s.spec) for s in attnc.inspect(model.eval(), (), kwargs).sites]


@pytest.mark.parametrize("build", [bert, llama, mistral, gpt2])
def test_a_model_on_the_meta_device_gives_the_same_specs(build: Build):
    with torch.device("meta"):
        model, kwargs = build(), inputs()
    assert all(p.is_meta for p in model.parameters())
    found = specs(model, kwargs)
    assert len(found) == 2
    assert found == specs(build(), inputs())


def test_a_model_of_fake_tensors_gives_the_same_specs():
    with FakeTensorMode():
        model, kwargs = bert(), inputs()
    found = specs(model, kwargs)
    assert len(found) == 2
    assert found == specs(bert(), inputs())


def test_a_forward_that_fails_without_values_is_still_told_when_it_fails_with_them():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x

    with pytest.raises(attnc.CaptureError, match="failed on the example inputs"):
        attnc.inspect(Broken(), (torch.ones(2, 3),))
    with pytest.raises(attnc.CaptureError, match="could not be captured"):
        attnc.inspect(Broken(), (torch.ones(2, 3, device="meta"),))
