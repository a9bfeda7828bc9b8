"""What becomes of each attention variant that one pass over the keys can serve: kernels, or a miss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import attnc
from attnc.codegen.triton.emit import spec_of
from tests.codegen.triton.owner import assert_passes
from tests.codegen.triton.variants import VARIANTS, build

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Outcome:
    """Words that the specs of the emitted kernels hold, a row per kernel, and the codes of misses."""

    kernels: tuple[tuple[str, ...], ...] = ()
    missed: tuple[str, ...] = ()


def one(*words: str, missed: tuple[str, ...] = ()) -> Outcome:
    return Outcome((words,), missed)


PLAIN = ("scale(0.25)", "mask=none softmax")
OUTCOMES = {
    "multi_head": one("group=1", *PLAIN),
    "multi_query": one("group=4", *PLAIN),
    "grouped_query": one("group=2", *PLAIN),
    "cross": one(*PLAIN),
    "latent_expanded": one("bhqd[b,h,sq,24]", "bhke[b,hkv,sk,16]", "group=1"),
    "latent_absorbed": one("bhqd[b,h,sq,40]", "bhke[b,hkv,sk,32]", "group=4"),
    "convolutional": one("mask=causal"),
    "qk_norm_and_rotary": one(*PLAIN),
    "packed_documents": one("mask=document(ids1,ids0)", "ids0=bk[b,sk]", "ids1=bq[b,sq]"),
    "modality_mutual": one("mask=(causal | (range(k,0,9) & range(q,0,6)"),
    "pair_wise": one(*PLAIN),
    "one_query": one(*PLAIN),
    "bottleneck": one(*PLAIN),
    "sink_logits": one("softmax(sink=sink)"),
    "off_by_one": one("softmax(sink=0.0)"),
    "cog": one("mask=causal fill(replace,-inf) signed-softmax"),
    "sigmoid": one("mask=none elementwise(sigmoid(s))"),
    "taylor": one("normalized(where((s==-inf),0.0,((s+1.0)+(square(s)/2.0))))"),
    "affine_scaled": one(*PLAIN),  # beside it, a sum of all values
    "differential": one("bhqd[b,h,sq,8]", "bhke[b,hkv,sk,16]"),  # run twice
    "softcap": one("softcap(50.0) mask=causal"),
    "scalable": one("gain(gain)", "gain=bhqk[1,h,sq,1]"),
    "alibi": one("bias(-bias:alibi) mask=causal"),
    "relative_table": one("group=1 bias(bias:relative) mask=none"),
    "window_table": one("bias(bias:table)"),
    "transformer_xl": one("bias(bias:relative-shift)", "scale(0.25) mask=causal"),
    "disentangled": one("bias(bias0:disentangled) bias(bias1:disentangled)"),
    "phase": one("gain(gain) mask=causal", "gain=bhqk[b,h,sq,sk]"),  # the second contraction is a tensor
    "relational": Outcome((), ("linear-attention", "several-value-contractions")),
    "relational_activated": one("elementwise(relu(s))", missed=("several-value-contractions",)),
    "positional": one("bhke[b,hkv,sk,32]", *PLAIN),  # a batch without queries of its own is features
    "static_embeddings": one(*PLAIN),
    "key_only": Outcome((), ("no-scores",)),
    "optimized": one(*PLAIN),
    "efficient": one(*PLAIN),
    "super_attention": one(*PLAIN),
    "tangent": one(*PLAIN, missed=("linear-attention",)),  # the primal
}
QUICK = ("off_by_one", "cog", "taylor", "affine_scaled")
CASES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VARIANTS]


def test_every_variant_has_its_row() -> None:
    assert list(OUTCOMES) == list(VARIANTS)


@pytest.mark.parametrize("name", CASES)
def test_a_variant_becomes_kernels_that_pass_their_own_tests(name: str, tmp_path: Path) -> None:
    model, args = build(name)
    with torch.no_grad():
        want = model(*args)
        fast = attnc.optimize(model, args, cost_model=False)
        got = fast(*args)
    # sums of up to 64 terms of size 4, one after the other in three layers
    torch.testing.assert_close(got, want, rtol=0, atol=3 * 64 * 4 * torch.finfo(torch.float32).eps)
    sites, wanted = fast.report.sites, OUTCOMES[name]
    assert tuple(sorted(s.code for s in sites if s.status == "missed")) == wanted.missed
    assert all(s.status != "kept" for s in sites)
    if not wanted.kernels:
        return
    kernels = attnc.emit(fast, tmp_path / "kernels")
    specs = [str(spec_of(k.source)) for k in kernels]
    assert len(specs) == len(wanted.kernels), specs
    for spec, words in zip(specs, wanted.kernels, strict=True):
        assert [w for w in words if w not in spec] == [], spec
    for file in sorted((tmp_path / "kernels").iterdir()):
        assert_passes(file)
