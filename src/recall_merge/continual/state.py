"""A workspace on disk: `workspace.json`, its state, replaced in one step; and `journal.jsonl`, what was begun and done, and when.

The state is for people too: it names every expert, merge and score by its path, relative to the workspace if it lies inside.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recall_merge.files.checkpoint import read_json
from recall_merge.files.hub import locate
from recall_merge.files.output import WORKSPACE
from recall_merge.files.record import RECORD
from recall_merge.files.row_sources import RowSource
from recall_merge.files.rows import Row
from recall_merge.runtime.durable import append_line, write_whole
from recall_merge.runtime.errors import CheckpointError, DataError, Fault, WorkspaceError
from recall_merge.runtime.lock import lock
from recall_merge.runtime.safe_json import read_small
from recall_merge.runtime.sealed import read_sealed, sealed

STATE, JOURNAL = WORKSPACE, "journal.jsonl"
FORMAT = 2
NAME = re.compile(r"\w[\w.-]{0,63}")  # of a task; folders are called after it
Start = Literal["base", "last"]


class Part(BaseModel):
    """One part of the state: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataFile(RowSource):
    """Rows, and the hash of their file or of themselves."""

    sha256: str

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two that are equal in it hold the same rows, written in the same way."""
        return self.sha256, self.columns, self.system, self.template


class Model(Part):
    """A model: a folder, or a hub name with its commit; and its fingerprint."""

    path: str
    fingerprint: str

    @property
    def on_hub(self) -> bool:
        return re.fullmatch(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}", self.path) is not None


class Task(Part):
    """What models are scored on."""

    name: str
    metric: str | None = None
    test: DataFile | None = None  # None: the task of this name that comes with lm-eval


class Scores(Part):
    """Plain scores of a stage, by task. The items behind them are in `file`."""

    file: str
    base: dict[str, float]  # of the base, on tasks that are new with this stage
    before: dict[str, float]  # of the merge before, on the same
    expert: dict[str, float]  # of the expert, on its own task
    merged: dict[str, float]  # of this stage's merge, on all tasks so far


class StageSpec(Part):
    """What a stage is to learn: all that was asked for, and the hashes of what it reads."""

    id: int
    parent: int  # the stage before; 0 is the base
    task: Task
    train: DataFile | None
    start: Start  # what the expert is fine-tuned from: the base, or the merge before
    given: Model | None = None  # an expert that was trained elsewhere
    unseen: tuple[Task, ...] = ()  # tasks that are scored and never trained on, those of the stages before included
    overrides: dict[str, Any] = Field(default_factory=dict)  # settings of this stage alone, by dotted keys
    keep_if: tuple[str, ...] = ()  # conditions under which its model becomes the workspace's

    @property
    def name(self) -> str:
        """Of the stage's folders."""
        return f"{self.id}-{self.task.name}"


class Stage(StageSpec):
    """A stage that was learnt."""

    expert: Model
    stats: str | None = None  # folder of the expert's statistics; None if it was given without rows, or none are wanted
    merged: Model
    samples: tuple[int, ...]  # positions of the typical samples among the training rows; never their text
    scores: Scores
    created: str
    refused: tuple[str, ...] = ()  # the conditions that its scores did not meet, in words; its model did not become the workspace's then

    @property
    def origin(self) -> str:
        """Where its expert comes from, in words."""
        if self.given is not None:
            return "expert given"
        return f"fine-tuned from {'the base' if self.start == 'base' else f'stage {self.parent}'}"


class State(Part):
    """The state of a workspace."""

    format: Literal[2] = FORMAT
    base: Model
    settings: dict[str, Any]
    stages: tuple[Stage, ...] = ()  # in the order of their numbers, from 1; none is ever removed
    head: int = 0  # the stage whose merge is the workspace's model now; 0 is the base
    unfinished: StageSpec | None = None  # a stage that was begun, and is not done

    def lineage(self, to: int | None = None) -> tuple[Stage, ...]:
        """The stages that lead from the base to one, the head by default."""
        found: list[Stage] = []
        at = self.head if to is None else to
        while at:
            found.append(self.stages[at - 1])
            at = found[-1].parent
        return tuple(reversed(found))

    @property
    def model(self) -> Model:
        """The workspace's model now: the merge of the head, or the base."""
        return self.stages[self.head - 1].merged if self.head else self.base


def is_workspace(folder: Path) -> bool:
    return (folder / STATE).is_file()


def read_state(folder: Path) -> State:
    """The state of a workspace. Raises WorkspaceError if there is none, it is damaged, or in another version's format."""
    path, fix = folder / STATE, "put back what was there; the journal beside it says what was done last"
    if not is_workspace(folder):
        what = "this is no workspace" if folder.exists() else "there is no such workspace"
        raise WorkspaceError(what, where=folder, fix="make one: recall init WORKSPACE --base MODEL")
    try:
        data = read_sealed(path)
    except CheckpointError as error:
        fix += "; if you changed it yourself, take its line `blake3` out"
        raise WorkspaceError(f"the workspace's state cannot be read: {error.faults[0].what}", where=path, fix=fix) from error
    version = data.get("format", 0)
    if type(version) is int and version != FORMAT:
        if not version:
            raise WorkspaceError("the workspace's state is damaged: it does not say its format", where=path, fix=fix)
        author, fix = "a newer", "install the version of recall-merge that wrote it, or a newer one"
        if version < FORMAT:
            author, fix = "an older", "use the version that wrote it, or learn its tasks again in a new workspace"
        what = f"this workspace was written by {author} version of recall-merge: its format is {version}, this version knows {FORMAT}"
        raise WorkspaceError(what, where=path, fix=fix)
    try:
        state = State.model_validate_json(json.dumps(data))  # subtle: from JSON, strict models take lists for tuples
    except ValidationError as error:
        wrong = [": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"]))) for detail in error.errors()]
        raise WorkspaceError(Fault(f"the workspace's state is damaged: {what}", str(path), fix) for what in wrong) from None
    if what := _stage_error(state):
        raise WorkspaceError(f"the workspace's state is damaged: {what}", where=path, fix=fix)
    return state


