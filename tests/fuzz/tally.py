"""Counts of many outcomes: what was recognized and lifted, by axis value, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.fuzz.axes import AXES
from tests.fuzz.check import Outcome

Rate = tuple[int, int]


@dataclass
class Tally:
    """Outcomes, counted as they come. Positives are programs without a near miss."""

    graphs: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    near: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    all: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    masked: Counter[tuple[str, str]] = field(default_factory=Counter)
    lifted: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count outcomes."""
        for o in outcomes:
            self.graphs += 1
            self.verdicts[o.verdict] += 1
            if o.failed:
                self.failures.append(o)
            values = [("", ""), *((f.name, value) for f, value in o.spelling.choices())]
            if o.spelling.near_miss != "none":
                self.near[o.verdict] += 1
                continue
            self.all.update(values)
            if o.recognized:
                self.seen.update(values)
            else:
                self.codes[" ".join(o.misses) or "nothing found, nothing said"] += 1
            if o.lifted is not None:
                self.masked.update(values)
                self.lifted.update(values if o.lifted else [])

    @property
    def recognized(self) -> Rate:
        """Recognized positives, positives."""
        return self.seen["", ""], self.all["", ""]

    def __str__(self) -> str:
        masks = self.lifted["", ""], self.masked["", ""]
        lines = [
            f"{self.graphs} graphs: {_words(self.verdicts)}",
            f"positives recognized: {_rate(*self.recognized)}; masks in closed form: {_rate(*masks)}",
            f"near misses: {_words(self.near)}",
            f"positives not recognized: {_words(self.codes) or 'none'}",
            "",
            "recognized / lifted, by value of each axis (only what is below 100 %)",
        ]
        for name, f in AXES.items():
            short = []
            for value in f.metadata["values"]:
                at = name, value
                if (self.seen[at], self.lifted[at]) != (self.all[at], self.masked[at]):
                    short.append(
                        f"{value} {_percent(self.seen[at], self.all[at])}"
                        f"/{_percent(self.lifted[at], self.masked[at])}"
                    )
            if short:
                lines.append(f"  {name}: {', '.join(short)}")
        return "\n".join(lines)


def _rate(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / max(whole, 1):.2f} %)"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "-"


def _words(c: Counter[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in c.most_common())
