"""The compiler in one function.

Capture -> detect -> plan -> rewrite -> lower -> verify, and put back what fails.

``run`` takes a captured graph and returns the program that runs, the same program at the ``attend`` level
(one node per site, from which ONNX and portable artefacts are lowered), and a record for every site.  The
captured graph itself is never edited at the export door.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from attnc import logs
from attnc.capture.program import ATTEND_FORM
from attnc.capture.types import Captured
from attnc.codegen import ops as _ops  # noqa: F401  (registers attnc::attend)
from attnc.codegen.lower import lower
from attnc.codegen.select import select
from attnc.ir import AttentionSpec, Miss, Plan
from attnc.passes.analyze.operands import Namer
from attnc.passes.analyze.price import gain, head_sizes, hints, price, sizes
from attnc.passes.detect import Found, detect
from attnc.passes.rewrite.apply import Rewriter
from attnc.passes.rewrite.forms import Forms
from attnc.passes.rewrite.fuse.fused import Fused
from attnc.passes.rewrite.quant.projections import projections
from attnc.passes.rewrite.quant.w8a8 import W8A8
from attnc.programs import copy_graph, copy_program, fix_outputs
from attnc.records import INTERNAL, Job, draw, missed_record, other_records, reason_of, site_record
from attnc.report.report import SiteRecord, Stage
from attnc.verify import sites as checks

log = logs.get("rewrite")
Progress = Callable[[str, float], None]
FLEX_SCORES = 1 << 18
"""Scores per head (512 x 512) from which a FlexAttention kernel is chosen: it takes seconds to compile."""


@dataclass(frozen=True)
class Options:
    """What the user allows and asks for; see ``attnc.optimize``.

    ``draw`` puts each site's region, before and after, into the details of its record.
    """

    forms: Forms
    target: str = "cpu"
    verify: bool = True
    cost_model: bool = True
    gradients: bool = False
    progress: Progress | None = None
    draw: bool = False
    whole: bool = True
    """Whether the graph is the whole model: then a pattern of ``forms`` that names no site is a mistake."""


@dataclass
class Outcome:
    """What came of one graph.  ``runtime`` and ``attend`` are None at the dynamo door.

    Where the graph is edited in place.
    """

    records: list[SiteRecord]
    stages: list[Stage]
    rewritten: int
    runtime: ExportedProgram | None = None
    linears: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    make_attend: Callable[[], ExportedProgram] | None = None
    graph: fx.Graph | None = None

    @cached_property
    def attend(self) -> ExportedProgram | None:
        """The program with one ``attend`` node per rewritten site, from which artefacts are lowered.

        Made when asked for.
        """
        return None if self.make_attend is None else self.make_attend()


def run(captured: Captured, options: Options, placeholders: Mapping[str, Any] | None = None) -> Outcome:
    """Run every stage after capture.

    ``placeholders`` are example values of the graph's inputs by name, None if unknown.

    A site on which a stage of ours raises runs as it was, and a warning names the error.

    Raises:
        UnknownSiteError: a pattern of ``options.forms`` names no site.
    """
    stages: list[Stage] = [Stage(n, s) for n, s in captured.seconds.items()]
    with _timed(stages, "detect", options) as note:
        found, missed = detect(captured.work, captured.tensors, captured.links)
        note.update(nodes=len(captured.work.nodes), sites=len(found), misses=len(missed))
    known = hints(captured.work)
    original = captured.exported.graph if captured.exported is not None else copy_graph(captured.graph)
    with _timed(stages, "names", options):
        named = _names(captured, found)
    with _timed(stages, "plan", options):
        gate = Rewriter(original, captured.work, captured.links, captured.moments)
        jobs = [_planned(f, gate, options, known) for f in found]
        for job, names in zip(jobs, named, strict=True):
            job.details |= {"operands": names} if names else {}
            job.head_sizes = head_sizes(job.found.match.spec, known)
    outcome = _rewrite_and_check(captured, original, jobs, options, placeholders, stages)
    nodes = {n.name: n for n in captured.work.nodes}
    outcome.records = [site_record(j, nodes) for j in jobs]
    outcome.records += [missed_record(m, name, nodes) for m, name in missed]
    if options.draw:
        draw(
            jobs, missed, outcome.records, nodes, outcome.runtime.graph if outcome.runtime else captured.graph
        )
    outcome.records += [r for j in jobs for r in other_records(j, nodes)]
    outcome.warnings += [f"{name}: {reason_of(m)}" for m, name in missed if m.code == INTERNAL]
    outcome.linears = _linears(captured, found, options)
    _run_branches(captured, outcome, options)
    if options.whole:
        options.forms.check([r.id for r in outcome.records])
    return outcome


def _names(captured: Captured, found: list[Found]) -> list[dict[str, str]]:
    """Return what is known of each site's operands; a name is a service, and never costs a rewrite."""
    namer, named = Namer(captured.work, captured.tensors), []
    for f in found:
        try:
            named.append(namer.names(f))
        except Exception as error:  # a mistake of ours must not take the user's model down
            log.warning("%s: its operands could not be named", f.match.site.id, exc_info=error)
            named.append({})
    return named


