"""Emit a fused forward kernel from a spec: one complete, readable Python file over torch and triton.

What varies between specs is computed here as text and set into the named holes of ``templates/fwd.py.j2``.
The same spec gives the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from attnc import logs
from attnc.codegen.triton import draws
from attnc.codegen.triton.bench import bench_holes
from attnc.codegen.triton.canonical import canonical
from attnc.codegen.triton.configs import CAPABILITIES, UNKNOWN, Config
from attnc.codegen.triton.formulas import problem as formula_problem
from attnc.codegen.triton.heads import MOST
from attnc.codegen.triton.inputs import FLOATS, problem
from attnc.codegen.triton.kinds import KINDS, Kind
from attnc.codegen.triton.pointwise import problem as pointwise_problem
from attnc.codegen.triton.steps import WEIGHED, overflows
from attnc.errors import CodegenError, UnsupportedError
from attnc.ir import AttentionSpec, Kernel, Miss, Plan, Pointwise, SignedSoftmax
from attnc.masks import And, Band, Dense, Formula, Full, Mask, Not, Or, Padding, Range
from attnc.printer import parse

if TYPE_CHECKING:
    import jinja2

log = logs.get("codegen")


def can_run(what: Plan | AttentionSpec, kind: str = "forward") -> Miss | None:
    """Return why no kernel of this kind can be emitted for a plan or a spec, or None."""
    spec, node = (what.spec, what.match.output) if isinstance(what, Plan) else (what, what.q.name)
    chosen = _kind(kind)
    found = itertools.chain(_obstacles(spec, node, chosen), chosen.obstacles(spec, node))
    return next(found, None)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise CodegenError(f"emit: expected a kind of kernel among {', '.join(KINDS)}, found {name!r}")
    return KINDS[name]


def _obstacles(spec: AttentionSpec, node: str, kind: Kind) -> Iterator[Miss]:
    dims = (spec.q.shape[3], spec.k.shape[3], spec.v.shape[3])
    if not all(isinstance(d, int) and 0 < d <= MOST for d in dims) or dims[0] != dims[1]:
        why = f"triton: expected fixed head sizes of 1 to {MOST}, found {dims}"
        yield Miss("triton-head-size", node, why)
    dtypes = {x.dtype for x in (spec.q, spec.k, spec.v)}
    mixed = kind.mixed and spec.q.dtype == spec.k.dtype == torch.float32
    if not dtypes <= set(FLOATS) or (len(dtypes) != 1 and not mixed):
        found = ", ".join(sorted(map(str, dtypes)))
        why = f"triton: expected q, k, v in one of float16, bfloat16 and float32, found {found}"
        yield Miss("triton-dtype", node, why)
    yield from draws.obstacles(spec, node, kind.name, kind.dropout)
    for step in spec.scores:
        absent = pointwise_problem(step, kind.places) if isinstance(step, Pointwise) else None
        if absent is not None:
            yield Miss("triton-score-step", node, f"triton: {absent}, found {step}")
    if not isinstance(spec.norm, kind.norms):
        why = f"triton: expected a softmax or weights element by element, found {spec.norm}"
        yield Miss("triton-normalizer", node, why)
    if isinstance(spec.norm, SignedSoftmax) and overflows(spec.fill):
        why = f"triton: a signed softmax makes the fill {spec.fill.value} a magnitude beyond fp32 in base 2"
        yield Miss("triton-normalizer", node, why)
    if isinstance(spec.norm, WEIGHED) and (absent := pointwise_problem(Pointwise(spec.norm.expr))):
        yield Miss("triton-normalizer", node, f"triton: {absent}, found {spec.norm}")
    if not _known(spec.mask, kind.places):
        over = ", ".join(kind.places)
        why = f"triton: expected a mask of known parts, formulas small and over {over}, found {spec.mask}"
        yield Miss("triton-mask-kind", node, why)
    problems = problem(spec)
    if problems:
        yield Miss("triton-captured", node, f"triton: {problems}")


def _known(mask: Mask, places: str) -> bool:
    if isinstance(mask, And | Or):
        return all(_known(p, places) for p in mask.parts)
    if isinstance(mask, Not):
        return _known(mask.part, places)
    if isinstance(mask, Formula):
        return formula_problem(mask.value, places) is None
    return isinstance(mask, Full | Band | Range | Padding | Dense)


def emit(
    spec: AttentionSpec,
    *,
    name: str = "site_0",
    kind: str = "forward",
    configs: dict[str, Config] | None = None,
) -> Kernel:
    """Return a kernel of ``spec`` as a complete file called ``name``.py.

    Specs that differ only in names and in sizes no kernel depends on give the same file and the same key.
    ``kind`` is one of ``attnc.codegen.triton.kinds.KINDS``.  ``configs`` replaces entries of its default
    table, per architecture (``sm_80``, ``sm_86``, ``sm_90``, ``sm_100``, ``gfx942``, ``interpreter``).

    Raises:
        UnsupportedError: ``can_run`` has a reason against it.
        CodegenError: the name is not an identifier, or there is no such kind.
    """
    if not name.isidentifier():
        raise CodegenError(f"emit: expected a Python identifier as the kernel's name, found {name!r}")
    miss = can_run(spec, kind)
    if miss:
        raise UnsupportedError(f"{miss.why} (in {spec})")
    own, chosen = canonical(spec), _kind(kind)
    frame = {"kind": kind, "arches": _arches(), **bench_holes(own, chosen.bench)}
    holes = {**frame, **chosen.fill(own, {**chosen.choose(own), **(configs or {})})}
    text = _render(chosen.template, holes, key="", prefix="")
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Kernel(name, _render(chosen.template, holes, key=key, prefix=f"{name}_"), key)


def _arches() -> str:
    """Return the table by which an emitted file finds its tiles."""
    rows = ", ".join(f'{capability}: "{arch}"' for capability, arch in CAPABILITIES.items())
    return f'{{{rows}}}.get((major, minor), "{UNKNOWN}")'


def emit_all(
    specs: Sequence[AttentionSpec | str], missed: Sequence[str] = (), kinds: Sequence[str] = ("forward",)
) -> list[Kernel]:
    """Return one kernel of each kind per different computation among ``specs`` or their texts.

    The forward kernels are called site_0, site_1, .., those of other kinds site_0_backward and so on.
    ``missed`` are reasons why other sites have no spec, for the message where there is no kernel.

    Raises:
        UnsupportedError: there are no specs, or none that a kernel can serve; each reason is given once.
        CodegenError: there is no such kind.
    """
    kernels: list[Kernel] = []
    numbers: dict[str, int] = {}
    reasons = dict.fromkeys(missed)
    for given in specs:
        spec = parse(given) if isinstance(given, str) else given
        found = {kind: can_run(spec, kind) for kind in kinds}
        for miss in filter(None, found.values()):
            log.warning("no kernel for %s: %s", spec, miss.why)
            reasons[miss.why] = None
        served = [kind for kind, miss in found.items() if miss is None]
        text = str(canonical(spec)) if served else ""
        if not served or text in numbers:
            continue
        numbers[text] = len(numbers)
        for kind in served:
            name = f"site_{numbers[text]}" + (f"_{kind}" if kind != "forward" else "")
            kernels.append(emit(spec, name=name, kind=kind))
    if not kernels:
        raise UnsupportedError(
            f"emit: expected a site that a kernel can serve, found none: {'; '.join(reasons) or 'no sites'}"
        )
    return kernels


def spec_of(source: str) -> AttentionSpec:
    """Return the spec that an emitted file names in its header.

    Raises:
        CodegenError: the text has no such line.
    """
    found = re.search(r"^spec    (attn .*)$", source, re.MULTILINE)
    if not found:
        raise CodegenError("expected an emitted kernel with a line 'spec    attn ..', found none")
    return parse(found[1])


def kind_of(source: str) -> str:
    """Return the kind that an emitted file names in its header.

    Raises:
        CodegenError: the text has no such line.
    """
    found = re.search(r"^kind    (\w+)$", source, re.MULTILINE)
    if not found:
        raise CodegenError("expected an emitted kernel with a line 'kind    ..', found none")
    return found[1]


def _render(template: str, holes: dict[str, Any], **more: str) -> str:
    return _environment().get_template(template).render(**holes, **more)


@cache
def _environment() -> jinja2.Environment:
    """Return the templates, each compiled once per process."""
    import jinja2

    folder = resources.files("attnc.codegen.triton").joinpath("templates")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
