"""What all commands share to print: the two consoles, tables, JSON, notes, errors and progress bars.

Everything that is printed passes `printable`: names and texts come from files of other people, and a terminal obeys what it is sent.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from recall_merge.runtime.errors import Fault, RecallError
from recall_merge.runtime.progress import Advance, Progress, Silent

if TYPE_CHECKING:
    from recall_merge.evaluation.gate import Decision

FAILS = 3  # the exit status where the work is done, and a condition on its scores does not hold
WIDE = 10_000  # columns where nobody watches, so that no table is cut for the next program in the pipe
UNPRINTABLE = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Control characters but the end of a line, those that turn the direction of text, and halves of characters."""


def printable(text: str) -> str:
    """A text without what a terminal obeys: escape sequences, returns, and turns of direction.

    >>> printable("\\x1b]0;title\\x07 a\\u202eb\\r")
    '·]0;title· a·b·'
    """
    return UNPRINTABLE.sub("·", text)


def out() -> Any:
    """The console for results. Brackets are a user's text, not markup."""
    console = _console(stderr=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def err() -> Any:
    """The console for everything else."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Any:
    from rich.console import Console

    class PrintableConsole(Console):
        def render_str(self, text: str, **options: Any) -> Any:  # before columns are measured
            return super().render_str(printable(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Any:  # whatever else is drawn, such as bars
            for part in super().render(renderable, options):
                yield part if part.control else part._replace(text=printable(part.text))

    return PrintableConsole(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


def table(*head: str, **options: Any) -> Any:
    """An empty table without borders."""
    from rich.table import Table

    return Table(*head, box=None, **options)


def print_json(value: Any) -> None:
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)  # JSON has neither NaN nor infinity
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))  # noqa: T201


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        err().print(f"note: {note}")


def print_decisions(decisions: Sequence[Decision]) -> None:
    """Each condition on scores and whether it holds, with the interval that says how sure that is."""
    for decision in decisions:
        out().print(f"{'holds' if decision.holds else 'fails'}: {decision.words}")


def leave_unless(decisions: Sequence[Decision]) -> None:
    """Leave the command with the exit status of a condition that fails, if one does."""
    import typer

    if not all(decision.holds for decision in decisions):
        raise typer.Exit(FAILS)


def print_error(error: RecallError) -> None:
    """Print every fault of an error, numbered if there are several. Each part is one line, whatever a name in it holds."""
    faults = [Fault(*(" ".join(part.splitlines()) for part in (fault.what, fault.where, fault.fix))) for fault in error.faults]
    for number, fault in enumerate(faults, start=1):
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

        columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), _amount(), progress.TimeRemainingColumn())
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
