"""Sum up rows of the recognition benchmark, and show them as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BEGIN = "<!-- scoreboard: written by benchmarks/recognition.py -->"
END = "<!-- end of scoreboard -->"
CLOSED = ("none", "causal", "causal+more")
"""Kinds of mask, in the tracker's words, for which a closed form is asked."""


def sum_spellings(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count over the spellings; a case whose process died counts as raised."""
    out: Counter[str] = Counter()
    for r in rows:
        other = r.get("kind") == "other"
        out["others" if other else "spellings"] += 1
        out["named"] += bool(r.get("named")) if other else 0
        out["rewritten"] += 0 if other else r.get("rewritten", 0)
        out["mask_closed"] += 0 if other else r.get("mask_closed", 0)
        out["checked"] += r.get("agrees") is not None
        out["agree"] += r.get("agrees") is True
        out["raised"] += "raised" in r or r.get("status") == "died"
        out["seconds"] += round(r.get("wall_s", 0))
    return dict(out)


def sum_models(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count over the models of the zoo that run and hold unfused sites.

    A model counts as agreeing if its outputs were compared and are equal within the zoo's policy; a mask kind
    counts as closed in models where no mask stayed dense.
    """
    out: Counter[str] = Counter()
    masks: dict[str, list[int]] = {}
    for r in rows:
        out["seconds"] += round(r.get("wall_s", 0))
        out["died"] += r.get("status") == "died"
        if r.get("status") != "ok" or not r.get("unfused"):
            continue
        sites, fused, by = r["unfused"], r.get("fused", 0), r.get("by_status", {})
        out["models"] += 1
        out["sites"] += sites
        out["rewritten"] += min(fused, sites)
        out["named"] += min(by.get("kept", 0) + by.get("missed", 0), max(0, sites - fused))
        out["checked"] += r.get("agrees") is not None
        out["agree"] += r.get("agrees") is True
        out["raised"] += "raised" in r
        for kind, n in r["masks"].items():
            total = masks.setdefault(kind, [0, 0])
            total[0] += n
            total[1] += n if r.get("dense") is False else 0
    return {**out, "masks": dict(sorted(masks.items()))}


def table(results: Mapping[str, Any]) -> str:
    """Return the scoreboard as Markdown, one row per tool that has results."""
    lines = [
        "| tool | spellings rewritten | mask in closed form | others named | zoo: sites rewritten | "
        "named with a reason | masks in closed form | outputs agree | raised or died | s per model |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for tool in results["tools"].values():
        lines.append(f"| {tool['title']} | {_spellings(tool)} | {_zoo(tool)} |")
    lines += ["", *(_note(tool) for tool in results["tools"].values())]
    return "\n".join(lines) + "\n"


def _spellings(tool: Mapping[str, Any]) -> str:
    s = tool.get("spellings")
    if s is None:
        return "not run | | "
    s = {**dict.fromkeys(("rewritten", "spellings", "mask_closed", "named", "others"), 0), **s["totals"]}
    closed = f"{s['mask_closed']} of {s['spellings']}" if tool["reports_masks"] else "not told"
    return f"{s['rewritten']} of {s['spellings']} | {closed} | {s['named']} of {s['others']}"


def _zoo(tool: Mapping[str, Any]) -> str:
    z = tool.get("zoo")
    if z is None:
        return "not run | | | | | "
    t = z["totals"]
    sites, models = t.get("sites", 0), t.get("models", 0)
    asked, closed = (sum(t["masks"].get(k, (0, 0))[i] for k in CLOSED) for i in (0, 1))
    masks = f"{_share(closed, asked)} of {asked}" if tool["reports_masks"] else "not told"
    agree = f"{t['agree']} of {t['checked']} models" if t.get("checked") else "not checked"
    cells = (
        f"{t['rewritten']} of {sites} ({_share(t['rewritten'], sites)})",
        str(t["named"]) if tool["reports_masks"] else "-",
        masks,
        agree,
        f"{t['raised'] + t['died']} of {models + t['died']}",
        f"{t['seconds'] / max(1, z['runs']):.1f}",
    )
    return " | ".join(cells)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _note(tool: Mapping[str, Any]) -> str:
    """Say how a tool's row came about."""
    parts = []
    for what in ("spellings", "zoo"):
        run = tool.get(what)
        if run is not None:
            sample = f", one in {run['sample']}" if run.get("sample", 1) > 1 else ""
            parts.append(f"{what}{sample}: `{run['command']}`, {run['date']}")
    runs = [tool[w] for w in ("spellings", "zoo") if w in tool]
    versions = ", ".join(f"{k} {v}" for k, v in runs[-1]["versions"].items()) if runs else ""
    machine = runs[-1]["machine"] if runs else ""
    return f"- {tool['title']}: {'; '.join(parts)}; {machine}; {versions}"


def put_into_readme(text: str, shown: str) -> str:
    """Return the README's text with the table between the two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r} in the README")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{shown}{END}{rest.partition(END)[2]}"


def shown_in_readme(text: str) -> str:
    """Return what stands between the two marks."""
    return text.partition(BEGIN + "\n")[2].partition(END)[0]


def write(results: Mapping[str, Any], markdown: Path, readme: Path | None) -> None:
    """Write the table to its file, and into the README."""
    shown = table(results)
    markdown.write_text(
        f"# Recognition\n\nWritten by `benchmarks/recognition.py` from recognition.json.\n\n{shown}"
    )
    if readme is not None:
        readme.write_text(put_into_readme(readme.read_text(), shown))
