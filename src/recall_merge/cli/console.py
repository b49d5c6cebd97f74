"""What commands share: the two consoles, progress bars, and how errors end a command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recall_merge.runtime.errors import RecallError
from recall_merge.runtime.progress import Advance, Progress, Silent

WIDE = 10_000  # columns where nobody watches: no table is cut for the next program in the pipe


def out() -> Any:
    """Where results are printed. What is in brackets is a user's, and no markup."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def err() -> Any:
    """Where everything else is printed."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class Bars:
    """Progress as bars on stderr, with the amount done and the time left. Stages may overlap: each has a bar."""

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
                for done in self._bars.task_ids:  # the bars stay on the terminal; the next ones begin below them
                    self._bars.remove_task(done)


def _amount() -> Any:
    """How much is done of how much, in the stage's own unit."""
    from rich.filesize import decimal
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Text:
            done, total, unit = int(task.completed), int(task.total or 0), task.fields["unit"]
            words = f"{decimal(done)} of {decimal(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            return Text(words, style="progress.download")

    return Amount()


def progress(quiet: bool = False) -> Progress:
    """Bars if somebody watches, silence if stderr is no terminal or quiet was asked for."""
    return Bars() if sys.stderr.isatty() and not quiet else Silent()


def report(error: RecallError) -> None:
    """Print every fault of an error, numbered where there is more than one."""
    console = err()
    for number, fault in enumerate(error.faults, start=1):
        lead = f"{number}. " if len(error.faults) > 1 else ""
        console.print(f"[bold red]{lead}error:[/] ", end="")
        console.print(str(fault), markup=False)
