"""Paths as people, and files from anywhere, write them."""

from __future__ import annotations

from pathlib import Path


def path_of(text: str | Path) -> Path:
    """`~` and `~name` are homes; where there is no such user, a name like any other."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Whether there is such a place; a name that is too long for any is none."""
    try:
        return path.exists()
    except OSError:
        return False
