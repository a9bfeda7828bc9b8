"""Show results on stdout, as tables or as JSON with ``--json``, and progress and all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnc.report.report import WIDTH, Report, SiteRecord, clip, error_text, gain_text, jsonable, way
from attnc.report.text import Block, blocks, notes

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"rewritten": "green", "kept": "yellow", "missed": "red"}


@dataclass(slots=True)
class Screen:
    """Where one command writes: ``as_json`` puts one JSON value on stdout and nothing else."""

    as_json: bool = False

    def result(self, value: Mapping[str, Any]) -> None:
        """Print the machine-readable result, if that was asked for."""
        if self.as_json:
            text = json.dumps(jsonable(value), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
            print(text, flush=True)

    def line(self, text: str) -> None:
        """Print one line for people."""
        if not self.as_json:
            _console(sys.stdout).print(text, markup=False, highlight=False, soft_wrap=True)

    def prose(self, text: str) -> None:
        """Print paragraphs for people, wrapped to the terminal."""
        if not self.as_json:
            _console(sys.stdout).print(text, markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Print one line beside the result, on stderr."""
        _console(sys.stderr).print(text, markup=False, highlight=False, soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Sequence[str] = ()
    ) -> None:
        """Print a table for people; ``styles`` has one style per row, or is empty."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for name in columns:
            table.add_column(name, overflow="fold")
        for i, row in enumerate(rows):
            table.add_row(*(Text(cell) for cell in row), style=styles[i] if styles else None)
        _print_trimmed(table)

    def report(self, report: Report) -> None:
        """Print a report: headline, table of sites, what was recognised, one block per reason, times."""
        self.line(report.headline())
        rows = [_cells(site) for site in report.sites]
        if rows:
            heads = ("module", "computes", "runs as", "contract", "error/limit", "gain")
            self.table(heads, rows, [STYLES[s.status] for s in report.sites])
        for note in notes(report):
            self.line(note)
        for block in blocks(report):
            self.block(block)
        for line in str(report).splitlines()[1:]:
            if line.lstrip().startswith(("linears:", "whole model:", "time:")):
                self.line(line.strip())
        for warning in report.warnings:
            self.note(f"warning: {warning}")

    def block(self, block: Block) -> None:
        """Print why sites were left alone: a heading, then labelled rows wrapped to the terminal."""
        if self.as_json:
            return
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for label, text in block.rows:
            grid.add_row(label, Text(text))
        _console(sys.stdout).print(Text(block.head, style=STYLES[block.status]), soft_wrap=True)
        _print_trimmed(Padding(grid, (0, 0, 0, 2), expand=False))

    @contextmanager
    def working(self, title: str) -> Iterator[Progress]:
        """Show a spinner and the time gone by while the block runs; nothing where stderr is no terminal."""
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
        )
        console = _console(sys.stderr)
        with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            yield Progress(bars, bars.add_task(title, total=None), title)


@dataclass(slots=True)
class Progress:
    """One running task.  Call it with the name of a stage and, where known, steps done and their total."""

    bars: Any
    task: Any
    title: str

    def __call__(self, stage: str, done: float | None = None, total: float | None = None) -> None:
        """Show that ``stage`` runs now."""
        self.bars.update(self.task, description=f"{self.title}: {stage}", completed=done or 0, total=total)


def _cells(site: SiteRecord) -> tuple[str, ...]:
    name = clip(site.module or site.id, 36)
    return name, site.summary, way(site), site.contract, error_text(site), gain_text(site)


def _print_trimmed(shown: Any) -> None:
    """Print a table, without blanks at the ends of lines where there is no terminal."""
    console = _console(sys.stdout)
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as captured:
        console.print(shown)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _console(stream: Any) -> Console:
    """Make a console at the moment of writing, so that a redirected stream is seen.

    It has 110 columns where there is no terminal.
    """
    from rich.console import Console

    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=WIDTH)
