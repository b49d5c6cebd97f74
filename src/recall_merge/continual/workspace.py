"""Make a workspace, go back in it, and say how it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from recall_merge.continual.settings import check_method, first_settings
from recall_merge.continual.state import (
    JOURNAL,
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
from recall_merge.continual.steps import fingerprint, matches
from recall_merge.files.adapter import is_adapter
from recall_merge.files.hub import locate
from recall_merge.maths.metrics import METRICS, none_if_nan, score_table, table_metrics
from recall_merge.runtime.durable import is_partial, sync
from recall_merge.runtime.errors import Faults, WorkspaceError
from recall_merge.runtime.lock import HOLDER, holder, lock
from recall_merge.runtime.notebook import html_table, shaded

S = TypeVar("S")
LEFTOVERS = (HOLDER, JOURNAL)  # of an `init` that was stopped


def init(folder: Path, base: str, sets: Mapping[str, Any] | None = None) -> State:
    """Make a workspace that has learnt nothing yet; or tell one that is there where its base lies now.

    Args:
        sets: settings by dotted keys: those of a run, `strategy`, `training`, `scoring`.

    Raises:
        RecallError: with every fault; nothing is written then.
    """
    if is_workspace(folder) and not sets and (moved := _with_base_at(folder, base)) is not None:
        return moved
    faults = Faults()
    with faults.collect():
        settings = first_settings(sets or {})
        check_method(settings)
    with faults.collect():
        model = _base_model(folder, base)
    with faults.collect():
        _check_free(folder)
    faults.raise_any()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, f"recall init {folder}"):
        _check_free(folder)  # again: another may have been quicker
        state = State(base=model, settings=settings.stored())
        note(folder, event="made", base=model.path)
        write_state(folder, state, was=None)
        sync(folder.absolute().parent)
    return state


def rollback(folder: Path, to: int) -> State:
    """Make an earlier stage's merge the workspace's model again; 0 is the base. An unfinished stage is given up.

    Nothing is deleted: learning goes on from there, as a branch.

    Raises:
        WorkspaceError: if the stage does not exist, or its merge is missing.
    """
    with opened(folder, f"recall rollback {folder} --to {to}") as state:
        faults = Faults()
        if not 0 <= to <= len(state.stages):
            fix = f"there are stages 0 to {len(state.stages)}; 0 is the base" if state.stages else "there is only stage 0, the base"
            faults.add(f"there is no stage {to}", where=folder, fix=fix)
        elif to and not (merged := found_path(folder, state.stages[to - 1].merged.path)).is_dir():
            faults.add(f"the merge of stage {to} is missing", where=merged, fix="put it back")
        elif to == state.head and state.unfinished is None:
            faults.add(f"the workspace is at stage {to} already", where=folder, fix="`recall status` shows where it can go")
        faults.raise_any(WorkspaceError)
        write_state(folder, changed := state.model_copy(update={"head": to, "unfinished": None}), was=state)
        note(folder, event="rollback", was=state.head, to=to, **({"given_up": state.unfinished.id} if state.unfinished else {}))
    return changed


@dataclass(frozen=True)
class Branch:
    """The scores along one line of stages, from the base to its last stage."""

    stages: tuple[Stage, ...]
    tasks: tuple[str, ...]  # those learnt, in order
    r: list[list[float | None]]  # R, (T + 1) rows of T scores, the base's row first; None where a score was not taken
    experts: list[float | None]  # E, each expert's score on its own task
    unseen: tuple[str, ...]  # tasks that nothing was trained on
    r_unseen: list[list[float | None]]  # T + 1 rows of their scores
    numbers: dict[str, float | None]  # of continual learning, by the names of `metrics.METRICS`; None where they are not defined

    def _repr_html_(self) -> str:
        head = ["after stage", *self.tasks, *(f"{name} (unseen)" for name in self.unseen)]
        names = ["0 base", *(f"{stage.id} {task}" for stage, task in zip(self.stages, self.tasks, strict=True)), "own expert"]
        rows = [*map(list.__add__, self.r, self.r_unseen), [*self.experts, *(None for _ in self.unseen)]]
        columns = [shaded(column) for column in zip(*rows, strict=True)]
        numbers = {METRICS[name].label: value for name, value in self.numbers.items() if value is not None}
        told = "; ".join(f"{label} {value:.3f}" for label, value in numbers.items())
        return html_table(f"R: scores by stage and task. {told}", head, zip(names, *columns, strict=True))


@dataclass(frozen=True)
class Status:
    """How a workspace stands."""

    state: State
    branches: tuple[Branch, ...]  # one for every stage that no other follows, the head's first
    unfinished: tuple[StageSpec, str] | None  # the stage that was begun, and the part of it that was begun last
    holder: str | None  # the process that works in it now
    missing: tuple[str, ...]  # models and merges that are not where the state says

    def _repr_html_(self) -> str:
        said = [f"base: {self.state.base.path}", *self.missing, *([f"in use by {self.holder}"] if self.holder else [])]
        return "".join(f"<p>{escape(line)}</p>" for line in said) + "".join(line._repr_html_() for line in self.branches)


def status(folder: Path) -> Status:
    """Read a workspace; no lock is needed, since the state is replaced in one step.

    Raises:
        WorkspaceError: if the folder is no workspace, or its state is damaged.
    """
    state = read_state(folder)
    followed = {stage.parent for stage in state.stages}
    ends = [state.head, *(stage.id for stage in state.stages if stage.id not in followed and stage.id != state.head)]
    unfinished = None
    if state.unfinished is not None:
        parts = [str(entry["part"]) for entry in read_journal(folder) if entry.get("stage") == state.unfinished.id and "part" in entry]
        unfinished = (state.unfinished, parts[-1] if parts else "begin")
    branches = tuple(branch(state, end) for end in ends if end)
    return Status(state, branches, unfinished, holder(folder), _missing(folder, state))


def branch(state: State, end: int) -> Branch:
    """R and what follows from it, along the line that ends in a stage."""
    stages = state.lineage(end)
    tasks, unseen = tuple(stage.task.name for stage in stages), tuple(task.name for task in stages[-1].unseen)
    experts = {task: score for stage in stages for task, score in stage.scores.expert.items()}
    scores = scores_by_row(stages, lambda stage: stage.scores.model_dump(exclude={"file"}))
    table = score_table(scores, tasks, experts=experts, unseen=unseen)
    rows = [list(map(none_if_nan, row)) for row in table.tolist()]
    t, numbers = len(tasks), {name: none_if_nan(value) for name, value in table_metrics(table).items()}
    return Branch(stages, tasks, [row[:t] for row in rows[:-1]], rows[-1][:t], unseen, [row[t:] for row in rows[:-1]], numbers)


def scores_by_row(stages: Sequence[Stage], roles_of: Callable[[Stage], Mapping[str, Mapping[str, S]]]) -> dict[tuple[int, str], S]:
    """The scores of a line of stages by their row of R (0 is the base) and task; `roles_of` gives those of a stage, by role and task."""
    scores: dict[tuple[int, str], S] = {}
    for number, stage in enumerate(stages, start=1):
        roles = roles_of(stage)
        for row, role in ((0, "base"), (number - 1, "before"), (number, "merged")):
            scores |= {(row, task): score for task, score in roles.get(role, {}).items()}
    return scores


def _with_base_at(folder: Path, base: str) -> State | None:
    """The workspace with its base at another place; None if it lies there already, or it is another model."""
    with opened(folder, f"recall init {folder}") as state:
        model = _base_model(folder, base)
        if model.path == state.base.path or not matches(model.fingerprint, state.base.fingerprint):
            return None
        write_state(folder, changed := state.model_copy(update={"base": model}), was=state)
        note(folder, event="base", was=state.base.path, base=model.path)
    return changed


def _base_model(folder: Path, reference: str) -> Model:
    base = locate(reference)
    if is_adapter(base.folder):
        raise WorkspaceError("the base is an adapter", where=base.folder, fix="give the model that the adapter was trained on")
    if folder.resolve().is_relative_to(base.folder.resolve()):
        raise WorkspaceError("the workspace would lie in the folder of the base", where=folder, fix="choose another folder for it")
    path = f"{base.repo}@{base.revision}" if base.repo else stored_path(folder, base.folder)
    return Model(path=path, fingerprint=fingerprint(base.folder))


def _check_free(folder: Path) -> None:
    if is_workspace(folder):
        raise WorkspaceError("there is a workspace already", where=folder, fix="choose another folder, or use this one")
    if folder.exists() and (not folder.is_dir() or not all(_is_leftover(file) for file in folder.iterdir())):
        raise WorkspaceError("something else lies where the workspace is to be", where=folder, fix="choose an empty folder, or a new one")


def _is_leftover(file: Path) -> bool:
    known = file.name in LEFTOVERS or any(is_partial(file, file.with_name(name)) for name in (STATE, HOLDER))
    return known and not file.is_symlink()


def _missing(folder: Path, state: State) -> tuple[str, ...]:
    models = {f"the merge of stage {stage.id}": stage.merged for stage in state.stages}
    models |= {f"the expert of stage {stage.id}": stage.expert for stage in state.stages}
    local = {what: model for what, model in {"the base": state.base, **models}.items() if not model.on_hub}
    return tuple(f"{what} is missing: {model.path}" for what, model in local.items() if not found_path(folder, model.path).is_dir())
