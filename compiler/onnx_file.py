"""ONNX in, ONNX out: find attention in an ONNX file and rewrite the file, one operator per site.

The graph is read as calls of ATen (``attnc.codegen.onnx.reading``), the same detector looks at it, each site
becomes the best operator of the target, and only the nodes of rewritten sites change in the file.  The result
is run in ONNX Runtime beside the original before it gets its name; a site that disagrees is put back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

import attnc
from attnc import logs
from attnc.codegen.onnx import export as exporting
from attnc.codegen.onnx import placing, runtime, table
from attnc.codegen.onnx.agreement import Agreement, Original, strangers
from attnc.codegen.onnx.builder import OURS
from attnc.codegen.onnx.export import SiteExport
from attnc.codegen.onnx.opening.files import open_model
from attnc.codegen.onnx.reading import Reading, read
from attnc.codegen.onnx.reading.reader import unread
from attnc.codegen.onnx.splice import Replaced, Sized, Spliced, sized_elsewhere, splice
from attnc.codegen.onnx.translate import calls_of
from attnc.errors import CodegenError
from attnc.ir import Miss
from attnc.onnx_plan import named, planned
from attnc.passes.analyze.operands import Namer
from attnc.passes.detect import detect
from attnc.passes.rewrite.apply import Rewriter
from attnc.programs import copy_graph
from attnc.records import INTERNAL, Job, missed_record, other_records, site_record
from attnc.report.report import Report, SiteRecord, Stage

if TYPE_CHECKING:
    import onnx_ir as ir

log = logs.get("rewrite")

FUSED = frozenset(
    (
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "DecoderMaskedMultiHeadAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "SparseAttention",
        "QAttention",
    )
)
"""Operators, of any domain, that are attention already."""


@dataclass(frozen=True, slots=True)
class RewrittenFile:
    """A written file: what became of each site, the report, and the files."""

    sites: tuple[SiteExport, ...]
    report: Report
    files: tuple[Path, ...] = ()


def inspect_onnx(path: str | os.PathLike[str], *, target: str = "ort-cpu", cost_model: bool = True) -> Report:
    """Return what ``optimize_onnx`` would find in the file at ``path`` and make of it; nothing is written.

    Raises:
        CheckpointError: the file is missing, broken or refused, as ``files.open_model`` says.
        CodegenError: an unknown target, or a graph that cannot be read.
    """
    work = _Work.on(Path(path), target, cost_model)
    work.choose()
    return work.report(Path(path).name)


def optimize_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "ort-cpu",
    verify: bool = True,
    cost_model: bool = True,
    force: bool = False,
) -> list[SiteExport]:
    """Rewrite as ``rewrite_onnx`` does and return what each rewritten site became."""
    done = rewrite_onnx(path, out, target=target, verify=verify, cost_model=cost_model, force=force)
    return list(done.sites)


def rewrite_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "ort-cpu",
    verify: bool = True,
    cost_model: bool = True,
    force: bool = False,
) -> RewrittenFile:
    """Rewrite the ONNX file at ``path`` for ``target`` and write it to ``out``.

    Nodes that belong to no rewritten site stay as they are, in their order.  ``verify`` runs both files in
    ONNX Runtime on the same inputs, at two sizes where sizes vary, and puts sites back that disagree.
    ``cost_model=False`` also rewrites sites whose weights are read elsewhere.

    Raises:
        CheckpointError: the file is missing, broken or refused, as ``files.open_model`` says.
        CodegenError: a bad path or target, a graph that cannot be read, a file that ONNX Runtime refuses, or
            a rewritten one that disagrees; nothing is written then.
    """
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise CodegenError(f"ONNX: expected an output apart from the input, found {out} for both")
    old = placing.check_free(out, force)
    work = _Work.on(path, target, cost_model)
    with placing.Sibling(out) as folder:
        model = work.rewritten(verify)
        placing.save(model, folder / out.name, _has_external_data(work.model))
        if verify and work.live:
            work.check_file(folder / out.name)
        files = placing.place(folder, out, old, force)
    return RewrittenFile(tuple(work.sites), work.report(path.name), files)


def _has_external_data(model: ir.Model) -> bool:
    import onnx_ir as ir

    return any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())


@dataclass
class _Attempt:
    """The edited graph with what its sites become."""

    graph: fx.Graph
    decisions: list[exporting.Decision]
    replaced: list[Replaced]
    sized: list[Sized]


@dataclass
class _Work:
    """One file on its way through the stages."""

    model: ir.Model
    reading: Reading
    capabilities: table.Table
    target: str
    jobs: list[Job]
    missed: list[tuple[Miss, str]]
    stages: list[Stage]
    sites: list[SiteExport] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    original: Original | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def on(cls, path: Path, target: str, cost_model: bool) -> _Work:
        """Open and read a file, find its sites, and say which can be rewritten."""
        stages: list[Stage] = []
        with _timed(stages, "open"):
            model = open_model(path)
        opset = model.opset_imports.get("", 1)
        capabilities = table.within(table.load(target, runtime.version()), opset)
        with _timed(stages, "read"):
            reading = read(model)
        with _timed(stages, "detect"):
            found, missed = detect(reading.graph, reading.tensors, reading.links)
            namer = Namer(reading.graph, reading.tensors)
        links = {name: name for name in reading.links}
        gate = Rewriter(copy_graph(reading.graph), reading.graph, links)
        jobs = [planned(f, gate, opset, cost_model) for f in found]
        for job in jobs:
            job.details |= named(namer, job.found)
        return cls(model, reading, capabilities, target, jobs, missed, stages)

    @property
    def live(self) -> list[Job]:
        """The sites that are to be rewritten."""
        return [j for j in self.jobs if j.plan is not None]

    # ------------------------------------------------------------ stages

    def choose(self) -> _Attempt:
        """Rewrite the graph and choose an operator for each live site; sites that raise stay as they are."""
        while True:
            live = self.live
            try:
                with _timed(self.stages, "choose"):
                    return self._attempt(live)
            except Exception as error:  # a mistake of ours must not take the user's model down
                if not live:
                    raise
                for job, why in self._culprits(live, error):
                    job.stumble(why)

    def rewritten(self, verify: bool) -> ir.Model:
        """Return the rewritten model, with the sites that could be rewritten and that agree."""
        while True:
            attempt = self.choose()
            with _timed(self.stages, "splice"):
                done = self._splice(attempt)
            if done.alive:
                self._put_back_alive(done.alive)
                continue
            if not verify or not self.live:
                self.agreements = []
                break
            with _timed(self.stages, "check"):
                bad = self._disagreements(done.model)
            if not bad:
                break
            for job, why in bad:
                job.put_back(why)
        self.sites = [
            exporting.site_export(d, w, self.capabilities.name)
            for d, w in zip(attempt.decisions, done.written, strict=True)
        ]
        _sign(done.model, self.target, self.sites, [d.call.text for d in attempt.decisions])
        return done.model

    def check_file(self, path: Path) -> None:
        """See that the finished file runs, and gives what the original gives.

        Raises:
            CodegenError: it does not.
        """
        if self.original is None:
            self.original = Original(self.model, self.reading, ())
        with _timed(self.stages, "check"):
            found = self.original.compare(open_model(path), outputs_only=True)
        bad = [a for a in found if not a.ok]
        if bad:
            raise CodegenError(f"ONNX: the rewritten file disagrees with the original: {bad[0]}")
        self.agreements = [*(a for a in self.agreements if a.name in self.original.watched), *found]

    def _attempt(self, live: Sequence[Job]) -> _Attempt:
        """Put each site into a copy of the graph as one node and choose its operator."""
        graph = copy_graph(self.reading.graph)
        editor = Rewriter(graph, self.reading.graph, {name: name for name in self.reading.links})
        replaced = []
        for job in live:
            assert job.plan is not None, "a live job has a plan"
            match = job.found.match
            job.new_output = editor.apply(job.found, match.spec, {"match": match.site.id, "form": "fused"})
            stays = bool(match.escapes)
            replaced.append(Replaced(match.site.id, match.output, job.new_output, job.found.anchor, stays))
        sized = sized_elsewhere(self.reading, graph)
        decisions = exporting.decide(calls_of(graph), self.capabilities)
        chosen = {d.call.id: d for d in decisions}
        for job in live:
            decision = chosen.get(job.found.match.site.id)
            if job.plan is not None and decision is not None:
                row = decision.choice.row
                job.plan = replace(job.plan, backend=row.operator if row else "function")
        return _Attempt(graph, decisions, replaced, sized)

    def _culprits(self, live: Sequence[Job], error: Exception) -> list[tuple[Job, Exception]]:
        """Return the sites that raise on their own, with what they raise; all of them if none does."""
        if len(live) == 1:
            return [(live[0], error)]
        found: list[tuple[Job, Exception]] = []
        for job in live:
            try:
                self._attempt([job])
            except Exception as own:  # as above
                found.append((job, own))
        return found or [(job, error) for job in live]

    def _splice(self, attempt: _Attempt) -> Spliced:
        return splice(
            self.model,
            self.reading,
            attempt.graph,
            [d.call for d in attempt.decisions],
            [d.choice.row for d in attempt.decisions],
            attempt.replaced,
            attempt.sized,
        )

    def _put_back_alive(self, alive: Sequence[Replaced]) -> None:
        """Give up sites whose normalizer would be computed beside the new operator."""
        anchors = {r.anchor for r in alive}
        for job in self.live:
            if job.found.anchor in anchors:
                why = "a value of the site is still read elsewhere, so it would be computed twice"
                job.plan, job.status = None, "kept"
                job.miss = Miss("weights-in-use", job.found.anchor, why)

    def _disagreements(self, model: ir.Model) -> list[tuple[Job, str]]:
        """Run the original and the rewritten model; return the sites to put back, and why."""
        watched = {self._value(j): j for j in self.live}
        if self.original is None:
            self.original = Original(self.model, self.reading, list(watched))
        try:
            self.agreements = self.original.compare(model)
        except CodegenError as refused:
            return self._refused(refused)
        bad = [a for a in self.agreements if not a.ok]
        named = [(watched[a.name], str(a)) for a in bad if a.name in watched]
        first = {id(j): (j, why) for j, why in reversed(named)}
        if first or not bad:
            return list(first.values())
        return [(j, f"the outputs differ: {bad[0]}") for j in self.live]

    def _refused(self, error: CodegenError) -> list[tuple[Job, str]]:
        """Return the sites with which, rewritten alone, ONNX Runtime refuses the file; all if none is."""
        assert self.original is not None, "a rewritten model was compared with it"
        found = []
        for job in self.live:
            try:
                self.original.compare(self._splice(self._attempt([job])).model)
            except CodegenError as own:
                found.append((job, str(own)))
        return found or [(job, str(error)) for job in self.live]

    def _value(self, job: Job) -> str:
        """Return the name of the value that a site computes, which it keeps."""
        return self.reading.links[job.found.match.output].name or ""

    # ------------------------------------------------------------ report

    def report(self, name: str) -> Report:
        """Return the report on the file."""
        nodes = {n.name: n for n in self.reading.graph.nodes}
        errors: dict[str, Agreement] = {}
        for a in self.agreements:
            errors[a.name] = max(a, errors.get(a.name, a), key=lambda x: x.error / (x.tolerance or 1.0))
        records = []
        for job in self.jobs:
            record = site_record(job, nodes)
            measured = errors.get(self._value(job)) if job.plan is not None else None
            if measured is not None:
                record.error, record.tolerance = measured.error, measured.tolerance
            records.append(self._placed(record, job.found.anchor))
        records += [self._placed(missed_record(m, n, nodes), m.node) for m, n in self.missed]
        records += [r for j in self.jobs for r in other_records(j, nodes)]
        records += _fused_records(self.model, self.reading)
        report = Report(attnc.__version__, name, self.target, records, self.stages)
        report.warnings += _unread(self.reading)
        report.warnings += [f"{j.found.match.site.id}: {j.reason}" for j in self.jobs if _internal(j)]
        if self.original is not None and strangers(self.model):
            report.warnings.append(
                "operators that ONNX Runtime does not know were not run: the check made up values"
            )
        outputs = [a for a in self.agreements if self.original and a.name not in self.original.watched]
        if outputs:
            report.checks = {"runs": len(self.original.runs) if self.original else 0}
            report.checks["max_error"] = max(a.error for a in outputs)
        return report

    def _placed(self, record: SiteRecord, node: str) -> SiteRecord:
        """Return the record with the file's node as its source, and the sizes that must be equal."""
        origin = self.reading.origins.get(node)
        if origin is not None:
            record.source = f"{origin.op_type} {origin.name}".strip()
            record.blocking_source = record.source if record.code else ""
        equal = (f"{a} == {b}" for a, b in self.reading.equal.items())
        record.conditions = [*record.conditions, *equal, *self.reading.assumed]
        return record


