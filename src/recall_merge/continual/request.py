"""A request to learn a task, and the stage that it describes."""

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
    """A request to learn a task.

    Attributes:
        task: its name, everywhere.
        train, test: files of rows. `train` may be left out where an expert is given and the method compares no representations.
        start: what the expert is fine-tuned from, the base or the last merge.
        expert: an expert that is already trained: a folder or a hub name.
        same_base: that expert was trained on this base, although its config names another.
        unseen: further tasks to score, from now on, that nothing is trained on: FILE, NAME=FILE, or a name that lm-eval knows.
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
    """A request as a stage, without the hashes of its files, which validation fills in."""

    def unread(path: Path) -> DataFile:
        return DataFile(path=stored_path(folder, path), sha256="")

    unseen = [Task(name=name, test=unread(file) if file else None) for name, file in map(task_word, request.unseen)]
    names = {request.task, *(task.name for task in unseen)}
    inherited = [task for stage in (state.lineage() if state else ())[-1:] for task in stage.unseen if task.name not in names]
    expert = request.expert
    if expert is not None and exists(path_of(expert)):
        expert = stored_path(folder, path_of(expert))
    return StageSpec(
        id=len(state.stages) + 1 if state else 1,
        parent=state.head if state else 0,
        task=Task(name=request.task, metric=request.metric, test=unread(request.test)),
        train=unread(request.train) if request.train else None,
        start=request.start,
        given=Model(path=expert, fingerprint="") if expert else None,
        unseen=(*inherited, *unseen),
        overrides=({"method": request.method} if request.method is not None else {}) | dict(request.sets),
    )
