"""The page of a result: finds its models, measures their deltas, and reads the texts of its samples if they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_merge.files.hashing import hash_file
from recall_merge.files.hub import Located
from recall_merge.merging.result import Result, check_model, find_models, open_result
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.merge_page import MergeFacts, merge_page
from recall_merge.report.page import Page
from recall_merge.report.words import sample_texts
from recall_merge.runtime.errors import RecallError, ResultError, RunError
from recall_merge.runtime.progress import Progress


def result_page(folder: Path, *, text: bool, samples: Path | None, models: Mapping[str, str], cache: Path, progress: Progress) -> Page:
    """The page of a result.

    Args:
        text: show the texts of the typical samples.
        samples: the rows that they were chosen from.
        models: where 'base' and experts are, if not where the record says.
        cache: keeps what was read from the models' weights.

    Raises:
        RecallError: if the result, or a file or model given for it, is not what the record says.
    """
    result = open_result(folder)
    tables: Mapping[str, Any] = {}
    lacking = ""
    try:
        located = find_models(result, ["base", *result.experts], models)
    except RecallError as error:
        if models:
            raise
        lacking = f"{error.faults[0].what}; {', '.join(fault.fix for fault in error.faults)} to see them"
    else:
        folders = {name: place.folder for name, place in located.items() if isinstance(place, Located)}
        for name, path in folders.items():
            check_model(result, name, path)
        experts = {name: folders[name] for name in result.experts}
        tables = anatomy(folder, Models(folders["base"], experts, _statistics_folders(result, experts)), cache, progress)
    texts = _texts(result, samples) if text and result.record["samples"] else {}
    facts = MergeFacts(result.record, result.checkpoint.nbytes, tables, lacking, texts)
    return merge_page(facts, folder.absolute().resolve().name)


def _statistics_folders(result: Result, experts: Mapping[str, Path]) -> dict[str, Path]:
    """Where an expert's input statistics may be: in the folder that the run names, or else in the expert's own."""
    named = {entry["name"]: Path(entry["stats"]) for entry in result.run["experts"] if entry.get("stats")}
    return {**experts, **{name: path for name, path in named.items() if path.is_dir()}}


def _texts(result: Result, samples: Path | None) -> dict[int, str]:
    if samples is None:
        fix = "give --samples FILE, or leave out --text"
        raise RunError("a result does not keep the texts of its samples", where=result.folder, fix=fix)
    if hash_file(samples) != result.record["rows_sha256"]:
        raise ResultError("these are not the rows that the samples were chosen from", where=samples, fix="give the run's own file")
    return sample_texts(samples, {sample["row"] for sample in result.record["samples"]})
