"""One command at a time: a lock on a file or folder that the system takes back when its holder ends, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from recall_merge.runtime.errors import RecallError, WorkspaceError

PATIENCE = 0.2  # seconds: `holder` takes the lock for an instant to see if it is free


@contextmanager
def lock(path: Path, command: str, *, what: str = "the workspace", error: type[RecallError] = WorkspaceError) -> Iterator[None]:
    """Hold the lock file at `path` while `command` works on `what`; the file stays, empty, when the lock is given back.

    Raises an `error` that names the holder, if another process holds it.
    """
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        if not _take(file):
            raise error(f"{what} is in use by {_read_holder(file)}", where=path.parent, fix="wait until it has ended, or end it")
        file.truncate(0)
        file.write(f"process {os.getpid()}, `{command}`, since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(path: Path) -> str | None:
    """The process that holds a lock now, as it described itself, or None."""
    if not path.exists():
        return None
    with path.open("r", encoding="utf-8", errors="replace") as file:
        return None if _take(file) else _read_holder(file)


def take_lock(descriptor: int) -> bool:
    """Lock an open file or folder; False if another process holds it."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


def _take(file: IO[str]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (taken := take_lock(file.fileno())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return taken


def _read_holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"
