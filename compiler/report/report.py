"""Report what was found and done: a record per site, stages with times, warnings, whole-model checks.

Three readers, three forms: ``str(report)`` for a terminal of 110 columns, ``to_json()`` for scripts (a stable
contract: keys are added, never renamed), ``to_html(path)`` for a person who wants the block map of each mask.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from attnc.report.text import notes

Status = Literal["rewritten", "kept", "missed"]

WIDTH = 110
STATUSES: tuple[Status, ...] = ("rewritten", "kept", "missed")


@dataclass(slots=True)
class SiteRecord:
    """One attention site.  ``None`` means unknown or not measured.

    ``error`` and ``tolerance`` are largest absolute differences from the fp64 oracle; ``flops`` and ``bytes``
    belong to one call at the example sizes; ``predicted_gain`` is old time over new time.  ``kept`` is
    recognised but left on purpose; ``missed`` looked like attention and one condition failed.  ``code``,
    ``blocking_op``, ``blocking_source`` (``file.py:line``) and ``advice`` say what stopped a site that was
    not rewritten, and what would help.  ``conditions`` lists what must hold of the sizes for the mask's
    closed form; without any it is valid for all sizes.  ``details`` is free: names of operands, the region.
    """

    id: str
    module: str
    source: str
    spec: str
    mask: str
    form: str
    backend: str
    contract: Literal["SAME", "BOUNDED"]
    status: Status
    reason: str = ""
    error: float | None = None
    tolerance: float | None = None
    flops: float | None = None
    bytes: float | None = None
    predicted_gain: float | None = None
    code: str = ""
    blocking_op: str = ""
    blocking_source: str = ""
    advice: str = ""
    conditions: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: strict JSON values only, see ``jsonable``."""
        return {f.name: jsonable(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteRecord:
        """Read what ``to_dict`` wrote; keys of later versions are ignored.

        Raises:
            ValueError: a key without a default is missing.
        """
        known = {f.name for f in fields(cls)}
        numbers = ("error", "tolerance", "flops", "bytes", "predicted_gain")
        given = {k: _number(v) if k in numbers else v for k, v in values.items() if k in known}
        try:
            return cls(**given)
        except TypeError as e:
            raise ValueError(f"expected a site record, found keys {sorted(values)}: {e}") from None

    @property
    def summary(self) -> str:
        """The spec without its operands, on one short line: ``scale(0.1768) padding(key) softmax``."""
        return summarize(self.spec, self.mask)


@dataclass(slots=True)
class Stage:
    """One stage of the pipeline, in seconds of wall clock, with what it counted."""

    name: str
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """All that happened to one model.

    ``linears`` lists linear layers that were quantized (``module``, ``form``, ``error``, ...); ``checks``
    holds whole-model comparisons, such as ``{"max_error": 1e-6, "cosine": 1.0}``.  ``coverage`` says how each
    module was captured (``module``, ``how``: whole, dynamo, piece or none, ``reason``); '' is the model.
    """

    version: str
    model: str
    target: str
    sites: list[SiteRecord] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    linears: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    coverage: list[dict[str, str]] = field(default_factory=list)

    def counts(self) -> dict[Status, int]:
        """Return how many sites have each status; all three keys are there."""
        tally = Counter(site.status for site in self.sites)
        return {status: tally[status] for status in STATUSES}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form as a dictionary of plain values."""
        stages = [
            {**jsonable(s.details), "name": s.name, "seconds": jsonable(s.seconds)} for s in self.stages
        ]
        return {
            "version": self.version,
            "model": self.model,
            "target": self.target,
            "sites": [site.to_dict() for site in self.sites],
            "stages": stages,
            "warnings": list(self.warnings),
            "linears": jsonable(self.linears),
            "checks": jsonable(self.checks),
            "coverage": jsonable(self.coverage),
        }

    def to_json(self) -> str:
        """Return strict JSON with sorted keys, sites in program order; inf, -inf and nan are strings."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page: the table, and per site its block map and region before and after.

        Raises:
            CheckpointError: the file cannot be written.
        """
        from attnc.files import write_bytes
        from attnc.report.html import page

        write_bytes(Path(path), page(self).encode(), force=True)

    def headline(self) -> str:
        """Return the first line: how many of the sites were rewritten, kept and missed."""
        n, c = len(self.sites), self.counts()
        return (
            f"attnc {self.version}: {self.model} for {self.target}: {c['rewritten']} of {n} attention "
            f"site{'' if n == 1 else 's'} rewritten, {c['kept']} kept, {c['missed']} missed"
        )

    def __str__(self) -> str:
        lines = [self.headline()]
        found = [s for s in self.sites if s.status != "missed"]
        lines += ["  " + line for line in site_lines(found, WIDTH - 2)]
        lines += ["  " + note for note in notes(self)]
        for site in self.sites:
            if site.reason and site.status != "rewritten":
                lines.append(
                    f"  {site.status}: {clip(site.module or site.id, 40)} ({site.source or 'no source'}): "
                    f"{site.reason}"
                )
        if self.linears:
            forms = Counter(str(x.get("form", "?")) for x in self.linears)
            lines.append("  linears: " + ", ".join(f"{n} as {form}" for form, n in sorted(forms.items())))
        if self.checks:
            lines.append(
                "  whole model: "
                + ", ".join(f"{k} {_plain(v)}" for k, v in self.checks.items() if v not in ("", None))
            )
        if any(c["how"] != "whole" for c in self.coverage):
            lines.append(f"  coverage: {coverage_text(self.coverage)}")
        if self.stages:
            lines.append("  time: " + ", ".join(f"{s.name} {_seconds(s.seconds)}" for s in self.stages))
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


def jsonable(value: Any) -> Any:
    """Return ``value`` as strict JSON: lists for tuples and sets, strings for inf, NaN and unknown types."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v) for v in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [jsonable(v) for v in value]
    return str(value)


def site_lines(sites: Sequence[SiteRecord], width: int) -> list[str]:
    """Lay out one line per site, columns aligned, each at most ``width`` characters."""
    rows = [(s.module or s.id, s.summary, way(s), s.contract, error_text(s), gain_text(s)) for s in sites]
    if not rows:
        return []
    room = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    fixed = sum(room[2:]) + 2 * (len(room) - 1)
    room[0] = max(12, min(room[0], (width - fixed) // 2))
    room[1] = max(12, min(room[1], width - fixed - room[0]))
    cells = ([clip(cell, w).ljust(w) for cell, w in zip(row, room, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def coverage_text(coverage: Sequence[Mapping[str, str]]) -> str:
    """Return how the modules were captured in one line, ``by Dynamo: the model; not: router (reason)``."""
    words = {"whole": "whole", "dynamo": "by Dynamo", "piece": "piece by piece"}
    parts = []
    for how, word in words.items():
        names = [c["module"] or "the model" for c in coverage if c["how"] == how]
        parts += [f"{word}: {', '.join(names)}"] if names else []
    left = [f"{c['module'] or 'the model'} ({c['reason']})" for c in coverage if c["how"] == "none"]
    return "; ".join(parts + ([f"not: {', '.join(left)}"] if left else []))


def way(site: SiteRecord) -> str:
    """Return how the site runs, ``fused/sdpa``, or its status where it was left alone."""
    if site.status != "rewritten":
        return site.status
    return "/".join(filter(None, (site.form, site.backend))) or site.status


def error_text(site: SiteRecord) -> str:
    """Return the measured error and its limit, ``1.2e-07/3e-07``, or an empty text."""
    limit = "" if site.tolerance is None else f"/{site.tolerance:.0e}"
    return "" if site.error is None else f"{site.error:.1e}{limit}"


def gain_text(site: SiteRecord) -> str:
    """Return the predicted gain, ``2.3x``, or an empty text."""
    return "" if site.predicted_gain is None else f"{site.predicted_gain:.2g}x"


def summarize(spec: str, mask: str = "") -> str:
    """Shorten the text of a spec: no operands, no fill, four digits; ``mask`` is the closed form to show."""
    if not spec.startswith("attn "):
        return " ".join(filter(None, (spec, mask)))
    head, _, tail = spec.partition(" with ")[0].partition(" mask=")
    steps = [w for w in head.split()[4:] if w != "group=1"]
    norm = re.findall(r"(?:^|\s)((?:softmax|dropout)\S*)", tail)
    shown = mask or _mask_of(tail)
    text = " ".join([*steps, *([] if shown == "none" else [shown]), *norm])
    return re.sub(r"\d+\.\d{4,}(?:e[-+]?\d+)?", lambda m: f"{float(m[0]):.4g}", text)


def clip(text: str, width: int) -> str:
    """Shorten ``text`` to ``width`` characters by a gap in its middle, so that both ends stay readable."""
    if len(text) <= width:
        return text
    left = (width - 2) // 2
    return f"{text[:left]}..{text[len(text) - (width - 2 - left) :]}"


def _mask_of(tail: str) -> str:
    return re.split(r" (?=fill\(|softmax)", tail)[0]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
