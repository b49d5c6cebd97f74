"""Files that a stop at any instant leaves whole: those that are replaced in one step, and those that only grow."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
LEFT = f"*.{'[0-9a-f]' * 8}{PARTIAL}"  # the pattern of what stopped writers leave


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that takes the place of `path` in one step, once the block has written it: a reader sees the old file or the new one.

    Each writer gets a file of its own, so several processes may replace the same file at once. The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text in one step; it is on the disk when this returns."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def is_partial(file: Path, path: Path) -> bool:
    """Whether a file is what a stopped writer of `path` left."""
    return file.name.startswith(f"{path.name}.") and file.name.endswith(PARTIAL)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. It begins on a line of its own, even if the last writer was stopped in the middle of one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(("\n" * torn + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
