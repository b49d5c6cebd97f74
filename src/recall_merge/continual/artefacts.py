"""The folders in which a stage leaves its artefacts, and what stops leave there."""

from __future__ import annotations

import shutil
from pathlib import Path

from recall_merge.files.checkpoint import read_json
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import RECORD
from recall_merge.runtime.errors import CheckpointError

KINDS = ("experts", "merges", "scores")  # of artefacts that are first made beside their place
SCRATCH = "scratch"  # whole models that are made from adapters for one merge
KEY = "key.json"
TRAVELS = (".json", ".safetensors", ".txt", ".jinja", ".model")  # of a given adapter's folder


def tidy(workspace: Path) -> None:
    """Remove what stops have left unfinished, and what was made for one merge alone."""
    shutil.rmtree(workspace / SCRATCH, ignore_errors=True)
    for kind in KINDS:
        for partial in (workspace / kind).glob("*.partial"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()


def make_way(target: Path) -> None:
    """Remove, where an expert is to be trained, a given expert of a stage that was given up: training would take it for a stranger's."""
    if target.exists() and not (target / RECORD).exists():
        shutil.rmtree(target)


def key_in(folder: Path) -> str | None:
    """The key under which a folder was made; None if it does not say."""
    try:
        return read_json(folder / KEY).get("key")
    except CheckpointError:
        return None


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter, with its tokenizer and statistics if it has them, in one step; never a pickle, and no record of another folder."""
    with OutputFolder(target, overwrite=True) as out:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in TRAVELS and file.name != RECORD:
                shutil.copyfile(file, out.path / file.name)
        out.commit()