def _run_branches(captured: Captured, outcome: Outcome, options: Options) -> None:
    """Rewrite the branches of conditional calls, each on its own, and put them in place of the old ones."""
    owner = captured.owner if outcome.runtime is None else outcome.runtime.graph_module
    for name, branch in captured.branches:
        inner = run(branch, replace(options, whole=False))
        taken = {r.id for r in outcome.records}
        for record in inner.records:
            record.id = record.id if record.id not in taken else f"{record.id}@{name}"
        outcome.records += inner.records
        outcome.warnings += inner.warnings
        if inner.rewritten:
            branch.graph.lint()
            branch.owner.recompile()
            setattr(owner, name, branch.owner)
            outcome.rewritten += inner.rewritten


def _rewrite_and_check(
    captured: Captured,
    original: fx.Graph,
    jobs: list[Job],
    options: Options,
    placeholders: Mapping[str, Any] | None,
    stages: list[Stage],
) -> Outcome:
    """Rewrite the planned sites, lower, verify; put back the sites that fail and do it again without them."""
    while True:
        live = [j for j in jobs if j.plan is not None]
        try:
            outcome, failed = _attempt(captured, original, live, options, placeholders, stages)
        except Exception as error:  # a mistake of ours must not take the user's model down
            if not live:
                raise
            for j, why in _culprits(captured, original, live, options, placeholders, error):
                j.stumble(why)
            continue
        if not failed:
            if outcome.runtime is None and live:
                assert outcome.graph is not None, "the graph was rewritten"
                captured.owner.graph = outcome.graph
                captured.graph = captured.owner.graph
            stumbled = [j for j in jobs if j.miss is not None and j.miss.code == INTERNAL]
            outcome.warnings = [f"{j.found.match.site.id}: {j.reason}" for j in stumbled]
            return outcome
        for j, check in failed:
            log.warning("%s: put back: %s", j.found.match.site.id, check.reason)
            j.put_back(check.reason)


def _attempt(
    captured: Captured,
    original: fx.Graph,
    live: list[Job],
    options: Options,
    placeholders: Mapping[str, Any] | None,
    stages: list[Stage],
) -> tuple[Outcome, list[tuple[Job, checks.Check]]]:
    """Rewrite and lower the live sites in a copy and verify them; return it and the sites that fail."""
    outcome = Outcome([], stages, len(live))
    with _timed(stages, "rewrite", options) as note:
        outcome.runtime, graph = _rewritten(captured, live)
        note.update(sites=len(live))
    with _timed(stages, "lower", options) as note:
        counts, renamed = lower(graph)
        if outcome.runtime is not None:
            fix_outputs(outcome.runtime)
            outcome.make_attend = partial(_attend_program, captured, live)
            outcome.runtime.graph_module.meta[ATTEND_FORM] = lambda: outcome.attend
        note.update(counts)
    outcome.graph = graph
    for j in live:
        j.new_output = renamed.get(j.new_output, j.new_output)
    if not options.verify:
        return outcome, []
    return outcome, _verify(original, graph, captured, live, options, placeholders, stages)


def _culprits(
    captured: Captured,
    original: fx.Graph,
    live: list[Job],
    options: Options,
    placeholders: Mapping[str, Any] | None,
    error: Exception,
) -> list[tuple[Job, Exception]]:
    """Return the sites that raise on their own, with what they raise; all of them if none does."""
    if len(live) == 1:
        return [(live[0], error)]
    found: list[tuple[Job, Exception]] = []
    for j in live:
        try:
            _attempt(captured, original, [j], options, placeholders, [])
        except Exception as own:  # as above
            found.append((j, own))
    return found or [(j, error) for j in live]


