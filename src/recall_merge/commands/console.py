"""What commands share: the two consoles, progress bars, and how errors end a command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recall_merge.errors import RecallError
from recall_merge.progress import Advance, Progress, Silent


def out() -> Any:
    """Where results are printed."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def err() -> Any:
    """Where everything else is printed."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class Bars:
    """Progress as bars on stderr, with the amount done, its rate and the time left."""

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        from rich import progress

        amount = progress.DownloadColumn() if unit == "bytes" else progress.TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount, progress.TimeRemainingColumn())
        with progress.Progress(*columns, console=err(), transient=False) as bars:
            task = bars.add_task(label, total=total)
            yield lambda done: bars.update(task, advance=done)


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
