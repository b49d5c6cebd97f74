"""Whose folder is it? A folder that is made here holds a marker with the list of its files; only what is on such a list is ever deleted.

The marker is a sealed JSON file with our name and format, and no link. A folder without one is never emptied, moved or replaced.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recall_merge.files.record import LATER
from recall_merge.runtime.durable import is_partial, write_whole
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.sealed import read_sealed, sealed

MARKER = ".recall-merge"
MADE_BY, FORMAT = "recall-merge", 1
UNLISTED = (*LATER, ".DS_Store")  # ours although they come later, or of no worth to anybody


@dataclass(frozen=True)
class Owned:
    """A folder of ours.

    Attributes:
        kind: what it is: `model`, `report`, ...
        whole: it is finished and stands in its place; otherwise it is what a stop left over.
        files: names of its files, relative to it; None while it is being written: it was made empty, so all that is in it is ours.
    """

    folder: Path
    kind: str
    whole: bool = False
    files: frozenset[str] | None = None

    def others(self) -> list[str]:
        """The files in it that are not ours."""
        names = () if self.files is None else (_name(path, self.folder) for path in files_in(self.folder) if not self._is_marker(path))
        return sorted(name for name in names if name not in (self.files or ()) and name not in UNLISTED)

    def clear(self) -> list[str]:
        """Delete what is ours in it, but not the marker.    -> `others`, which stay"""
        others = self.others()
        for path in files_in(self.folder):
            if path != self.folder / MARKER and _name(path, self.folder) not in others:
                path.unlink()
        for place, _, _ in os.walk(self.folder, topdown=False):
            if Path(place) != self.folder:
                with suppress(OSError):  # it holds what is not ours
                    Path(place).rmdir()
        return others

    def remove(self) -> list[str]:
        """Delete what is ours, and the folder if that is all. The marker goes last: what a stop leaves is still ours.    -> `others`"""
        if others := self.clear():
            return others
        (self.folder / MARKER).unlink(missing_ok=True)
        self.folder.rmdir()
        return []

    def _is_marker(self, path: Path) -> bool:
        return path.parent == self.folder and (path.name == MARKER or is_partial(path, self.folder / MARKER))


def claim(folder: Path, kind: str, *, whole: bool = False, files: Collection[str] | None = None) -> Owned:
    """Write the marker of a folder, in one step."""
    listed = None if files is None else sorted(files)
    write_whole(folder / MARKER, sealed({"made_by": MADE_BY, "format": FORMAT, "kind": kind, "whole": whole, "files": listed}))
    return Owned(folder, kind, whole, None if files is None else frozenset(files))


def owned(folder: Path) -> Owned | None:
    """A folder, if its marker says that it is ours."""
    marker = folder / MARKER
    if folder.is_symlink() or marker.is_symlink() or not marker.is_file():
        return None
    try:
        content = read_sealed(marker)
    except CheckpointError:
        return None
    kind, whole, files = (content.get(key) for key in ("kind", "whole", "files"))
    if (content.get("made_by"), content.get("format")) != (MADE_BY, FORMAT) or not isinstance(kind, str) or not isinstance(whole, bool):
        return None
    if files is None:
        return Owned(folder, kind) if not whole else None
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        return None
    return Owned(folder, kind, whole, frozenset(files))


def leftover(folder: Path) -> Owned | None:
    """A folder, if a stop left it over and all that is in it is ours; an empty one counts."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    if all(is_partial(path, folder / MARKER) for path in folder.iterdir()):  # a stop came before the marker
        return Owned(folder, "")
    ours = owned(folder)
    return ours if ours is not None and not ours.whole and not ours.others() else None


def files_in(folder: Path) -> Iterator[Path]:
    """All files in and below a folder. Links are files, and lead nowhere."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*files, *(name for name in folders if Path(place, name).is_symlink())))


def names_in(folder: Path) -> list[str]:
    """The names of all files in a folder and below it, as markers list them; without the marker."""
    return sorted(_name(path, folder) for path in files_in(folder) if path != folder / MARKER)


def _name(path: Path, folder: Path) -> str:
    """A file's name below the folder, as text whatever its bytes."""
    return path.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode()