def _rewritten(captured: Captured, live: list[Job]) -> tuple[ExportedProgram | None, fx.Graph]:
    """Return a copy of the captured graph.

    (and its program) in which each planned site is one ``attend`` node.
    """
    program = None if captured.exported is None else copy_program(captured.exported)
    graph = copy_graph(captured.graph) if program is None else program.graph
    work = captured.work if program is not None else graph
    editor = Rewriter(graph, work, captured.links, captured.moments)
    for j in live:
        assert j.plan is not None
        stamp = {
            "match": j.found.match.site.id,
            "trail": j.found.match.trail,
            "backend": j.plan.backend,
            "form": j.plan.form,
        }
        j.new_output = editor.apply(j.found, j.plan.spec, stamp)
    return program, graph


def _attend_program(captured: Captured, live: list[Job]) -> ExportedProgram:
    names = [j.new_output for j in live]
    program, graph = _rewritten(captured, live)
    assert program is not None
    for j, name in zip(live, names, strict=True):
        j.new_output = name
    graph.eliminate_dead_code()
    fix_outputs(program)
    program.graph_module.recompile()
    return program


def portable(program: ExportedProgram, gpu: str | None = None) -> ExportedProgram:
    """Return a program at the ``attend`` level lowered to plain ATen wherever a plain form exists.

    Elsewhere, if ``gpu`` names an architecture (``sm_90``), to the Triton kernels that were emitted for it.
    """
    plain = copy_program(program)
    lower(plain.graph, portable=True)
    if gpu is not None:
        from attnc.codegen.triton.op import replace_attends

        replace_attends(plain.graph, gpu)
    fix_outputs(plain)
    plain.graph_module.recompile()
    return plain


# ---------------------------------------------------------------- plan


def _planned(found: Found, gate: Rewriter, options: Options, known: Mapping[str, int]) -> Job:
    """Plan one site; one on which planning raises is left as it is."""
    try:
        return _plan(found, gate, options, known)
    except Exception as error:  # a mistake of ours must not take the user's model down
        job = Job(found, None, "kept", None, None, None)
        job.stumble(error)
        return job


def _plan(found: Found, gate: Rewriter, options: Options, known: Mapping[str, int]) -> Job:
    """Choose form and backend for one site, or say why it stays."""
    spec, site = found.match.spec, found.match.site
    cost = price(spec, known, found.fused)
    left = _unable(found, gate, options)
    if left is not None:
        return Job(found, None, *left, None, cost)
    form = _form(spec, options.forms.at(site.id), found.anchor)
    if isinstance(form, Miss):
        return Job(found, None, "kept", form, None, cost)
    if found.terms and not isinstance(form, Fused):
        why = f"{form.name} edits one attention, and this output is a sum of {len(found.terms)}"
        return Job(found, None, "kept", Miss("form-does-not-apply", found.anchor, why), None, cost)
    new = form.rewrite(spec)
    backend, passed = select(new, options.target, _worth_compiling(spec, known))
    for t in found.terms[1:]:
        other, why_not = select(t.spec, options.target, _worth_compiling(t.spec, known))
        if other != backend:
            backend, passed = "reference", (*passed, *why_not)
    measured = options.cost_model and not found.fused  # the table compares with spelled-out attention
    predicted = gain(spec, new, known, options.target) if measured else None
    if form.contract == "SAME":
        useless = _useless(found, backend, passed, predicted, options)
        if useless is not None:
            return Job(found, None, "kept", useless, predicted, cost)
    plan = Plan(found.match, form.name, backend, form.contract, new)
    cost = price(new, known, backend != "reference")
    return Job(found, plan, "rewritten", None, predicted, cost, (*_left_beside(found), *passed))


def _unable(found: Found, gate: Rewriter, options: Options) -> tuple[str, Miss] | None:
    """Return status and reason of a site that cannot be rewritten whatever the form."""
    spec, escapes = found.match.spec, found.match.escapes
    if not options.forms.at(found.match.site.id):
        return "kept", Miss("form-not-allowed", found.anchor, "no form is allowed here")
    if escapes and options.cost_model:
        why = f"{', '.join(escapes)} is read outside the site, and a fused kernel would come on top"
        return "kept", Miss("weights-in-use", escapes[0], why)
    if spec.dropout:
        why = (
            f"a fused kernel would draw other random numbers (p={spec.dropout:g}); "
            "call .eval() or set dropout to 0"
        )
        return "kept", Miss("dropout-active", found.anchor, why)
    blocked = gate.blocked(found)
    return None if blocked is None else ("missed", blocked)


def _left_beside(found: Found) -> tuple[Miss, ...]:
    """Say which values of a rewritten site are computed as before, because others read them."""
    escapes = found.match.escapes
    why = f"{', '.join(escapes)} is computed as before for its other readers"
    return (Miss("weights-in-use", escapes[0], why),) if escapes else ()


