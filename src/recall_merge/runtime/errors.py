"""The errors of this package: one tree, each a list of faults that say what is wrong, where, and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: what it is, where it is, and how to fix it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        details = {"where": self.where, "fix": self.fix}
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in details.items() if text)])


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
        return _rebuild, (type(self), self.faults)  # so that it arrives whole from another process


def _rebuild(kind: type[RecallError], faults: tuple[Fault, ...]) -> RecallError:
    error = kind.__new__(kind)
    RecallError.__init__(error, faults)
    return error


class RunError(RecallError):
    """A run or a setting is wrong: an unknown key, method or option, or a value out of range.

    `rest` is what was read where unknown keys are the only fault: the same without them, or with the known ones that they resemble.
    """

    rest: Any = None


class CheckpointError(RecallError):
    """A model's files are missing, damaged, or do not fit the others."""


class DataError(RecallError):
    """Rows cannot be read, or lack a field."""


class OutputError(RecallError):
    """A result cannot be written to its folder, or pushed to a repository."""


class NotLayerwise(CheckpointError):
    """A model's forward pass does not go block by block: the model can only be run as a whole."""


class ResultError(RecallError):
    """A result fails its checks, or no longer matches its record."""


class WorkspaceError(RecallError):
    """A folder is no workspace, or a workspace is damaged, in use, or does not allow a command."""


class ExecutorError(RecallError):
    """The machines of an executor cannot be reached, are too small for a task, or lost it repeatedly."""


class MissingExtra(RecallError):
    """A command needs an extra that is not installed."""

    def __init__(self, extra: str, what_for: str) -> None:
        super().__init__(f"{what_for} needs packages that are not installed", fix=f"pip install 'recall-merge[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this process could not have the memory that it asked for. Torch, the loader of libraries, threads and the interpreter say so
    in their ways."""
    words = ("allocate memory", "bad_alloc", "start new thread", "failed to map segment", "without exception set", "without setting an exc")
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or any(word in str(error) for word in words)


class Faults:
    """Collects the faults of many checks, so that all are reported at once.

    >>> faults = Faults()
    >>> with faults.collect():
    ...     raise DataError("no rows")
    >>> [fault.what for fault in faults]
    ['no rows']
    """

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._first_type: type[RecallError] | None = None

    def add(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.extend([Fault(what, str(where), fix)])

    def extend(self, faults: Iterable[Fault]) -> None:
        self._faults += [fault for fault in faults if fault not in self._faults]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the faults of a `RecallError` raised inside the block, and go on after it."""
        try:
            yield
        except RecallError as error:
            self._first_type = self._first_type or type(error)
            self.extend(error.faults)

    def attempt(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
        """What a function returns; None where its faults were collected instead."""
        with self.collect():
            return function(*args, **options)
        return None

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults)

    def __len__(self) -> int:
        return len(self._faults)

    def raise_any(self, kind: type[RecallError] | None = None) -> None:
        """Raise all faults as one error; of `kind`, or of the type of the first error collected."""
        if self._faults:
            raise (kind or self._first_type or RecallError)(self._faults)


def short(value: object) -> str:
    """A value as an error shows it, shortened if it is long.

    >>> short("x" * 1000) == repr("x" * 98 + "..." + "x" * 99)
    True
    """
    form = Repr()
    form.maxstring = form.maxother = form.maxlong = 202
    form.maxlist = form.maxdict = 10
    return form.repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt word, and the list of known words.

    >>> did_you_mean("lineer", ["linear", "ties"])
    "did you mean 'linear'? known: linear, ties"
    """
    names = list(known)
    close = get_close_matches(word, names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"known: {', '.join(names)}"
