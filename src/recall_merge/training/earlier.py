"""The earlier tasks that a training protects: the input statistics of their experts, checked against the model that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.statistics import InputStatistics, check_base, open_statistics
from recall_merge.runtime.errors import CheckpointError, Faults, RunError

Earlier = Mapping[str, InputStatistics]
"""The input statistics of earlier experts, by task."""

OWN = "base"  # among them, in place of a task: the base itself, on text that it has written


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
    statistics = open_statistics(folder)
    if statistics is None:
        raise CheckpointError(f"the input statistics of '{task}' are not there", where=folder, fix="make them with `recall stats`")
    check_base(statistics, f"'{task}'", base)
    if not statistics.facts["tensors"].keys() & base.tensors.keys():
        what = f"the input statistics of '{task}' have no linear map in common with the base"
        raise CheckpointError(what, where=folder, fix="make them again with `recall stats`, on this base")
    return statistics
