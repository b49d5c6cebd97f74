"""Where a stage's artefacts go: folders that are the workspace's own, so that a link leads nothing out of it by accident or malice.

A folder may be linked to a larger disk. There its marker says whose it is: neither another workspace nor a copy of this one writes into it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from recall_merge.continual.state import STATE
from recall_merge.files.output import OutputFolder
from recall_merge.files.ownership import claim, files_in, leftover, owned
from recall_merge.runtime.durable import PARTIAL, is_partial
from recall_merge.runtime.errors import Faults, WorkspaceError
from recall_merge.runtime.lock import HOLDER
from recall_merge.training.checkpoints import SUFFIX

KINDS = ("experts", "statistics", "merges", "scores", "samples")  # folders of what stages make
SCRATCH = "scratch"  # whole models that are made from adapters for one merge


def check_places(folder: Path, stage: int, name: str) -> None:
    """Raises WorkspaceError with all that stands where a stage of this number and name is to write, and is not the workspace's own."""
    home, faults = folder.absolute().resolve(), Faults()
    for kind in (*KINDS, SCRATCH):
        place = home / kind
        if os.path.lexists(place) and not _is_ours(home, place):
            what = f"`{kind}` is no folder of this workspace" + (", but a link to another" if place.is_symlink() else "")
            faults.add(what, where=place, fix="put the folder itself there, or link to an empty one")
    made = [home / "experts" / name, home / "merges" / str(stage)]
    for place in (*made, made[0].with_name(name + SUFFIX), home / "statistics" / name):
        if place.is_symlink():
            faults.add("a link lies where the stage is to write", where=place, fix="remove it")
    for place in made:
        with faults.collect():
            OutputFolder(place, overwrite=True).check({})
    faults.raise_any(WorkspaceError)


def claim_places(folder: Path) -> None:
    """Make the folders for artefacts, each with the marker that says whose it is."""
    home = folder.absolute().resolve()
    for place in (home / kind for kind in KINDS):
        place.mkdir(exist_ok=True)
        ours = owned(place.resolve())
        if ours is None or ours.kind != _kind(home):
            claim(place, _kind(home), whole=True, files=())


def tidy(folder: Path) -> None:
    """Remove what stops have left unfinished, and what was made for one merge only. The places are those that `check_places` has passed."""
    home = folder.absolute().resolve()
    clear_scratch(home)
    for place in [path for kind in ("experts", "merges") for path in (home / kind).glob(f"*{PARTIAL}")]:
        if (left := leftover(place)) is not None:
            left.remove()
    files = [file for kind in ("statistics", "scores", "samples") for file in files_in((home / kind).resolve()) if file.suffix == PARTIAL]
    files += [file for file in home.glob(f"*{PARTIAL}") if is_partial(file, home / STATE) or is_partial(file, home / HOLDER)]
    for file in files:
        file.unlink()


def clear_scratch(folder: Path) -> None:
    """Remove the models that were made for one merge, and the folder of them if there is nothing else in it."""
    for place in (folder / SCRATCH).glob("*"):
        if (ours := owned(place)) is not None:
            ours.remove()
    with suppress(OSError):  # there is none, or it holds what is not ours
        (folder / SCRATCH).rmdir()


def _is_ours(home: Path, place: Path) -> bool:
    if not place.is_dir() or not place.is_symlink():
        return place.is_dir()
    ours = owned(place.resolve())
    return place.name != SCRATCH and (not any(place.iterdir()) or (ours is not None and ours.kind == _kind(home)))


def _kind(home: Path) -> str:
    """What the marker of a workspace's folders says. The number of its inode is not that of any copy, and cannot be known beforehand."""
    return f"workspace {home.stat().st_ino}"
