"""One command at a time: a lock that the system takes back when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from recall_merge.runtime.errors import WorkspaceError

PATIENCE = 0.2  # seconds: `holder` takes the lock for an instant to see if it is free


@dataclass(frozen=True)
class Holder:
    """Who has a lock."""

    pid: int
    command: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid}, `{self.command}`, since {self.since}"


@contextmanager
def lock(path: Path, command: str) -> Iterator[None]:
    """Hold the lock file at `path`; it stays, empty, when the lock is given back.

    Raises:
        WorkspaceError: if another has it, naming who.
    """
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + PATIENCE
        while not _take(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                who = _read(file) or "another process"
                raise WorkspaceError(f"the workspace is in use by {who}", where=path.parent, fix="wait until it has ended, or end it")
            time.sleep(0.01)
        file.truncate(0)
        json.dump(asdict(Holder(os.getpid(), command, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))), file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(path: Path) -> Holder | None:
    """Who holds a lock now; None if nobody does."""
    if not path.exists():
        return None
    with path.open("r", encoding="utf-8") as file:
        return None if _take(file, fcntl.LOCK_SH) else _read(file) or Holder(0, "unknown", "just now")


def _take(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> Holder | None:
    """What the holder wrote; None where it has not finished writing."""
    file.seek(0)
    try:
        return Holder(**json.load(file))
    except (ValueError, TypeError):
        return None
