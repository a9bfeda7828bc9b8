from __future__ import annotations

import dataclasses

import pytest
import torch

from attnc.codegen.flex import source
from attnc.codegen.flex.source import is_soft
from attnc.errors import UnsupportedError
from attnc.ir import AttentionSpec, Bias, Fill, Gain, Operand, Scale, Softcap, Softmax
from attnc.masks import CAUSAL, Band, Dense, Full, Mask, Not, Or, Padding, Range, both

F32 = torch.float32


def make_spec(*captured: Operand, **rest) -> AttentionSpec:
    q = Operand("q", "bhqd", ("b", 4, "s", 64), F32)
    k, v = (Operand(n, a, ("b", 2, "t", 64), F32) for n, a in (("k", "bhkd"), ("v", "bhke")))
    return AttentionSpec(q, k, v, 2, captured=captured, **rest)


def modifiers(text: str) -> str:
    """Return the part between the imports and ``attend``."""
    return text[text.index("def modifiers") : text.index("def attend")].rstrip() + "\n"


KEEP = Operand("keep", "bk", ("b", "t"), torch.bool)
REL = Operand("rel", "bhqk", (1, 4, "s", "t"), torch.bfloat16)
HEADS = Operand("b", "bhqk", (1, 4, 1, 1), F32)
SINK = Operand("sink", "h", (4,), F32)

WINDOW = '''"""FlexAttention for: {spec}"""

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def modifiers(lengths):
    """Return the score edit and the mask."""

    def score_mod(score, b, h, q, k):
        score = 50.0 * torch.tanh(score / 50.0)
        return score

    def mask_mod(b, h, q, k):
        keep = (q - k <= 255) & (k <= q)
        return keep

    return score_mod, mask_mod


def attend(q, k, v, captured, lengths, blocks):
    """Return the output [B, H, Sq, Dv]."""
    score_mod, mask_mod = modifiers(*captured, lengths)
    block_mask = BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=128,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    out = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=0.125,
        enable_gqa=True,
    )
    return out
'''

EVERYTHING = '''def modifiers(rel, b_, keep_, sink, lengths):
    """Return the score edit and the mask, which read:

    rel [1, h, q, k]
    b_ [1, h, 1, 1]
    keep_ [b, k]
    sink [h]
    """

    def score_mod(score, b, h, q, k):
        score = score - rel[0, h, q, k].to(torch.float32)
        score = score * b_[0, h, 0, 0]
        score = score * 0.5
        score = torch.where(k == lengths[1], sink[h], score)
        return score

    def mask_mod(b, h, q, k):
        p = q + lengths[1] - lengths[0]
        keep = ((p - k <= 31) & (k - p <= 4)) | ((k >= 0) & (k < 4))
        keep = keep & keep_[b, k]
        keep = keep & (~(q - k <= 7))
        keep = keep | (k == lengths[1])
        return keep

    return score_mod, mask_mod
'''

SOFT = '''def modifiers(keep_, lengths):
    """Return the score edit and the mask, which read:

    keep_ [1, k]
    """

    def score_mod(score, b, h, q, k):
        keep = k <= q
        keep = keep & keep_[0, k]
        score = torch.where(keep, score, score + -8.0)
        return score

    def mask_mod(b, h, q, k):
        keep = k >= 0
        return keep

    return score_mod, mask_mod
'''


def test_a_softcapped_window_reads_like_this():
    spec = make_spec(scores=(Scale(0.125), Softcap(50.0)), mask=Band(255, 0))
    assert source(spec) == WINDOW.format(spec=spec)


def test_every_kind_of_part_reads_like_this():
    mask = both(Or((Band(31, 4, "end"), Range("k", 0, 4))), Padding("keep"), Not(Band(7, None)))
    scores = (Bias("rel", -1), Gain("b"), Scale(0.5))
    spec = make_spec(REL, HEADS, KEEP, SINK, scores=scores, mask=mask, norm=Softmax("sink"))
    assert modifiers(source(spec)) == EVERYTHING


def test_a_fill_that_leaves_weight_is_part_of_the_score():
    spec = make_spec(KEEP, mask=both(CAUSAL, Padding("keep")), fill=Fill(-8.0, "add"))
    assert modifiers(source(spec, [(True, False)])) == SOFT


@pytest.mark.parametrize(
    ("scores", "mask", "fill", "soft"),
    [
        ((), Full(), -1.0, False),
        ((), CAUSAL, -float("inf"), False),
        ((), CAUSAL, -1e4, False),
        ((), CAUSAL, -9999.0, True),
        ((), CAUSAL, 0.0, True),
        ((Bias("rel"),), CAUSAL, -3e38, True),
        ((Bias("rel"),), CAUSAL, -float("inf"), False),
        ((Bias("rel"),), Full(), -3e38, False),
    ],
)
def test_soft_fills(scores, mask, fill, soft):
    assert is_soft(make_spec(REL, scores=scores, mask=mask, fill=Fill(fill))) is soft


def test_a_sink_can_come_from_the_log_sum_exp():
    text = source(make_spec(SINK, norm=Softmax("sink")), sink="lse")
    assert "return_aux=AuxRequest(lse=True)" in text
    assert "return out, aux.lse" in text
    assert "sink[h]" not in text


def test_names_shadow_nothing():
    names = ("q", "q_", "lambda", "lengths", "p", "torch")
    captured = tuple(Operand(n, "bhqk", (1, 4, "s", "t"), torch.bool) for n in names)
    text = source(make_spec(*captured, mask=both(*(Dense(n) for n in names))))
    space: dict = {}
    exec(text, space)
    tensors = [torch.rand(1, 4, 5, 6) > 0.2 for _ in names]
    _, mask_mod = space["modifiers"](*tensors, torch.tensor([5, 6]))
    at = torch.meshgrid(torch.arange(1), torch.arange(4), torch.arange(5), torch.arange(6), indexing="ij")
    expected = torch.stack(tensors).all(0)
    assert torch.equal(mask_mod(*at), expected)
    assert not bool(expected.all())


def test_parts_without_a_text_are_named():
    class Odd(Mask):
        def __str__(self) -> str:
            return "odd"

    with pytest.raises(UnsupportedError, match="found odd"):
        source(make_spec(mask=Odd()))
    with pytest.raises(UnsupportedError, match="expected scale, softcap, bias, gain or pointwise, found 7"):
        source(dataclasses.replace(make_spec(), scores=(7,)))
