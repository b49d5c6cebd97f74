"""The earlier tasks that a training protects: the input statistics of their experts, checked against the model that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.statistics import InputStatistics, open_statistics
from recall_merge.runtime.errors import CheckpointError, Faults, RunError

Earlier = Mapping[str, InputStatistics]
"""The input statistics of earlier experts, by task."""


def open_earlier(folders: Mapping[str, Path], base: Checkpoint) -> dict[str, InputStatistics]:
    """Input statistics by task, in the folders given.

    Raises RunError with every fault: none there, damaged, of another base than `base`, of other shapes, or of none of its maps.
    """
    found, faults = dict[str, InputStatistics](), Faults()
    for task, folder in folders.items():
        with faults.collect():
            found[task] = _checked(task, folder, base)
    faults.raise_any(RunError)
    return found


def _checked(task: str, folder: Path, base: Checkpoint) -> InputStatistics:
    statistics, whose, fix = (
        open_statistics(folder),
        f"the input statistics of '{task}'",
        "make them again with `recall stats`, on this base",
    )
    if statistics is None:
        raise CheckpointError(f"{whose} are not there", where=folder, fix="make them with `recall stats`")
    if statistics.facts.get("base", base.fingerprint) != base.fingerprint:
        raise CheckpointError(f"{whose} were made on another base", where=folder, fix=fix)
    if misfits := statistics.misfits(base.specs):
        raise CheckpointError(f"{whose} do not fit the inputs of '{misfits[0]}'", where=folder, fix=fix)
    if not statistics.facts["tensors"].keys() & base.tensors.keys():
        raise CheckpointError(f"{whose} have no linear map in common with the base", where=folder, fix=fix)
    return statistics
