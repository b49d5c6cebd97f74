"""From a workspace's folder to its page: its status, and what the page shows of the current merge."""

from __future__ import annotations

from pathlib import Path

from recall_merge.continual.keys import fingerprint
from recall_merge.continual.page import workspace_page
from recall_merge.continual.state import Model, Stage, State, found_path
from recall_merge.continual.workspace import status
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.experts import hash_file
from recall_merge.files.hub import locate
from recall_merge.files.record import RECORD
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.merge_page import MergeFacts
from recall_merge.report.page import Page
from recall_merge.report.words import Words, sample_texts
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.progress import Progress


def make_page(folder: Path, *, text: bool, cache: Path, progress: Progress) -> Page:
    """The page of a workspace.

    Args:
        text: show the texts of samples, prompts and answers, as far as they are kept.
        cache: keeps what was read from the models' weights.

    Raises:
        RunError: if nothing was learnt there yet.
    """
    now = status(folder)
    if not now.state.stages:
        raise RunError("nothing was learnt here yet", where=folder, fix=f"recall learn {folder} --task NAME --train FILE --test FILE")
    merge = None
    if now.state.head:
        stage = now.state.stages[now.state.head - 1]
        if (found_path(folder, stage.merged.path) / RECORD).is_file():
            merge = _merge_facts(folder, now.state, stage, text, cache, progress)
    return workspace_page(folder, now, merge, Words(text))


def _merge_facts(folder: Path, state: State, stage: Stage, text: bool, cache: Path, progress: Progress) -> MergeFacts:
    """What the page shows of one stage's merge."""
    merged = found_path(folder, stage.merged.path)
    record = read_json(merged / RECORD)
    lineage = {earlier.task.name: earlier for earlier in state.lineage(stage.id)}
    experts: dict[str, Path] = {}
    statistics: dict[str, Path] = {}
    lacking = ""
    for name in (entry["name"] for entry in record["run"]["experts"]):
        learnt = lineage.get(name)
        if learnt is None or (learnt.start == "last" and learnt.parent):
            lacking = f"'{name}' was not fine-tuned from the base, so its delta is not at hand"
        elif not (path := _folder(folder, learnt.expert)).is_dir():
            lacking = f"the expert '{name}' is missing"
        else:
            experts[name] = path
            if learnt.stats is not None:
                statistics[name] = found_path(folder, learnt.stats)
    tables = {}
    if not lacking:
        base = _folder(folder, state.base)
        identities = [fingerprint(path) for path in (base, *experts.values())]
        tables = anatomy(merged, Models(base, experts, statistics), cache, progress, identities=identities)
    return MergeFacts(record, open_checkpoint(merged).nbytes, tables, lacking, _texts(folder, stage) if text else {})


def _folder(folder: Path, model: Model) -> Path:
    return locate(model.path).folder if model.on_hub else found_path(folder, model.path)


def _texts(folder: Path, stage: Stage) -> dict[int, str]:
    """The texts of a stage's typical samples; none where its training rows are gone or have changed."""
    if stage.train is None or not (rows := found_path(folder, stage.train.path)).is_file() or hash_file(rows) != stage.train.sha256:
        return {}
    return sample_texts(rows, stage.samples)
