"""Paths as they are written in files and on the command line."""

from __future__ import annotations

import os
import re
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


def is_mount(path: Path) -> bool:
    """Whether a disk, or a folder of another place, is mounted here: what lies here cannot be renamed or replaced as a whole."""
    if os.path.ismount(path):
        return True
    try:  # a folder of the same disk, as containers mount them, which the system tells of in this file alone
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    mounted = (re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(path) in mounted
