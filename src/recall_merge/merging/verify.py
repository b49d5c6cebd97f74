"""Whether a result still matches its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.record import verify_files
from recall_merge.files.safetensors import read_header
from recall_merge.runtime.errors import ResultError


def verify(folder: Path) -> dict[str, Any]:
    """Hash every file of a result, or of an expert that `recall learn` trained, and read its headers. Every byte is read.

    Returns:
        The record.

    Raises:
        ResultError: with every file that is missing, changed or new.
        CheckpointError: if the folder is no sound checkpoint any more.
    """
    if not folder.is_dir():
        raise ResultError("there is no such folder", where=folder, fix="give the folder of a result of `recall merge`")
    record = verify_files(folder)
    if is_adapter(folder):
        read_json(folder / CONFIG)
        read_header(folder / WEIGHTS)
    else:
        open_checkpoint(folder)
    return record