# ---------------------------------------------------------------- words


def _fused_records(model: ir.Model, reading: Reading) -> Iterator[SiteRecord]:
    """Yield a record for each operator of the file that is attention already and was not read as such."""
    nodes = {n.name: n for n in reading.graph.nodes}
    known = {id(origin) for name, origin in reading.origins.items() if nodes[name].target is not unread}
    for node in model.graph:
        if node.op_type not in FUSED or node.domain == OURS or id(node) in known:
            continue
        name = node.name or node.outputs[0].name or node.op_type
        miss = Miss("already-fused", name, f"the file has {node.domain or 'ai.onnx'}.{node.op_type} here")
        record = missed_record(miss, name, {})
        record.module, record.source = name, f"{node.op_type} {name}"
        yield record


def _unread(reading: Reading) -> list[str]:
    """Return one line per operator that was left alone because it could not be read."""
    return [
        f"{name} is left alone ({count} time{'' if count == 1 else 's'}): {why}"
        for name, (count, why) in sorted(reading.unread.items())
    ]


def _internal(job: Job) -> bool:
    return job.miss is not None and job.miss.code == INTERNAL


def _sign(model: ir.Model, target: str, sites: Sequence[SiteExport], specs: Sequence[str]) -> None:
    """Write into the file's metadata what was rewritten; what is there stays."""
    if sites:
        certificates = [exporting.certificate(s, spec) for s, spec in zip(sites, specs, strict=True)]
        model.metadata_props["attnc.version"] = attnc.__version__
        model.metadata_props["attnc.target"] = target
        model.metadata_props["attnc.sites"] = json.dumps(certificates, sort_keys=True)


@contextmanager
def _timed(stages: list[Stage], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        same = next((s for s in stages if s.name == name), None)
        if same is None:
            stages.append(Stage(name, seconds))
        else:
            same.seconds += seconds
