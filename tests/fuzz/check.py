"""Run one program through detection and rewriting, and compare it with itself in fp64."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnc.ir import AttentionSpec
from attnc.masks import Grid, Mask
from attnc.passes.detect import Found
from attnc.passes.rewrite.apply import Rewriter
from tests.fuzz.axes import Spelling
from tests.fuzz.near_misses import NEAR_MISSES
from tests.fuzz.program import Program, rendered
from tests.fuzz.text import Sizes
from tests.rewriting import Forward, Traced, exported

EPS = torch.finfo(torch.float64).eps
Run = tuple[Sizes, int, str]
"""Sizes, seed and manner of a draw of inputs."""
Verdict = Literal["same", "wrong", "raised", "untouched", "untraced", "unusable"]


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    ``verdict`` is same (rewritten, equal), wrong, raised (by the compiler), untouched (nothing to rewrite),
    untraced (what torch traced does not run, with nothing rewritten), or unusable (the program does not run).
    ``found`` counts sites, ``misses`` are codes; ``lifted`` says that masks came out in closed form, None
    where the program has none to give.
    """

    spelling: Spelling
    verdict: Verdict
    found: int = 0
    misses: tuple[str, ...] = ()
    lifted: bool | None = None
    why: str = ""

    @property
    def failed(self) -> bool:
        """Say whether the compiler changed the program's meaning or broke."""
        return self.verdict in ("wrong", "raised", "unusable")

    @property
    def recognized(self) -> bool:
        """Say whether all of it was found."""
        return self.found > 0 and not self.misses


def check(x: Spelling) -> Outcome:
    """Find and rewrite what is in the program, run both, and compare."""
    try:
        program = rendered(x)
        draws = [program.draw(*run) for run in runs_of(program)]
        t = trace(program, draws[0])
        draws = [d for d in draws if d is draws[0] or holds_for(program, t, d)]
        expected = [_copied(program.function(*_copied(d))) for d in draws]
    except Exception:
        return Outcome(x, "unusable", why=traceback.format_exc(limit=-4))
    try:
        return _checked(program, t, draws, expected)
    except Exception:
        why = traceback.format_exc(limit=-6)
        return Outcome(x, "raised" if _runs(trace(program, draws[0]), draws) else "untraced", why=why)


def _runs(t: Traced, draws: list[tuple[Tensor, ...]]) -> bool:
    """Say whether a graph runs as traced (torch may take a stack of strided tensors for contiguous)."""
    try:
        for args in draws:
            t.run(*_copied(args))
    except Exception:
        return False
    return True


def runs_of(program: Program) -> list[Run]:
    """Return the draws of inputs that a program is compared on, the first being the one it is traced with.

    An exponential without maximum is not asked for more than it can do.
    """
    x = program.spelling
    bare = x.norm in ("exp_sum", "late", "plus_one") or NEAR_MISSES[x.near_miss].bare
    hows = ["usual", "hidden"] if bare else ["usual", "hidden", "wide"]
    runs: list[Run] = [(program.sizes, x.seed + i, how) for i, how in enumerate(hows)]
    if "symbolic" in x.trace:
        runs += [(z, x.seed, how) for z, how in zip(program.other_sizes(), hows, strict=False)]
    return runs


aten = torch.ops.aten
VIEWS = {  # what a functional copy of an exported graph spells out
    op: op.decompose
    for op in (
        aten.flatten.using_ints, aten.unflatten.int, aten.mT.default, aten.movedim.int, aten.movedim.intlist,
        aten.chunk.default, aten.narrow.default, aten.reshape.default, aten.contiguous.default,
        aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten.expand_as.default,
        aten.broadcast_tensors.default,
    )
}  # fmt: skip


