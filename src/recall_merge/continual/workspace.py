"""Make a workspace, go back in it, and say how it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.continual.keys import fingerprint
from recall_merge.continual.state import (
    JOURNAL,
    LOCK,
    STATE,
    Model,
    Stage,
    StageSpec,
    State,
    found_path,
    is_workspace,
    note,
    opened,
    read_journal,
    read_state,
    stored_path,
    write_state,
)
from recall_merge.files.durable import sync
from recall_merge.files.lock import Holder, holder, lock
from recall_merge.runtime.errors import Faults, WorkspaceError

LEFTOVERS = {LOCK, JOURNAL, f"{STATE}.partial"}  # of an `init` that was stopped


def init(folder: Path, base: str, sets: Mapping[str, Any] | None = None) -> State:
    """Make a workspace that knows nothing yet but its base.

    Args:
        sets: settings by dotted keys: those of a run, `strategy`, `training`, `scoring`.

    Raises:
        RecallError: with every fault; nothing is written then.
    """
    from recall_merge.continual.settings import check_method, make_settings

    faults = Faults()
    with faults.collect():
        settings = make_settings({}, sets or {})
        check_method(settings)
    with faults.collect():
        model = _base(folder, base)
    with faults.collect():
        _check_place(folder)
    faults.raise_any()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, f"recall init {folder}"):
        _check_place(folder)  # again: another may have been quicker
        state = State(base=model, settings=settings.stored())
        note(folder, event="made", base=model.path)
        write_state(folder, state)
        sync(folder.absolute().parent)
    return state


def rollback(folder: Path, to: int) -> State:
    """Make an earlier stage's merge the workspace's model again; 0 is the base. A stage that is unfinished is given up.

    Nothing is deleted: learning goes on from there, as a branch.

    Raises:
        WorkspaceError: if there is no such stage, or its merge is not there.
    """
    with opened(folder, f"recall rollback {folder} --to {to}") as state:
        faults = Faults()
        if not 0 <= to <= len(state.stages):
            known = f"there are stages 0 to {len(state.stages)}; 0 is the base" if state.stages else "there is only stage 0, the base"
            faults.add(f"there is no stage {to}", where=folder, fix=known)
        elif to and not (place := found_path(folder, state.stages[to - 1].merged.path)).is_dir():
            faults.add(f"the merge of stage {to} is missing", where=place, fix="put it back")
        elif to == state.head and state.unfinished is None:
            faults.add(f"the workspace is at stage {to} already", where=folder, fix="`recall status` shows where it can go")
        faults.raise_any(WorkspaceError)
        write_state(folder, changed := state.changed(head=to, unfinished=None))
        note(folder, event="rollback", was=state.head, to=to, **({"given_up": state.unfinished.id} if state.unfinished else {}))
    return changed


@dataclass(frozen=True)
class Branch:
    """What the scores say along one line of stages, from the base to its last stage.

    Attributes:
        stages: in order.
        tasks: those learnt, in order.
        r: R, (T + 1) rows of T scores, the base's row first; None where a score was not taken.
        experts: E, each expert's score on its own task.
        unseen: tasks that nothing was trained on.
        r_unseen: T + 1 rows of their scores.
        numbers: the numbers of continual learning, by the names of `metrics.FORMULAS`; None where they are not defined.
    """

    stages: tuple[Stage, ...]
    tasks: tuple[str, ...]
    r: list[list[float | None]]
    experts: list[float | None]
    unseen: tuple[str, ...]
    r_unseen: list[list[float | None]]
    numbers: dict[str, float | None]


@dataclass(frozen=True)
class Status:
    """How a workspace stands.

    Attributes:
        branches: one for every stage that no other follows, the head's first.
        unfinished: a stage that was begun, and the part of it that was begun last.
        holder: who works in it now.
        missing: models and merges that are not where the state says.
    """

    state: State
    branches: tuple[Branch, ...]
    unfinished: tuple[StageSpec, str] | None
    holder: Holder | None
    missing: tuple[str, ...]


def status(folder: Path) -> Status:
    """Read a workspace; no lock is needed, since the state is replaced in one step.

    Raises:
        WorkspaceError: if it is none, or damaged.
    """
    state = read_state(folder)
    followed = {stage.parent for stage in state.stages}
    ends = [state.head, *(stage.id for stage in state.stages if stage.id not in followed and stage.id != state.head)]
    unfinished = None
    if state.unfinished is not None:
        parts = [entry["part"] for entry in read_journal(folder) if entry.get("stage") == state.unfinished.id]
        unfinished = (state.unfinished, parts[-1] if parts else "begin")
    branches = tuple(branch(state, end) for end in ends if end)
    return Status(state, branches, unfinished, holder(folder / LOCK), _missing(folder, state))


def branch(state: State, end: int) -> Branch:
    """R and what follows from it, along the line that ends in a stage."""
    stages = state.lineage(end)
    tasks = tuple(stage.task.name for stage in stages)
    rows: list[dict[str, float]] = [{} for _ in range(len(stages) + 1)]
    for number, stage in enumerate(stages, start=1):
        rows[0] |= stage.scores.base
        rows[number - 1] |= stage.scores.before
        rows[number] |= stage.scores.merged
    unseen = tuple(task.name for task in stages[-1].unseen)
    experts = [stage.scores.expert.get(stage.task.name) for stage in stages]
    r = [[row.get(name) for name in tasks] for row in rows]
    r_unseen = [[row.get(name) for name in unseen] for row in rows]
    return Branch(stages, tasks, r, experts, unseen, r_unseen, _numbers(r, experts, r_unseen))


def _numbers(r: list[list[float | None]], experts: list[float | None], r_unseen: list[list[float | None]]) -> dict[str, float | None]:
    from recall_merge.maths.metrics import continual_metrics

    def known(values: list[float | None]) -> list[float]:
        return [math.nan if value is None else value for value in values]

    unseen = (known(r_unseen[0]), known(r_unseen[-1])) if r_unseen[0] else None
    numbers = continual_metrics([known(row) for row in r], experts=known(experts), unseen=unseen)
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _base(folder: Path, reference: str) -> Model:
    from recall_merge.files.adapter import is_adapter
    from recall_merge.files.hub import locate

    place = locate(reference)
    if is_adapter(place.folder):
        raise WorkspaceError("the base is an adapter", where=place.folder, fix="give the model that the adapter was trained on")
    if folder.resolve().is_relative_to(place.folder.resolve()):
        raise WorkspaceError("the workspace would lie in the folder of the base", where=folder, fix="choose another folder for it")
    path = f"{place.repo}@{place.revision}" if place.repo else stored_path(folder, place.folder)
    return Model(path=path, fingerprint=fingerprint(place.folder))


def _check_place(folder: Path) -> None:
    if is_workspace(folder):
        raise WorkspaceError("there is a workspace already", where=folder, fix="choose another folder, or use this one")
    if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - LEFTOVERS):
        raise WorkspaceError("something else lies where the workspace is to be", where=folder, fix="choose an empty folder, or a new one")


def _missing(folder: Path, state: State) -> tuple[str, ...]:
    models = {f"the merge of stage {stage.id}": stage.merged for stage in state.stages}
    models |= {f"the expert of stage {stage.id}": stage.expert for stage in state.stages}
    local = {what: model for what, model in {"the base": state.base, **models}.items() if not model.on_hub}
    return tuple(f"{what} is missing: {model.path}" for what, model in local.items() if not found_path(folder, model.path).is_dir())
