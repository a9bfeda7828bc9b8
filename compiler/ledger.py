"""Enter in a report what the doors and the pipeline say: sites, stages, warnings, and what was covered."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from attnc.capture.names import moved
from attnc.capture.pieces import Coverage
from attnc.capture.types import Captured
from attnc.pipeline import Outcome
from attnc.report.report import Report, SiteRecord


class Ledger:
    """The entries of one report."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def add(self, outcome: Outcome, captured: Captured) -> None:
        """Add what one graph gave; a site captured again keeps its first record."""
        report, known = self._report, {s.id for s in self._report.sites}
        report.sites += [r for r in outcome.records if r.id not in known]
        captured.sites = tuple(r.id for r in outcome.records)
        for stage in outcome.stages:
            same = next((s for s in report.stages if s.name == stage.name), None)
            if same is None:
                report.stages.append(stage)
            else:
                same.seconds += stage.seconds
        said = (*captured.warnings, *outcome.warnings)
        report.warnings += [w for w in said if w not in report.warnings]

    def cover(self, coverage: Sequence[Coverage]) -> None:
        """Add how modules were captured; kinds of call may differ in that."""
        entries = [*self._report.coverage, *(c.to_dict() for c in coverage)]
        known = {(c["module"], c["how"]): c for c in entries}
        held = {module for module, how in known if how != "none"}
        self._report.coverage = [c for c in known.values() if c["how"] != "none" or c["module"] not in held]

    def repeat(self, captures: Sequence[Captured], old: str, new: str) -> None:
        """Enter the sites of a compiled frame again for another module that the same frame serves."""
        ids = {i for c in captures for i in c.sites}
        known = {s.id for s in self._report.sites}
        for site in [s for s in self._report.sites if s.id in ids]:
            again = dataclasses.replace(
                site, id=moved(site.id, old, new), module=moved(site.module, old, new)
            )
            if again.id not in known:
                self._report.sites.append(again)

    def name(self, path: str, source: str, reason: str) -> None:
        """Enter a site of a graph that could not be captured, as kept."""
        known, base = {s.id for s in self._report.sites}, path or "model"
        names = itertools.chain((base,), (f"{base}#{i}" for i in itertools.count(2)))
        free = next(n for n in names if n not in known)
        self._report.sites.append(SiteRecord(free, path, source, "", "", "", "", "SAME", "kept", reason))
