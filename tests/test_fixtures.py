"""The fixtures of tests/conftest.py do what the other tests rely on."""

from __future__ import annotations

import os

import pytest
import torch


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(4).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.no_poison
def test_poison_can_be_switched_off():
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_thread():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.fixture
def fixed_golden(request, golden):
    if request.config.getoption("--update-golden"):
        pytest.skip("this run writes goldens, it does not compare")
    return golden


def test_golden_accepts_the_same_text(fixed_golden):
    fixed_golden("fixtures/two_lines.txt", "one\ntwo\n")


def test_golden_shows_a_difference_as_a_diff(fixed_golden):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-two\n\+three.*make golden"):
        fixed_golden("fixtures/two_lines.txt", "one\nthree\n")


def test_golden_fails_on_a_missing_file(fixed_golden):
    with pytest.raises(pytest.fail.Exception, match=r"fixtures/absent\.txt is missing"):
        fixed_golden("fixtures/absent.txt", "text")


def test_golden_refuses_to_leave_its_folder(fixed_golden):
    with pytest.raises(AssertionError, match="outside"):
        fixed_golden("../conftest.py", "text")


def test_minilm_is_the_real_checkpoint_with_spelled_out_attention(minilm, minilm_dir):
    assert (minilm_dir / "model.safetensors").stat().st_size > 80e6
    assert minilm.config._attn_implementation == "eager"
    assert not minilm.training
    assert minilm.config.num_hidden_layers == 6
    with torch.no_grad():
        hidden = minilm(torch.tensor([[101, 7592, 2088, 102]])).last_hidden_state
    assert hidden.shape == (1, 4, 384)
    assert hidden.isfinite().all()
