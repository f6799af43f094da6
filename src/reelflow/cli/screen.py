"""What the user sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from reelflow.cli.ranks import first

Report = Callable[[str, float], None]
"""Called with a phase and the share of it that is done, 0 … 1."""


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def tell(message: str) -> None:
    """One line on stderr, never broken."""
    print(message, file=sys.stderr, flush=True)


class Screen:
    """Progress while a command runs, and its result at the end.

    json: the result as one JSON line instead of words.  quiet: no progress.
    """

    def __init__(self, json: bool = False, quiet: bool = False):
        self.json = json
        self.console = Console(stderr=True)
        self.live = first() and not quiet and self.console.is_terminal and (not json or sys.stdout.isatty())

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Phase, percent, time so far and time left, on a terminal; gone when the work is done."""
        if not self.live:
            yield lambda phase, share: None
            return
        columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True) as bar:
            phases: dict[str, TaskID] = {}

            def report(phase: str, share: float) -> None:
                if phase not in phases:
                    for done in phases.values():
                        bar.update(done, visible=False)
                    phases[phase] = bar.add_task(phase, total=1.0)
                bar.update(phases[phase], completed=share, visible=True)

            yield report

    def result(self, values: Mapping[str, Any], words: str) -> None:
        """The result: `values` as one line of JSON, or `words`; of several processes the first one's."""
        if first():
            print(json.dumps(values, ensure_ascii=False, default=str) if self.json else words, flush=True)

    def table(self, values: Any, title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
        """A table: `values` as one line of JSON, or the rows for reading."""
        if self.json or not first():
            self.result(values, "")
            return
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(str, row))
        Console().print(table, markup=False)
