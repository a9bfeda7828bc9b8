"""Draw a report as one HTML page without scripts or outside resources.

Sites that are alike in all but their names, as layers are, get one section that lists where they occur.  A
mask's block map is drawn from its predicate by interval reasoning (``Mask.classify``), at the site's own
lengths where they are fixed and at 512 tokens where they are symbolic: white tiles are skipped, dark ones
full, light ones mixed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from attnc.ir import AttentionSpec
from attnc.printer import parse
from attnc.report.graph import drawing, legend
from attnc.report.report import Report, SiteRecord, error_text, gain_text, way
from attnc.report.text import grouped, names, operands_text, validity

STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222} table{border-collapse:collapse}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
code,pre{font-size:12px} .rewritten{color:#060}.kept{color:#850}.missed{color:#a00}
.pair{display:flex;gap:2em;flex-wrap:wrap} .pair>div{overflow:auto;max-width:100%}
svg{border:1px solid #888} svg.region{font:11px system-ui,sans-serif}
dl{display:grid;grid-template-columns:max-content auto;gap:.2em 1em} dt{color:#777} dd{margin:0}
.key{margin-right:1em} .key i{display:inline-block;width:1em;height:1em;border:1px solid #555}
"""
SHADES = {"skip": "#fff", "full": "#246", "mixed": "#9bd"}
TILES = 24
PIXELS = 8
SYMBOLIC_LENGTH = 512


def page(report: Report) -> str:
    """Return the whole page."""
    parts = [
        "<!doctype html><html lang=en><meta "
        f"charset=utf-8><title>{escape(report.model)}</title><style>{STYLE}</style>",
        f"<h1>{escape(report.headline())}</h1>",
        _table(report),
        _list("Warnings", report.warnings),
        _list("Whole model", [f"{k}: {v}" for k, v in report.checks.items()]),
        _list("Quantized linears", [", ".join(f"{k} {v}" for k, v in x.items()) for x in report.linears]),
        _list("Stages", [f"{s.name}: {s.seconds:.3f} s" for s in report.stages]),
        *(_section(group) for group in grouped(report.sites, _likeness)),
    ]
    return "\n".join(p for p in parts if p) + "</html>\n"


def block_map(spec: AttentionSpec) -> str:
    """Return an SVG of the mask, at most ``TILES`` tiles a side, queries downwards and keys to the right."""
    sq, sk = (n or SYMBOLIC_LENGTH for n in spec.lengths())
    rows, cols = _cuts(sq), _cuts(sk)
    rects = []
    for y, q in enumerate(rows):
        for x, k in enumerate(cols):
            shade = SHADES[spec.mask.classify(q, k, sq, sk)]
            rects.append(
                f'<rect x="{x * PIXELS}" y="{y * PIXELS}" width="{PIXELS}" height="{PIXELS}" fill="{shade}"/>'
            )
    size = f'width="{len(cols) * PIXELS}" height="{len(rows) * PIXELS}"'
    return f"<svg {size} role=img aria-label='block map, {sq} queries by {sk} keys'>{''.join(rects)}</svg>"


def _cuts(length: int) -> list[tuple[int, int]]:
    step = -(-length // min(TILES, length))
    return [(i, min(i + step, length) - 1) for i in range(0, length, step)]


def _table(report: Report) -> str:
    heads = (
        "site",
        "module",
        "source",
        "computes",
        "runs as",
        "contract",
        "status",
        "error",
        "predicted gain",
        "reason",
    )
    rows = []
    for s in report.sites:
        cells = (
            s.id,
            s.module,
            s.source,
            s.summary,
            way(s),
            s.contract,
            s.status,
            error_text(s),
            gain_text(s),
            s.reason,
        )
        rows.append(f"<tr class={s.status}>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr>" + "".join(rows) + "</table>"


def _list(title: str, items: list[str]) -> str:
    return (
        f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>" if items else ""
    )


def _likeness(site: SiteRecord) -> str:
    """Return a text that is equal for sites that would be drawn and described alike."""
    told = (
        site.status, site.code, site.reason, site.spec, site.form, site.backend, site.blocking_op,
        site.blocking_source or site.source, site.conditions, operands_text(site),
    )  # fmt: skip
    views = [([{**node, "name": ""} for node in view["nodes"]], view["edges"]) for _, view in _views(site)]
    return json.dumps([told, views], sort_keys=True)


def _views(site: SiteRecord) -> list[tuple[str, Any]]:
    return [(side, site.details[side]) for side in ("before", "after") if side in site.details]


def _section(group: Sequence[SiteRecord]) -> str:
    """Return what one site, or several that are alike, computes, why it was left alone, and its drawings."""
    site, views = group[0], _views(group[0])
    parts = [f"<section class=site><h2 class={site.status}>{escape(names(group))}</h2>", _facts(group)]
    if site.spec.startswith("attn "):
        parts.append(block_map(parse(site.spec)))
    if views:
        parts.append(f"<p>{legend([view for _, view in views])}</p>")
    drawn = "".join(f"<div><h3>{side}</h3>{drawing(view, f'{site.id} {side}')}</div>" for side, view in views)
    return "".join([*parts, f"<div class=pair>{drawn}</div>" if drawn else "", "</section>"])


def _facts(group: Sequence[SiteRecord]) -> str:
    site = group[0]
    shown = [
        ("where", ", ".join(f"{s.id} ({s.source})" if s.source else s.id for s in group)),
        ("computes", site.spec),
        ("operands", operands_text(site)),
        ("mask", f"{site.mask}, {validity(site)}" if site.mask and site.spec else ""),
        ("stopped by", " at ".join(filter(None, (site.blocking_op, site.blocking_source)))),
        ("why", site.reason),
        ("help", site.advice),
    ]
    rows = "".join(f"<dt>{label}<dd>{escape(text)}" for label, text in shown if text)
    return f"<dl>{rows}</dl>"
