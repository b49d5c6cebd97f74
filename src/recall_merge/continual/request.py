"""A stage as it is asked for, and the stage that it makes of a workspace's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_merge.continual.state import DataFile, Model, StageSpec, Start, State, Task, stored_path
from recall_merge.evaluation.tasks import task_word
from recall_merge.runtime.paths import exists, path_of


@dataclass(frozen=True)
class Request:
    """A stage as it is asked for.

    Attributes:
        task: its name, everywhere.
        train, test: files of rows. `train` may be left out where an expert is given and the method compares no representations.
        start: what the expert is fine-tuned from, the base or the last merge.
        expert: an expert that is trained already: a folder or a hub name.
        same_base: that expert was trained on this base, although its config names another.
        unseen: tasks to score beside it, and from now on, that nothing is trained on: FILE, NAME=FILE, or a name that lm-eval knows.
        method, sets: for this stage alone: the merge method, and any setting by its dotted key.
    """

    task: str
    test: Path
    train: Path | None = None
    metric: str | None = None
    start: Start = "base"
    expert: str | None = None
    same_base: bool = False
    unseen: Sequence[str] = ()
    method: str | None = None
    sets: Mapping[str, Any] = field(default_factory=dict)


def draft(folder: Path, state: State | None, request: Request) -> StageSpec:
    """A request as a stage, without the hashes of its files, which the checks fill in."""
    overrides = ({"method": request.method} if request.method is not None else {}) | dict(request.sets)
    known = {task.name: task for stage in (state.lineage() if state else ())[-1:] for task in stage.unseen}
    asked = [_unseen(folder, word) for word in request.unseen]
    inherited = [task for name, task in known.items() if name not in {request.task, *(task.name for task in asked)}]
    return StageSpec(
        id=len(state.stages) + 1 if state else 1,
        parent=state.head if state else 0,
        task=Task(name=request.task, metric=request.metric, test=_unread(folder, request.test)),
        train=_unread(folder, request.train) if request.train else None,
        start=request.start,
        given=Model(path=_place(folder, request.expert), fingerprint="") if request.expert else None,
        unseen=(*inherited, *asked),
        overrides=overrides,
    )


def _unseen(folder: Path, word: str) -> Task:
    name, file = task_word(word)
    return Task(name=name, test=None if file is None else _unread(folder, file))


def _unread(folder: Path, path: Path) -> DataFile:
    return DataFile(path=stored_path(folder, path), sha256="")


def _place(folder: Path, reference: str) -> str:
    return stored_path(folder, path_of(reference)) if exists(path_of(reference)) else reference
