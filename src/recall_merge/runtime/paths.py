"""Paths as they are written in files and on the command line."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from recall_merge.runtime.errors import RunError, short


def path_of(text: str | Path) -> Path:
    """The path of a text; `~` and `~name` mean homes, unless there is no such user.

    Raises RunError if it has a NUL, if links lead in a circle, or if it, or where its links lead, is no text: records and other libraries
    could not name it.
    """
    if "\0" in str(text):  # which the functions of the system refuse with errors of their own
        raise RunError("a path has a NUL character", where=short(str(text)), fix="write it without")
    path = Path(text)
    with suppress(RuntimeError):
        path = path.expanduser()
    check_text(str(path))
    try:
        check_text(os.path.realpath(path))
        path.stat()
    except OSError as error:  # whoever uses the path says the others in their own words
        if error.errno == errno.ELOOP:
            raise RunError("links lead in a circle", where=path, fix="check where the links on this path lead") from None
    return path


def check_text(name: str) -> None:
    """Raises RunError for a name in bytes that are no UTF-8, which Python holds as halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RunError("a name is not valid UTF-8", where=short(os.fsencode(name)), fix="rename the file or folder") from None


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
