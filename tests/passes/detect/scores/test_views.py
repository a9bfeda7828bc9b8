"""Views, casts and parts of a concatenation change no score."""

from __future__ import annotations

import pytest
import torch

from tests.corpus import CASES, make_inputs
from tests.rewriting import only_spec, traced

ARGS = make_inputs(CASES["no_scale"])


def trace(f, args=ARGS):
    return traced(lambda q, k, v: f(q @ k.mT) @ v, args)


@pytest.mark.parametrize(
    "f",
    [
        lambda w: w.view(6, *w.shape[2:]).softmax(-1).view(w.shape),
        lambda w: w.contiguous().softmax(-1),
        lambda w: w[None].softmax(-1)[0:1].squeeze(0),
        lambda w: w.permute(2, 0, 3, 1).softmax(2).permute(1, 3, 0, 2),
        lambda w: torch.nn.functional.dropout(w, 0.3, training=False).softmax(-1),
        lambda w: torch.cat([w, w.new_zeros(*w.shape[:-1], 1)], -1)[..., : w.shape[-1]].softmax(-1),
    ],
)
def test_scores_seen_through_views(f):
    spec = only_spec(trace(f))
    assert spec.scores == ()
    assert str(spec.norm) == "softmax"


def test_casts_are_followed():
    args = tuple(x.bfloat16() for x in ARGS)
    assert only_spec(trace(lambda w: w.float().softmax(-1).to(w.dtype), args)).scores == ()


@pytest.mark.parametrize(
    ("f", "code"),
    [
        (lambda w: torch.cat([w, w], -1).softmax(-1)[..., : w.shape[-1]], "columns-dropped"),
        (lambda w: w.to(torch.int64).to(w.dtype).softmax(-1), "score-step-unknown"),
        (lambda w: w.view(torch.int64).view(w.dtype).softmax(-1), "score-step-unknown"),
        (lambda w: w.flip(-1).softmax(-1), "score-step-unknown"),
    ],
)
def test_what_changes_scores_is_refused(f, code):
    found, missed = trace(f).detect()
    assert not found
    assert missed[0][0].code == code
