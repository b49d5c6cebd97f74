"""Links in a model's folder lead out of it only within the hub's cache: what lies elsewhere does not come into a result."""

from __future__ import annotations

import os
from pathlib import Path

from recall_merge.runtime.errors import CheckpointError, Faults

TEMPLATES = "additional_chat_templates"
FOLLOWED = (".safetensors", ".index.json")  # read as weights, never copied


def check_links(folder: Path) -> None:
    """Raises CheckpointError with every link to a file outside the folder; of the hub's cache, outside the cache of that model.

    Weights may lie on another disk: what is read from them must be in the format of weights.
    """
    home, faults = Path(os.path.realpath(folder)), Faults()  # subtle: unlike `resolve`, it takes links that lead to themselves
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent
    below = [*(folder / TEMPLATES).iterdir()] if (folder / TEMPLATES).is_dir() else []
    for file in sorted([*folder.iterdir(), *below] if folder.is_dir() else []):
        copied = file.name == TEMPLATES or not (file.is_dir() or file.name.startswith(".") or file.name.endswith(FOLLOWED))
        if copied and file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(home):
            what = f"'{file.name}' is a link to a file outside the model's folder"
            faults.add(what, where=file, fix="put the file itself there, if it belongs to the model; else do not use this model")
    faults.raise_any(CheckpointError)
