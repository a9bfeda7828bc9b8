"""The lines of a report below its table: what feeds the operands, where masks hold, what stopped a site.

Layers repeat, so sites that say the same are told once, with a pattern of their names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnc.report.report import Report, SiteRecord

NAMES = 3
"""How many different names of sites are spelled out before the rest is only counted."""


@dataclass(frozen=True, slots=True)
class Block:
    """Why sites were left alone: ``head`` on one line, then labelled ``rows``."""

    status: str
    head: str
    rows: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """Return the block as text, rows indented."""
        return [self.head, *(f"  {label:<7}{text}" for label, text in self.rows)]


def blocks(report: Report) -> list[Block]:
    """Return one block per reason for which sites were left alone, in order of the sites."""
    left = [s for s in report.sites if s.status != "rewritten" and (s.reason or s.code)]
    return [
        _block(group)
        for group in grouped(
            left, lambda s: (s.status, s.code, s.reason, s.blocking_op, s.blocking_source or s.source)
        )
    ]


def _block(group: Sequence[SiteRecord]) -> Block:
    first = group[0]
    code = f" {first.code}" if first.code else ""
    place = first.blocking_source or first.source or "no source"
    rows = [
        ("where", f"{place} ({first.blocking_op})" if first.blocking_op else place),
        ("why", first.reason.removeprefix(f"{first.code}: ")),
    ]
    if first.advice:
        rows.append(("help", first.advice))
    return Block(first.status, f"{first.status}{code}: {names(group)}", tuple(rows))


def notes(report: Report) -> list[str]:
    """Return lines on what was recognised: names of operands, and the sizes for which each mask holds."""
    found = [s for s in report.sites if s.status != "missed"]
    named = [s for s in found if s.details.get("operands")]
    lines = [
        f"operands: {operands_text(group[0])}: {names(group)}" for group in grouped(named, operands_text)
    ]
    masked = [s for s in found if s.mask not in ("", "none") or s.conditions]
    for group in grouped(masked, validity):
        lines.append(f"mask: {validity(group[0])}: {names(group)}")
    return lines


def operands_text(site: SiteRecord) -> str:
    """Return what feeds q and k, ``q and k rms-norm, rope(half)``, '' where nothing was recognised."""
    given = site.details.get("operands") or {}
    if len(given) > 1 and len(set(given.values())) == 1:
        return f"{' and '.join(given)} {next(iter(given.values()))}"
    return "; ".join(f"{name} {text}" for name, text in given.items())


def validity(site: SiteRecord) -> str:
    """Return the sizes for which the mask's closed form was proven.

    A program that was captured at fixed lengths runs at no others, and its mask is only known to hold there.
    """
    if site.conditions:
        text = "valid where " + " and ".join(site.conditions)
    else:
        fixed = _fixed_lengths(site.spec)
        text = f"valid at the captured lengths {fixed}" if fixed else "valid for all sizes"
    return f"{text}; its dense parts are read as the model makes them" if "dense" in site.mask else text


def _fixed_lengths(spec: str) -> str:
    """Return ``64 x 64`` if a spec's text has fixed lengths of queries and keys, else ''."""
    from attnc.printer import parse

    if not spec.startswith("attn q="):
        return ""
    sq, sk = parse(spec).lengths()
    return "" if sq is None or sk is None else f"{sq} x {sk}"


def names(sites: Sequence[SiteRecord]) -> str:
    """Return the names of sites as few patterns: ``layers.*.self_attn (12 sites)``."""
    every = [s.module or s.id for s in sites]
    if len(every) == 1:
        return every[0]
    patterns = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in every))
    more = f" and {len(patterns) - NAMES} more" if len(patterns) > NAMES else ""
    return f"{', '.join(patterns[:NAMES])}{more} ({len(every)} sites)"


def grouped(sites: Sequence[SiteRecord], key: Callable[[SiteRecord], Hashable]) -> list[list[SiteRecord]]:
    """Return sites with equal keys together, in order of the first of each."""
    out: dict[Hashable, list[SiteRecord]] = {}
    for site in sites:
        out.setdefault(key(site), []).append(site)
    return list(out.values())
