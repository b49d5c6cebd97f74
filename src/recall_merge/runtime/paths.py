"""Paths as they are written in files and on the command line."""

from __future__ import annotations

from pathlib import Path

from recall_merge.runtime.errors import RunError, short


def path_of(text: str | Path) -> Path:
    """The path of a text; `~` and `~name` mean homes, unless there is no such user. Raises RunError if it has a NUL."""
    if "\0" in str(text):  # which the functions of the system refuse with errors of their own
        raise RunError("a path has a NUL character", where=short(str(text)), fix="write it without")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Whether a path exists; False for a name that is too long for the file system."""
    try:
        return path.exists()
    except OSError:
        return False
