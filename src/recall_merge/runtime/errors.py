"""What goes wrong, said so that a person can mend it: one tree of errors, each a list of faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: what it is, where it stands, and how to mend it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class RecallError(Exception):
    """Base of every error that this package raises on purpose. `faults` holds at least one `Fault`.

    >>> print(RecallError("no rows", where="a.jsonl", fix="add some"))
    no rows
      where: a.jsonl
      fix: add some
    """

    def __init__(self, what: str | Iterable[Fault], *, where: object = "", fix: str = "") -> None:
        self.faults: tuple[Fault, ...] = (Fault(what, str(where), fix),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.faults)  # so that it comes whole from another process


def _again(kind: type[RecallError], faults: tuple[Fault, ...]) -> RecallError:
    error = kind.__new__(kind)
    RecallError.__init__(error, faults)
    return error


class RunError(RecallError):
    """The description of the work is wrong: an unknown key, method or option, or a value out of range."""


class CheckpointError(RecallError):
    """A model's files are missing, damaged, or do not fit the others."""


class DataError(RecallError):
    """Rows cannot be read or lack what is needed."""


class OutputError(RecallError):
    """The result cannot be written where it was asked for."""


class Unwalkable(CheckpointError):
    """A model whose forward pass is no walk from block to block: it can be run as a whole only."""


class ResultError(RecallError):
    """A result does not pass its checks, or no longer matches its record."""


class WorkspaceError(RecallError):
    """A workspace is none, is damaged or in use, or does not allow what was asked of it."""


class EngineError(RecallError):
    """The machines that tasks should run on cannot be reached, cannot hold them, or lost them again and again."""


class MissingExtra(RecallError):
    """A command needs an optional part of the package that is not installed."""

    def __init__(self, extra: str, what_for: str) -> None:
        super().__init__(f"{what_for} needs packages that are not installed", fix=f"pip install 'recall-merge[{extra}]'")


class Faults:
    """Collects faults over many checks, so that all of them are reported at once.

    >>> faults = Faults()
    >>> with faults.collect():
    ...     raise DataError("no rows")
    >>> [fault.what for fault in faults]
    ['no rows']
    """

    def __init__(self) -> None:
        self._found: list[Fault] = []
        self._first_type: type[RecallError] | None = None

    def add(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.extend([Fault(what, str(where), fix)])

    def extend(self, faults: Iterable[Fault]) -> None:
        self._found += [fault for fault in faults if fault not in self._found]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the faults of a `RecallError` raised inside, and go on after the block."""
        try:
            yield
        except RecallError as error:
            self._first_type = self._first_type or type(error)
            self.extend(error.faults)

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_any(self, kind: type[RecallError] | None = None) -> None:
        """Raise all that was found as one error; of `kind`, or of the type of the first error collected."""
        if self._found:
            raise (kind or self._first_type or RecallError)(self._found)


def short(value: object) -> str:
    """A value as an error shows it, however long it is.

    >>> short("x" * 1000) == repr("x" * 98 + "..." + "x" * 99)
    True
    """
    import reprlib

    form = reprlib.Repr()
    form.maxstring = form.maxother = form.maxlong = 202
    form.maxlist = form.maxdict = 10
    return form.repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt word, with what is known.

    >>> did_you_mean("lineer", ["linear", "ties"])
    "did you mean 'linear'? known: linear, ties"
    """
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(word, names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"known: {', '.join(names)}"