def _form(spec: AttentionSpec, allowed: Sequence[Any], anchor: str) -> Any:
    """Return the first form that applies, or the Miss that says why none does."""
    refusals = []
    for form in [f for f in allowed if not isinstance(f, W8A8)] or [Fused()]:
        miss = form.applies(spec)
        if miss is None:
            return form
        refusals.append((form.name, miss))
    why = "; ".join(f"{name}: {miss.why}" for name, miss in refusals)
    return Miss("form-does-not-apply", anchor, why, tuple(miss for _, miss in refusals))


def _useless(
    found: Found, backend: str, passed: tuple[Miss, ...], predicted: float | None, options: Options
) -> Miss | None:
    """Say why a SAME rewrite would gain nothing."""
    if found.fused and not found.improves:
        why = "the model calls one fused kernel here, and its mask has no better form"
        return Miss("already-fused", found.anchor, why)
    if options.cost_model and backend == "reference":
        return Miss("no-faster-kernel", found.anchor, "; ".join(m.why for m in passed), passed)
    if predicted is not None and predicted < 1.0:
        why = f"predicted {predicted:.2f}x the model's own speed at these sizes"
        return Miss("slower", found.anchor, why)
    return None


def _worth_compiling(spec: AttentionSpec, known: Mapping[str, int]) -> frozenset[str] | None:
    """Return the backends to choose from: no FlexAttention where its compile time is never earned back."""
    s = sizes(spec, known)
    return None if s.sq * s.sk >= FLEX_SCORES else frozenset({"sdpa", "reference"})


def _linears(captured: Captured, found: list[Found], options: Options) -> list[str]:
    """Return the linear layers that a W8A8 form with scope projections covers, in order."""
    out: dict[str, None] = {}
    for f in found:
        if any(isinstance(x, W8A8) and x.scope == "projections" for x in options.forms.at(f.match.site.id)):
            out.update(dict.fromkeys(projections(captured.work, f, captured.fqn)))
    return list(out)


# ---------------------------------------------------------------- verify


def _verify(
    original: fx.Graph,
    target: fx.Graph,
    captured: Captured,
    live: list[Job],
    options: Options,
    placeholders: Mapping[str, Any] | None,
    stages: list[Stage],
) -> list[tuple[Job, checks.Check]]:
    """Check each rewritten site against the original region; return those of contract SAME that fail."""
    with _timed(stages, "verify", options) as note:
        outputs = {_old_output(j, captured): j.new_output for j in live}
        sites = [_site_to_check(j, captured, outputs) for j in live]
        results = checks.check_sites(
            original,
            target,
            sites,
            placeholders,
            gradients=options.gradients,
            constants=[captured.links.get(n, n) for n in captured.tensors],
        )
        failed = []
        for j, check in zip(live, results, strict=True):
            j.check = check
            assert j.plan is not None
            if not check.ok and j.plan.contract == "SAME":
                failed.append((j, check))
        note.update(failed=len(failed))
    return failed


def _old_output(job: Job, captured: Captured) -> str:
    """Return the node of the captured graph that the site computes."""
    return (captured.moments or captured.links)[job.found.match.output]


def _site_to_check(job: Job, captured: Captured, outputs: Mapping[str, str]) -> checks.SiteToCheck:
    """Say what to check of a site; ``outputs`` maps what live sites compute to the nodes that now do."""
    found, links = job.found, captured.links
    sources = {name: [links[n] for n in r.reads] for name, r in found.operands.items()}
    captured_by = (found.captured, *(t.captured for t in found.terms))
    masks = tuple(dict.fromkeys(links[n] for c in captured_by for r in c.values() for n in r.reads))
    boundary = tuple(dict.fromkeys(links[n] for r in found.makings for n in r.reads))
    bounded = job.plan is not None and job.plan.contract == "BOUNDED"
    return checks.SiteToCheck(
        job.found.match.site.id,
        _old_output(job, captured),
        job.new_output,
        boundary,
        masks,
        tuple(sources["q"]),
        bounded,
        {n: outputs[n] for n in boundary if n in outputs},
    )


@contextmanager
def _timed(stages: list[Stage], name: str, options: Options) -> Iterator[dict[str, Any]]:
    if options.progress is not None:
        options.progress(name, 0.0)
    details: dict[str, Any] = {}
    start = time.perf_counter()
    yield details
    stages.append(Stage(name, time.perf_counter() - start, details))
