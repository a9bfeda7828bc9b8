"""Train twelve models of the zoo through the Dynamo door and compare outputs and gradients with the original.

    python benchmarks/dynamo_zoo.py ZOO [--only REGEX]

ZOO is the folder of the corpus (the one that holds ``run.py``).  Each model is optimized without inputs and
called in training mode with dropout 0.  Outputs and gradients of both are compared with the model's own in
fp64; an error may be at most three times the original's own plus one rounding unit of the largest value, and
gradients share one tolerance per model, since some (a key's bias) are zero in theory and hold only noise.

One line per model: sites, rewritten, and the error over the original's own for outputs and gradients.  Exit
code 1 if a model raises, is over its limit, or has no site.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnc

MODELS = (
    "hf/bert",  # encoder
    "hf/distilbert",  # mask by masked_fill
    "hf/qwen2",  # grouped heads, rotary
    "hf/gemma3_text",  # QK-norm, windows and full
    "hf/gpt_oss",  # sinks, windows, experts
    "hf/deepseek_v3",  # MLA
    "hf/t5",  # encoder-decoder, relative bias
    "hf/vit",  # vision
    "hf/unispeech",  # audio
    "timm/vit_relpos_small_patch16_224",
    "diffusers/transformer2d",
    "nn/mha_causal_bool",
)
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def without_dropout(model: nn.Module) -> nn.Module:
    """Return ``model`` in training mode with every dropout probability set to 0."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or (name == "p" and "Drop" in type(module).__name__)
            ):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()) if config is not None else ():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"  # torch's grouped_mm has no fp64, which the oracle needs
    return model.train()


def call_of(inputs: Any) -> Inputs:
    """Return the corpus' inputs as positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def floats(output: Any) -> list[torch.Tensor]:
    """Return the floating tensors of an output, whatever holds them."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def in_fp64(model: nn.Module, call: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of model and inputs in fp64."""
    wide = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, call)
    return copy.deepcopy(model).double(), wide


def step(model: nn.Module, call: Inputs) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Run forward and backward of the sum of squares; return outputs and gradients in fp64."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs = [t for t in floats(model(*call[0], **call[1]))]
    loss = sum(
        (t.double().square().mean() for t in outputs if t.requires_grad), torch.zeros((), dtype=torch.double)
    )
    loss.backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [t.detach().double() for t in outputs], grads


def ratio(
    got: Mapping[Any, torch.Tensor], own: Mapping[Any, torch.Tensor], exact: Mapping[Any, torch.Tensor]
) -> tuple[float, bool]:
    """Return the error over the original's own, and whether it is within three times that plus one unit."""
    if not got.keys() == own.keys() == exact.keys():
        return float("inf"), False
    largest = max((t.nan_to_num().abs().max().item() for t in exact.values() if t.numel()), default=0.0)
    error, allowed = (
        max(
            ((a[n] - exact[n]).nan_to_num().abs().max().item() for n in exact if exact[n].numel()),
            default=0.0,
        )
        for a in (got, own)
    )
    unit = torch.finfo(torch.float32).eps * largest
    same_nan = all(torch.equal(got[n].isnan(), own[n].isnan()) for n in own)
    return error / max(allowed, unit, 1e-300), same_nan and error <= 3 * allowed + unit


def check(load: Any, name: str) -> tuple[str, bool]:
    """Train one model both ways; return its line and whether all holds."""
    torch._dynamo.reset()
    model, inputs, _ = load(name)
    model, call = without_dropout(model), call_of(inputs)
    oracle = step(*in_fp64(model, call))
    own = step(copy.deepcopy(model), call)
    start = time.perf_counter()
    fast = attnc.optimize(model, cost_model=False)
    got = step(fast, call)
    seconds = time.perf_counter() - start
    pairs = [[dict(enumerate(o)) for o, _ in (got, own, oracle)], [g for _, g in (got, own, oracle)]]
    (out, out_ok), (grad, grad_ok) = (ratio(*p) for p in pairs)
    sites = fast.report.counts()
    found = sum(sites.values())
    ok = out_ok and grad_ok and found > 0
    counts = f"{found:>6}{sites['rewritten']:>10}{out:>10.2f}{grad:>10.2f}"
    line = f"{counts}{seconds:>8.1f} s  {'ok' if ok else 'FAILS'}"
    notes = [f"{s.id}: {s.status}: {s.reason}" for s in fast.report.sites if s.status != "rewritten"]
    return "\n".join([line, *(f"    {n}" for n in dict.fromkeys([*notes, *fast.report.warnings]))]), ok


def lines(load: Any, names: list[str]) -> Iterator[tuple[str, bool]]:
    """Check each model; one that raises gives its error as its line."""
    for name in names:
        try:
            line, ok = check(load, name)
        except Exception as error:  # the property checked is that none raises
            line, ok = f"  raised {type(error).__name__}: {' '.join(str(error).split())[:300]}", False
        yield f"{name:<40}{line}", ok


def main() -> int:
    """Print one line per model; return 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", help="the folder that holds the corpus' run.py")
    parser.add_argument("--only", default="", help="check the models whose name matches, of the whole corpus")
    given = parser.parse_args()
    sys.path.insert(0, given.zoo)
    from zoo.__main__ import all_jobs, load, split_of, warm

    warnings.filterwarnings("ignore")
    warm(None)
    every = [j for j in all_jobs() if split_of(j) == "open"]
    names = [n for n in every if re.search(given.only, n)] if given.only else list(MODELS)
    print(
        f"{'model':<40}{'sites':>6}{'rewritten':>10}{'outputs':>10}{'gradients':>10}{'time':>8}", flush=True
    )
    failed = []
    for text, ok in lines(load, names):
        print(text, flush=True)
        failed += [] if ok else [text.split()[0]]
    print(
        f"{len(names) - len(failed)} of {len(names)} models hold"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
