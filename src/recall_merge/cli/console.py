"""What all commands share to print: the two consoles, tables, JSON, notes, errors and progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from recall_merge.runtime.errors import RecallError
from recall_merge.runtime.progress import Advance, Progress, Silent

WIDE = 10_000  # columns where nobody watches, so that no table is cut for the next program in the pipe


def out() -> Any:
    """The console for results. Brackets are a user's text, not markup."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def err() -> Any:
    """The console for everything else."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def table(*head: str, **options: Any) -> Any:
    """An empty table without borders."""
    from rich.table import Table

    return Table(*head, box=None, **options)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        err().print(f"note: {note}")


def print_error(error: RecallError) -> None:
    """Print every fault of an error, numbered if there are several."""
    for number, fault in enumerate(error.faults, start=1):
        lead = f"{number}. " if len(error.faults) > 1 else ""
        err().print(f"{lead}error: ", style="bold red", end="")
        err().print(str(fault))


def progress(quiet: bool = False) -> Progress:
    """Progress bars; none if stderr is not a terminal, or `quiet` is set."""
    return Bars() if sys.stderr.isatty() and not quiet else Silent()


class Bars:
    """Progress bars on stderr, with the amount done and the time left. Stages may overlap; each has its own bar."""

    def __init__(self) -> None:
        from rich import progress

        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), _amount(), progress.TimeRemainingColumn())
        self._bars = progress.Progress(*columns, console=err())
        self._open = 0

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        if not self._open:
            self._bars.start()
        self._open += 1
        task = self._bars.add_task(label, total=total, unit=unit)
        try:
            yield lambda done: self._bars.update(task, advance=done)
        finally:
            self._open -= 1
            if not self._open:
                self._bars.stop()
                for finished in self._bars.task_ids:  # finished bars stay on the terminal; the next ones start below them
                    self._bars.remove_task(finished)


def _amount() -> Any:
    """The column "so much of so much", in the stage's own unit."""
    from rich.filesize import decimal
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Text:
            done, total, unit = int(task.completed), int(task.total or 0), task.fields["unit"]
            words = f"{decimal(done)} of {decimal(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            return Text(words, style="progress.download")

    return Amount()