def _stage_error(state: State) -> str:
    """What is wrong with numbers and names of stages; empty if every lineage leads to the base, and every task can name a folder."""
    for number, stage in enumerate(state.stages, start=1):
        if stage.id != number or not 0 <= stage.parent < number:
            return f"stage {stage.id}, of parent {stage.parent}, stands in place {number}"
    spec = state.unfinished
    for stage in (*state.stages, *([spec] if spec else [])):
        if not NAME.fullmatch(stage.task.name):
            return f"stage {stage.id} has a task of the name {stage.task.name!r}"
    if spec is not None and (spec.id != len(state.stages) + 1 or spec.parent != state.head):
        return f"the unfinished stage is {spec.id}, of parent {spec.parent}"
    return "" if 0 <= state.head <= len(state.stages) else f"there is no stage {state.head} to be the head"


def unchanged_rows(folder: Path, file: DataFile | None) -> list[Row] | None:
    """Rows that the state names; None if they are gone or have changed."""
    if file is not None and not (source := file.under(folder.absolute().resolve())).is_missing:
        with suppress(DataError):
            rows = source.read()
            return rows if source.digest(rows) == file.sha256 else None
    return None


def current_model(folder: Path, state: State | None = None) -> str:
    """The workspace's model now, as a path that holds from here, or a hub name."""
    model = (state or read_state(folder)).model
    return model.path if model.on_hub else str(folder / model.path)


def merge_of(folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder of a workspace's merge, given the workspace or that folder, and where its models are, by the names of its record.

    Other folders are given back as they are. Left out are models that are gone, and experts that were put into another model to be merged.
    """
    place = folder.absolute().resolve()
    home = next((home for home in (place, place.parent.parent) if is_workspace(home)), None)
    state = None if home is None else read_state(home)
    if home is None or state is None:
        return folder, {}
    if place == home and not state.head:
        raise WorkspaceError("the workspace has merged nothing yet", where=folder, fix="teach it a task: recall learn WORKSPACE")
    merges = {found_path(home, stage.merged.path): stage.id for stage in state.stages}
    if place != home and place not in merges:
        return folder, {}
    merged = found_path(home, state.model.path) if place == home else place
    lineage = state.lineage(merges[merged])
    models = {"base": state.base, **{stage.task.name: stage.expert for stage in lineage if stage.start == "base" or not stage.parent}}
    models |= {"merged": lineage[-2].merged} if len(lineage) > 1 else {}
    try:
        names = {"base", *(entry["name"] for entry in read_json(merged / RECORD)["run"]["experts"])}
    except (CheckpointError, KeyError, TypeError):
        return merged, {}  # what is wrong with the record is told when it is read
    places = {name: model.path if model.on_hub else str(found_path(home, model.path)) for name, model in models.items() if name in names}
    return merged, {name: path for name, path in places.items() if models[name].on_hub or Path(path).is_dir()}


def locate_model(folder: Path, model: Model) -> Path:
    """The folder of a model that the state names: here, or fetched from the hub; CheckpointError if it cannot be."""
    return locate(model.path).folder if model.on_hub else found_path(folder, model.path)


def write_state(folder: Path, state: State, *, was: State | None) -> None:
    """Replace the state, in one step. Raises WorkspaceError if it is no longer what it `was` when this command read or wrote it last."""
    if (_text(read_state(folder)) if is_workspace(folder) else None) != (was and _text(was)):
        what = "the workspace's state was changed by something else while this command worked"
        raise WorkspaceError(what, where=folder / STATE, fix="look at it with `recall status`, then run the command again")
    write_whole(folder / STATE, _text(state))


def _text(state: State) -> str:
    return sealed(state.model_dump(mode="json"), indent=2)


@contextmanager
def opened(folder: Path, command: str) -> Iterator[State]:
    """A workspace's state, the workspace being locked inside the context. Raises WorkspaceError if it is none, is damaged or in use."""
    read_state(folder)  # before a lock file is made in a folder that is no workspace
    if not os.access(folder, os.W_OK):
        raise WorkspaceError("there is no permission to write into this workspace", where=folder, fix="change its permissions")
    if (folder / JOURNAL).is_symlink():
        raise WorkspaceError(
            f"{JOURNAL} is a link, and may lead out of the workspace", where=folder / JOURNAL, fix="put the file itself there"
        )
    with lock(folder, command):
        yield read_state(folder)


def note(folder: Path, **facts: Any) -> None:
    """Add a line to the journal."""
    append_line(folder / JOURNAL, json.dumps({"time": now(), **facts}, ensure_ascii=False))


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines, without one that a stop cut short, or that is damaged."""
    path, entries = folder / JOURNAL, []
    for line in read_small(path).decode("utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            entries += [entry] if isinstance(entry, dict) else []
    return entries


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stored_path(folder: Path, path: Path) -> str:
    """How the state calls a path: relative to the workspace if it lies inside, else whole.

    >>> stored_path(Path("/w"), Path("/w/merges/1")), stored_path(Path("/w"), Path("/data/a.jsonl"))
    ('merges/1', '/data/a.jsonl')
    """
    whole, home = path.absolute().resolve(), folder.absolute().resolve()
    return str(whole.relative_to(home)) if whole.is_relative_to(home) else str(whole)


def found_path(folder: Path, path: str) -> Path:
    """Where a path of the state is."""
    return folder.absolute().resolve() / path
