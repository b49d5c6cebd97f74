"""One command at a time: a lock on a folder, which cannot be deleted unnoticed, and which the system takes back when its holder ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError, RecallError, WorkspaceError
from recall_merge.runtime.safe_json import read_small

HOLDER = "lock"  # in the folder: what the holder says of itself; nothing depends on it
PATIENCE = 0.2  # seconds: `holder` takes the lock for an instant to see if it is free


@contextmanager
def lock(folder: Path, command: str, *, what: str = "the workspace", error: type[RecallError] = WorkspaceError) -> Iterator[None]:
    """Hold the lock of a folder while `command` works on `what`. Raises an `error` that names the holder, if another process holds it."""
    with _opened(folder) as descriptor:
        if not _take(descriptor):
            raise error(f"{what} is in use by {_read_holder(folder)}", where=folder, fix="wait until it has ended, or end it")
        write_whole(folder / HOLDER, f"process {os.getpid()}, `{command}`, since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}")
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may be gone
                (folder / HOLDER).unlink()


def holder(folder: Path) -> str | None:
    """The process that holds a folder's lock now, as it described itself, or None."""
    with _opened(folder) as descriptor:
        return None if _take(descriptor) else _read_holder(folder)


def take_lock(descriptor: int) -> bool:
    """Lock an open file or folder; False if another process holds it."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (taken := take_lock(descriptor)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return taken


def _read_holder(folder: Path) -> str:
    with suppress(CheckpointError):
        return read_small(folder / HOLDER)[:500].decode("utf-8", "replace")
    return "another process"
