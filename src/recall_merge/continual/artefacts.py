"""The folders in which a stage leaves its artefacts, and what a stop may leave there."""

from __future__ import annotations

import shutil
from pathlib import Path

from recall_merge.continual.state import STATE
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import RECORD

KINDS = ("experts", "statistics", "merges", "scores", "samples")  # folders of artefacts
SCRATCH = "scratch"  # whole models that are made from adapters for one merge
ADAPTER_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model")  # that are copied; never a pickle


def tidy(workspace: Path) -> None:
    """Remove what stops have left unfinished, and what was made for one merge only."""
    shutil.rmtree(workspace / SCRATCH, ignore_errors=True)
    partials = [partial for kind in KINDS for partial in (workspace / kind).rglob("*.partial")]
    for partial in (*partials, *workspace.glob(f"{STATE}*.partial")):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)  # it may have lain in a folder that is gone


def remove_given(folder: Path) -> None:
    """Remove a copied adapter of a stage that was given up. It has no record, so training would refuse to replace it."""
    if folder.exists() and not (folder / RECORD).exists():
        shutil.rmtree(folder)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter, with its tokenizer and statistics if it has them, in one step. A record stays behind: it is of the other folder."""
    with OutputFolder(target, overwrite=True) as out:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in ADAPTER_FILES and file.name != RECORD:
                shutil.copyfile(file, out.path / file.name)
        out.commit()
