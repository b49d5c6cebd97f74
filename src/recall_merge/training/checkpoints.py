"""The folder in which a training keeps its checkpoints until the expert is written."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from recall_merge.files.checkpoint import read_json
from recall_merge.files.ownership import claim, leftover
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError, OutputError

SUFFIX = ".training.partial"  # of the folder's name, after the expert's
NOTE = "key.json"  # in the folder: the key of the training


def open_folder(folder: Path, key: str) -> Path | None:
    """Make the folder, or find its last whole checkpoint. Those of a training with another key are removed, but only from our folders."""
    note = folder / NOTE
    if os.path.lexists(folder):
        if leftover(folder) is None:
            raise OutputError("a folder that is not ours lies where checkpoints are to be kept", where=folder, fix="move it away")
        with suppress(CheckpointError):
            if read_json(note).get("key") == key:
                return _last_checkpoint(folder)
        remove_folder(folder)
    folder.mkdir(parents=True)
    claim(folder, "checkpoints")
    write_whole(note, json.dumps({"key": key}) + "\n")
    return None


def remove_folder(folder: Path) -> None:
    """Remove the folder, if it is ours. The key goes first: a folder half removed has none."""
    if (ours := leftover(folder)) is not None:
        (folder / NOTE).unlink(missing_ok=True)
        ours.remove()


def _last_checkpoint(folder: Path) -> Path | None:
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        with suppress(CheckpointError):
            read_json(checkpoint / "trainer_state.json")  # written last, so all the rest is there too
            whole.append(checkpoint)
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