def trace(program: Program, args: tuple[Tensor, ...]) -> Traced:
    """Return the program's graph through the door that it names."""
    kind = program.spelling.trace
    if kind.startswith("exported"):
        return exported(Forward(program.function), args, dynamic="symbolic" in kind)
    mode = "symbolic" if kind == "symbolic" else "fake"
    door = make_fx(program.function, VIEWS, mode, pre_dispatch=True, _allow_non_fake_inputs=True)
    with torch.no_grad():
        module = door(*args)
    links = {n.name: n.name for n in module.graph.nodes}
    stored = {n.name: getattr(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    return Traced(module.graph, module.graph, links, stored, module)


def holds_for(program: Program, t: Traced, args: tuple[Tensor, ...]) -> bool:
    """Say whether a graph was traced for inputs of these sizes."""
    if "symbolic" not in program.spelling.trace:
        return True
    holders = [n for n in t.graph.nodes if n.op == "placeholder"][-len(program.inputs) :]
    values = [n.meta["val"] for n in holders]
    env = next(v.fake_mode.shape_env for v in values if hasattr(v, "fake_mode"))
    return bool(env.evaluate_guards_for_args(values, args, ignore_static=False))


def _copied(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(map(_copied, x))
    return x.clone()


def _checked(program: Program, t: Traced, draws: list[tuple[Tensor, ...]], expected: list[Any]) -> Outcome:
    x = program.spelling
    found, missed = t.detect()
    codes = tuple(sorted({m.code for m, _ in missed}))
    lifted = mask_is_lifted(program, found)
    outcome = Outcome(x, "untouched", len(found), codes, lifted)
    editor = Rewriter(t.graph, t.work, t.links)
    live = [
        f for f in found if not f.match.escapes and not f.match.spec.dropout and editor.blocked(f) is None
    ]
    if not live:
        return outcome
    for f in live:
        editor.apply(f)
    t.graph.lint()
    t.graph.owning_module.recompile()
    for args, wanted in zip(draws, expected, strict=True):
        why = difference(t.run(*_copied(args)), wanted, allowance(x, args))
        if why:
            specs = "".join(f"\n  {f.match.spec}" for f in live)
            return replace(outcome, verdict="wrong", why=f"{why}; found:{specs}")
    return replace(outcome, verdict="same")


def allowance(x: Spelling, args: tuple[Tensor, ...]) -> float:
    """Bound what reordering a sum may change in fp64.

    A score sums up to 16 products and a few steps, off by a rounding of its size each; what is added to hide
    it, finite and not so large that it swallows the score, counts as its size. The softmax makes that a
    relative error of the weights, twice; a value is a sum over keys.
    """
    finite = [a[a.isfinite()].abs() for a in args if a.is_floating_point()]
    largest = max([float(a.max()) for a in finite if a.numel()], default=1.0)
    size = max(largest, 1.0)
    score = 16 * size**2 * (size if x.scale == "learned" or x.scale.startswith("per_") else 1.0)
    if x.k_layout == "projected" or x.q_layout == "projected":
        score *= 9 * size**2
    sizes = {"big": 2e9, "small": 2e4}
    added = max(sizes.get(x.fill, 0.0), sizes.get(x.more_fill, 0.0)) if x.mask != "none" else 0.0
    return 64 * EPS * (score + added) * 8 * size**3


def difference(found: Any, wanted: Any, atol: float) -> str:
    """Say how two results differ, in nothing if they are equal."""
    if isinstance(wanted, tuple):
        return next((d for a, b in zip(found, wanted, strict=True) if (d := difference(a, b, atol))), "")
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {tuple(found.shape)} in place of {wanted.dtype} {tuple(wanted.shape)}"
    try:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=atol, equal_nan=True)
    except AssertionError as e:
        return " ".join(str(e).split())
    return ""


# ---------------------------------------------------------------- masks


def mask_is_lifted(program: Program, found: list[Found]) -> bool | None:
    """Say whether the masks found are the closed form that the program's text means.

    With rows of validity all true and documents all one, a lifted mask keeps what the positions keep, and no
    part of it is a tensor of queries and keys. None where the program gives no closed form, or no site.
    """
    x = program.spelling
    if not found or "dense" in (x.mask, x.more) or x.near_miss != "none":
        return None
    s, t = program.sizes["s"], program.sizes["t"]
    truth = program.truth(s, t)
    return all(_is(f.match.spec, truth, program, len(found)) for f in found)


def _is(spec: AttentionSpec, truth: Tensor, program: Program, sites: int) -> bool:
    x, z = program.spelling, program.sizes
    if any(type(p).__name__ == "Dense" for p in parts(spec.mask)):
        return False
    if x.bias == "none" and any(type(step).__name__ == "Bias" for step in spec.scores):
        return False
    if x.heads == "chunks" and sites > 1:
        return True  # each chunk sees its own part
    sizes = {"q": z["s"], "k": z["t"]}  # of batch and heads one is enough: what is neutral is so for all
    captured = {
        o.name: (torch.ones if o.dtype == torch.bool else torch.zeros)(
            [sizes.get(a, 1) for a in o.axes], dtype=o.dtype
        )
        for o in spec.captured
    }
    keep = spec.mask.keep(Grid(z["s"], z["t"], torch.device("cpu"), captured))
    return torch.equal(keep.expand(1, 1, -1, -1).expand_as(truth), truth)


def parts(mask: Mask) -> list[Mask]:
    """Return a mask and all its parts."""
    inner = [*getattr(mask, "parts", ()), *([mask.part] if hasattr(mask, "part") else [])]
    return [mask, *(p for m in inner for p in parts(m))]
