"""Turn what became of each site into the records of a report.

A site that was not rewritten says which code stopped it, the operation that did, the user's line, and what
would make it a match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from attnc import logs
from attnc.codes.known import advice
from attnc.cost import Cost
from attnc.ir import AttentionSpec, Miss, Plan
from attnc.passes.analyze.region_view import view_of_miss, view_of_rewrite, view_of_site
from attnc.passes.analyze.source import blocking_op, blocking_source
from attnc.passes.detect import Found
from attnc.passes.detect.found import Flat, Term
from attnc.passes.detect.graph import module_path, source_line
from attnc.report.report import SiteRecord
from attnc.verify import sites as checks

log = logs.get("rewrite")
INTERNAL = "internal-error"
"""The code where a stage of ours raised."""
_KEPT = frozenset({"already-fused"})
"""Codes of what is recognised, and left alone on purpose."""


@dataclass
class Job:
    """One found site on its way: its plan if it is to be rewritten, else the Miss that says why not.

    ``status`` is what a report says of it; ``passed`` the kernels that were passed over for the one chosen;
    ``head_sizes`` those of the example where the spec's are symbolic.
    """

    found: Found
    plan: Plan | None
    status: str
    miss: Miss | None
    gain: float | None
    price: Cost | None
    passed: tuple[Miss, ...] = ()
    new_output: str = ""
    check: checks.Check | None = None
    details: dict[str, Any] = field(default_factory=dict)
    head_sizes: tuple[int, int] | None = None

    def put_back(self, why: str) -> None:
        """Give the site up after its check failed."""
        why = f"failed verification and was put back: {why}"
        self.plan, self.status = None, "kept"
        self.miss = Miss("failed-verification", self.found.match.output, why)

    def stumble(self, error: Exception) -> None:
        """Leave the site as it was because a stage raised on it."""
        log.warning("%s: a stage raised", self.found.match.site.id, exc_info=error)
        self.plan, self.status = None, "kept"
        self.miss = Miss(INTERNAL, self.found.match.output, f"{said(error)}; the site runs as it was")

    @property
    def reason(self) -> str:
        """The text of the report: a code and a sentence, or why kernels were passed over."""
        return reason_of(self.miss) if self.miss is not None else "; ".join(m.why for m in self.passed)


def _term(t: Term) -> str:
    """Return one attention of a sum as text: its factors, then its spec."""
    gates = "".join(f"{g.source} * " for g in t.gates)
    return f"{t.number!r} * {gates}{t.spec}"


def _flat(f: Flat) -> str:
    """Return what is added beside attentions as text: its factors, then what they multiply."""
    return f"{f.number!r} * {''.join(f'{g.source} * ' for g in f.gates)}sum of the values"


def said(error: BaseException) -> str:
    """Return an error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def reason_of(miss: Miss) -> str:
    """Return a miss as one line that begins with its code."""
    return f"{miss.code}: {miss.why}"


def advice_of(miss: Miss) -> str:
    """Return what would make it a match: the advice of what caused the miss, where something else did."""
    return " ".join(dict.fromkeys(advice(m.code) for m in miss.causes)) or advice(miss.code)


def site_record(job: Job, nodes: Mapping[str, fx.Node]) -> SiteRecord:
    """Return the record of a found site; ``nodes`` are those of the working graph by name."""
    m = job.found.match
    spec: AttentionSpec = job.plan.spec if job.plan is not None else m.spec
    details: dict[str, Any] = {"trail": list(m.trail), "found": str(m.spec), **job.details}
    if job.found.terms:
        details["terms"] = [*map(_term, job.found.terms), *map(_flat, job.found.flats)]
    if job.head_sizes is not None:
        details["at_example"] = str(spec.with_head_sizes(*job.head_sizes))
    if job.check is not None:
        details |= {"variant": job.check.variant, "gradients": job.check.gradients}
    return SiteRecord(
        id=m.site.id,
        module=m.site.module,
        source=m.site.source,
        spec=str(spec),
        mask=spec.mask.describe(),
        form=job.plan.form if job.plan else "",
        backend=job.plan.backend if job.plan else "",
        contract=job.plan.contract if job.plan else "SAME",
        status=job.status,  # type: ignore[arg-type]
        reason=job.reason,
        error=job.check.error if job.check else None,
        tolerance=job.check.tolerance if job.check else None,
        flops=job.price.flops if job.price else None,
        bytes=job.price.bytes if job.price else None,
        predicted_gain=job.gain,
        conditions=list(m.conditions),
        details=details,
        **_blocking(job.miss, nodes),
    )


def other_records(job: Job, nodes: Mapping[str, fx.Node]) -> list[SiteRecord]:
    """Return a record for each further normalizer that a site stands for: it became what the site became."""
    whole = site_record(job, nodes)
    out = []
    for i, name in enumerate(job.found.others, start=2):
        path, kind = module_path(nodes[name])
        out.append(
            replace(
                whole,
                id=f"{whole.id}.{i}",
                module=path,
                source=f"{kind} {source_line(nodes[name])}".strip(),
                reason=f"one site with {whole.id}" + (f"; {whole.reason}" if whole.reason else ""),
                flops=None,
                bytes=None,
            )
        )
    return out


def missed_record(miss: Miss, name: str, nodes: Mapping[str, fx.Node]) -> SiteRecord:
    """Return the record of what looked like a site; ``name`` is its id."""
    node = nodes.get(miss.node)
    path, kind = module_path(node) if node is not None else ("", "")
    source = f"{kind} {source_line(node) if node is not None else ''}".strip()
    return SiteRecord(
        name,
        path,
        source,
        "",
        "",
        "",
        "",
        "SAME",
        "kept" if miss.code in _KEPT else "missed",
        reason_of(miss),
        details={"node": miss.node},
        **_blocking(miss, nodes),
    )


def draw(
    jobs: Sequence[Job],
    missed: Sequence[tuple[Miss, str]],
    records: Sequence[SiteRecord],
    nodes: Mapping[str, fx.Node],
    rewritten: fx.Graph,
) -> None:
    """Put what is drawn of each site into its record: ``before``, and ``after`` where it was rewritten.

    ``records`` are those of the jobs, then those of the misses; ``nodes`` are from the working graph.
    """
    made = {n.name: n for n in rewritten.nodes}
    outputs = frozenset(j.new_output for j in jobs if j.plan is not None)
    for job, record in zip(jobs, records[: len(jobs)], strict=True):
        stopped = job.miss.node if job.miss is not None else ""
        record.details["before"] = view_of_site(job.found, nodes, stopped)
        if job.plan is not None and job.new_output in made:
            record.details["after"] = view_of_rewrite(made[job.new_output], outputs)
    for (miss, _), record in zip(missed, records[len(jobs) :], strict=True):
        if miss.node in nodes:
            record.details["before"] = view_of_miss(nodes[miss.node])


def _blocking(miss: Miss | None, nodes: Mapping[str, fx.Node]) -> dict[str, Any]:
    """Return the fields that say what stopped a site and what would help; none for a rewritten one."""
    if miss is None:
        return {}
    node = nodes.get(miss.node)
    return {
        "code": miss.code,
        "blocking_op": blocking_op(node) if node is not None else "",
        "blocking_source": blocking_source(node) if node is not None else "",
        "advice": advice_of(miss),
    }


def leave(site: SiteRecord, miss: Miss) -> None:
    """Say of a rewritten site that it was put back, and why."""
    site.status, site.reason = "kept", reason_of(miss)
    site.code, site.advice = miss.code, advice_of(miss)
