"""Does a result still match its record?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recall_merge.errors import ResultError
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.record import verify_files


def verify(folder: Path) -> dict[str, Any]:
    """Hash every file of a result, and read its headers.

    Returns:
        The record.

    Raises:
        ResultError: with every file that is missing, changed or new.
        CheckpointError: if the folder no longer is a sound checkpoint.
    """
    if not folder.is_dir():
        raise ResultError("there is no such folder", where=folder, fix="give the folder of a result of `recall merge`")
    record = verify_files(folder)
    open_checkpoint(folder)
    return record
