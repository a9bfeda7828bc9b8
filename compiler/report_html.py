"""Draw a report as one HTML page without scripts or outside resources.

A mask's block map is drawn from its predicate by interval reasoning (``Mask.classify``), at the site's own
lengths where they are fixed and at 512 tokens where they are symbolic: white tiles are skipped, dark ones
full, light ones mixed.
"""

from __future__ import annotations

from html import escape

from attnc.ir import AttentionSpec
from attnc.printer import parse
from attnc.report import Report, SiteRecord, error_text, gain_text, way

STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222} table{border-collapse:collapse}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
code,pre{font-size:12px} .rewritten{color:#060}.kept{color:#850}.missed{color:#a00}
.pair{display:flex;gap:2em;flex-wrap:wrap} pre{background:#f6f6f6;padding:.6em;overflow:auto;max-width:48em}
svg{border:1px solid #888}
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
        *(_site(site) for site in report.sites),
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


def _site(site: SiteRecord) -> str:
    parts = [f"<h2>{escape(site.id)} {escape(site.module)}</h2><p><code>{escape(site.spec)}</code></p>"]
    if site.spec.startswith("attn "):
        parts.append(block_map(parse(site.spec)))
    sides = [(side, site.details[side]) for side in ("before", "after") if side in site.details]
    drawn = "".join(f"<div><h3>{side}</h3><pre>{escape(_lines(text))}</pre></div>" for side, text in sides)
    return "".join([*parts, f"<div class=pair>{drawn}</div>" if drawn else ""])


def _lines(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
