"""Run one kernel with several tiles on the same tensors: check each against the first, then time it.

What two correct runs may differ by is derived from the tensors.  Plain torch in fp32, with weights rounded
to the dtype, is off from fp64 by some share of the largest output; a kernel may be off by twice that share
plus two rounding units (the self-test of emitted files), so two of them differ by at most twice as much.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from attnc.codegen.triton.configs import Config
from attnc.codegen.triton.emit import emit
from attnc.codegen.triton.inputs import name_inputs
from attnc.codegen.triton.picks import Place
from attnc.codegen.triton.store import load
from attnc.errors import UnsupportedError
from attnc.ir import AttentionSpec, Operand

Clock = Callable[[Callable[[], object]], float]
"""Given a call, its time in milliseconds."""

SLICE = 1024
"""Queries and keys from which it is learnt how much rounding moves the outputs."""
USUAL = 1e6
"""A log-sum-exp beyond this is that of a row of fills, whose scores fp32 cannot tell apart."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes of tensors to draw: batch, key/value heads, and queries and keys in tokens."""

    batch: int
    kv_heads: int
    sq: int
    sk: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: milliseconds, or None and why it is not usable."""

    config: Config
    ms: float | None
    why: str = ""


class Contest:
    """Candidates of one canonical spec and kind, on the same tensors; files go to ``folder``."""

    def __init__(
        self,
        spec: AttentionSpec,
        kind: str,
        place: Place,
        tensors: tuple[Tensor, ...],
        clock: Clock,
        folder: Path,
    ) -> None:
        self.spec, self.kind, self.place = spec, kind, place
        self.tensors, self.clock, self.folder = tensors, clock, folder
        self._want: tuple[Tensor, ...] = ()
        self._limits: tuple[float, ...] = ()

    def run(self, config: Config) -> Trial:
        """Check and time a candidate; the first one that runs is what later ones are compared with."""
        with self._loaded(config) as module:
            self._check_entry(module)
            try:
                found = module.attend(*self.tensors)
            except _errors() as error:
                why = _unusable(error)
                if why is None:
                    raise
                return Trial(config, None, why)
            if not self._want:
                self._want, self._limits = found, limits(module, self.spec, self.tensors, found)
            off = disagreement(found, self._want, self._limits)
            if off is not None:
                return Trial(config, None, off)
            return Trial(config, self.clock(lambda: module.attend(*self.tensors)))

    def _check_entry(self, module: ModuleType) -> None:
        entry = getattr(module, "attend", None)
        try:
            inspect.signature(cast(Callable[..., object], entry)).bind(*self.tensors)
        except TypeError as error:
            raise UnsupportedError(
                f"tune: expected a kind of kernel that runs on the tensors of a spec alone, found {self.kind}"
            ) from error

    @contextmanager
    def _loaded(self, config: Config) -> Iterator[ModuleType]:
        """Give the module of a kernel with these tiles, and forget it afterwards."""
        kernel = emit(self.spec, name="tuned", kind=self.kind, configs={self.place.arch: config})
        module = load(kernel, self.folder)
        try:
            yield module
        finally:
            sys.modules.pop(module.__name__, None)


def _errors() -> tuple[type[BaseException], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (CompilationError, OutOfResources, PTXASError, RuntimeError)


def _unusable(error: BaseException) -> str | None:
    """Return why tiles cannot be used, None if the error is of another sort.

    A pass of the compiler that fails is a bare RuntimeError; so are errors of the GPU, which are no one's
    tiles to blame.
    """
    if type(error) is RuntimeError and "PassManager" not in str(error):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no words'}"


def limits(
    module: ModuleType, spec: AttentionSpec, tensors: Sequence[Tensor], found: Sequence[Tensor]
) -> tuple[float, ...]:
    """Return how far two correct runs may be apart, for each of the outputs ``found``."""
    part = _part(spec, tensors)
    exact = module.reference(*part)
    plain = module.reference(*part, work=torch.float32)
    usual = exact[1].abs() < USUAL if exact[1].dim() == 3 else None
    out = []
    for want, other, whole in zip(exact, plain, found, strict=True):
        off, most = _largest(other - want, usual), _largest(want, usual)
        share = off / most if most else 0.0
        out.append(4 * (share + torch.finfo(whole.dtype).eps) * _largest(whole, None))
    return tuple(out)


def _largest(x: Tensor, rows: Tensor | None) -> float:
    """Return the largest magnitude among finite entries, of some rows ``[B, H, Sq]`` if they are given."""
    if rows is not None and rows.shape == x.shape[:3]:
        x = x[rows]
    x = x[x.isfinite() & (x.abs() < USUAL)]
    return float(x.abs().max()) if x.numel() else 0.0


def _part(spec: AttentionSpec, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the start of each tensor: one batch entry, the heads of one key/value head, some tokens."""
    lengths = {"b": 1, "q": SLICE, "k": SLICE}
    out = []
    for operand, x in zip((spec.q, spec.k, spec.v, *spec.captured), tensors, strict=not spec.dropout):
        heads = 1 if operand in (spec.k, spec.v) else spec.group_size
        for at, axis in enumerate(operand.axes[-x.dim() :]):
            size = heads if axis == "h" else lengths.get(axis, x.shape[at])
            x = x.narrow(at, 0, min(size, x.shape[at]))
        out.append(x)
    return [*out, *tensors[len(out) :]]


def disagreement(found: Sequence[Tensor], want: Sequence[Tensor], allowed: Sequence[float]) -> str | None:
    """Return by how much outputs are off where that is more than allowed, or None."""
    for at, (x, y, limit) in enumerate(zip(found, want, allowed, strict=True)):
        same = (x == y) | (x.isnan() & y.isnan())  # infinities among them
        off = torch.where(same, 0.0, (x.double() - y.double()).abs())
        if not bool((off <= limit).all()):
            return f"output {at} is off by {float(off.max()):.1e} where {limit:.1e} is allowed"
    return None


def draw(spec: AttentionSpec, lengths: Lengths, device: torch.device | str) -> tuple[Tensor, ...]:
    """Return tensors for a call of a canonical spec; masks hide nothing, so that all the work is there.

    The seed comes last, if the spec has dropout.
    """
    heads = lengths.kv_heads * spec.group_size
    sizes = {"b": lengths.batch, "h": heads, "hkv": lengths.kv_heads, "sq": lengths.sq, "sk": lengths.sk}
    roles = {x.operand: x.role for x in name_inputs(spec)}
    g = torch.Generator(device).manual_seed(0)
    out = []
    for operand in (spec.q, spec.k, spec.v, *spec.captured):
        shape = [d if isinstance(d, int) else sizes.get(d, 1) for d in operand.shape]
        out.append(_sample(operand, shape, roles.get(operand, ""), g))
    if spec.dropout:
        out.append(torch.full((1,), 1, device=device))
    return tuple(out)


def _sample(operand: Operand, shape: list[int], role: str, g: torch.Generator) -> Tensor:
    if operand.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=g.device)
    if not operand.dtype.is_floating_point:  # ids that are equal, or a length that is long enough
        return torch.full(shape, max(shape), dtype=operand.dtype, device=g.device)
    x = torch.randn(shape, generator=g, device=g.device)
    return (1 + 0.3 * x if role == "gain" else x).to(operand.dtype)
