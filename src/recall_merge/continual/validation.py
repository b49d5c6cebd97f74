"""Every check of a stage that can be made before it begins: all faults at once, nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recall_merge.continual.settings import Settings, check_method, check_overrides, make_settings
from recall_merge.continual.state import NAME, DataFile, Model, Stage, StageSpec, State, Task, fingerprint, found_path
from recall_merge.evaluation.tasks import TaskSpec, check_tasks
from recall_merge.files.experts import hash_file
from recall_merge.files.hub import Located, locate
from recall_merge.files.rows import Row, read_rows
from recall_merge.runtime.errors import CheckpointError, Faults, MissingExtra, WorkspaceError

TAKEN = ("base", "merged")  # words that stand beside the names of tasks


@dataclass(frozen=True)
class Ready:
    """A stage that has passed all checks, and what they have read."""

    stage_spec: StageSpec
    settings: Settings
    base: Path
    rows: list[Row]
    """To train on; none where an expert is given without."""
    specs: dict[str, TaskSpec]
    """All tasks to be scored, by name: those learnt, in order, then the unseen ones."""
    has_before: bool
    """Whether the merge before is there."""


class Check:
    """Every check of a stage. `faults` collects what is wrong; `ready` raises it, or gives what the checks have read."""

    def __init__(self, folder: Path, state: State | None, stage_spec: StageSpec, *, same_base: bool = False) -> None:
        self.faults = Faults()
        self._folder, self._state, self._lesson = folder, state, stage_spec
        self._rows: dict[str, list[Row]] = {}  # by task
        self._tests: dict[str, Task] = {}  # by task, with hashes
        self._has_before = stage_spec.parent != 0
        self._names()
        self._train, self._train_rows = self._read(stage_spec.train, "the training file")
        self._tasks()
        self._overlap()
        self._settings = self._check_settings()
        self._base: Path | None = None
        self._given = stage_spec.given
        if state is not None:
            self._models(state)
            if stage_spec.given is not None and self._base is not None:
                with self.faults.collect():
                    self._given = self._check_given(self._base, stage_spec.given, same_base)
        self._lengths()

    def ready(self) -> Ready:
        self.faults.raise_any(WorkspaceError)
        assert self._settings is not None and self._base is not None
        unseen = tuple(self._tests[task.name] for task in self._lesson.unseen)
        stage_spec = self._lesson.model_copy(
            update={"task": self._tests[self._lesson.task.name], "train": self._train, "given": self._given, "unseen": unseen}
        )
        return Ready(stage_spec, self._settings, self._base, self._train_rows, self._specs(), self._has_before)

    def _names(self) -> None:
        stage_spec, add = self._lesson, self.faults.add
        for task in (stage_spec.task, *stage_spec.unseen):
            if not NAME.fullmatch(task.name) or task.name in TAKEN:
                fix = "letters, digits, '.', '-' and '_', at most 64, not " + " or ".join(f"'{name}'" for name in TAKEN)
                add(f"'{task.name}' cannot be the name of a task", fix=fix)
        names = [task.name for task in (stage_spec.task, *stage_spec.unseen)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            add(f"the name '{name}' is given twice", fix="give one another name: NAME=FILE")
        for stage in self._state.lineage() if self._state else ():
            if stage.task.name in names:
                fix = f"give another name, or go back before it first: recall rollback {self._folder} --to {stage.parent}"
                add(f"a task named '{stage.task.name}' was learnt already", where=f"stage {stage.id}", fix=fix)

    def _read(self, file: DataFile | None, what: str, since: str = "it was given") -> tuple[DataFile | None, list[Row]]:
        """A file with its hash, and its rows."""
        if file is None:
            return None, []
        path, rows = found_path(self._folder, file.path), []
        if not path.is_file():
            self.faults.add(f"{what} is missing", where=path, fix=self._put_back(file))
            return file, rows
        with self.faults.collect():
            rows = read_rows(path)
        found = hash_file(path)
        if file.sha256 and found != file.sha256:
            self.faults.add(f"{what} has changed since {since}", where=path, fix=self._put_back(file))
        return DataFile(path=file.path, sha256=found), rows

    def _put_back(self, file: DataFile) -> str:
        if not file.sha256:
            return "give the path of a .jsonl, .json or .parquet file"
        return f"put back the file of SHA-256 {file.sha256}, or write where it lies now into workspace.json"

    def _tasks(self) -> None:
        """Read every test file: of the task, of the unseen ones, and of what was learnt before."""
        known = {stage.task.name: (stage.task, f"stage {stage.id}") for stage in (self._state.lineage() if self._state else ())}
        fresh = {task.name: (task, "it was given") for task in (self._lesson.task, *self._lesson.unseen)}
        for name, (task, since) in (known | fresh).items():
            file, self._rows[name] = self._read(task.test, f"the test file of '{name}'", since)
            self._tests[name] = task.model_copy(update={"test": file})
        self._same_as_before()
        if find_spec("lm_eval") is None:
            self.faults.extend(MissingExtra("eval", "scoring").faults)
        specs = [spec for spec in self._specs().values() if spec.rows != []]
        self.faults.extend(check_tasks(specs))
        if any(spec.rows is None for spec in specs):
            from recall_merge.evaluation.scores import check_named

            self.faults.extend(check_named(specs))

    def _same_as_before(self) -> None:
        """A task that was scored before under this name must be the same one: its scores stand in one column."""
        before = {task.name: task for stage in (self._state.lineage() if self._state else ())[-1:] for task in stage.unseen}
        for task in (self._tests[task.name] for task in (self._lesson.task, *self._lesson.unseen)):
            old = before.get(task.name)
            if old is not None and (_hash(old), old.metric) != (_hash(task), task.metric):
                what = f"'{task.name}' was scored before with another file or metric"
                self.faults.add(what, where=task.test.path if task.test else task.name, fix="give it as it was, or another name")

    def _overlap(self) -> None:
        """No row of a test may be trained on."""
        trained = {_content(row) for row in self._train_rows}
        for name, rows in self._rows.items():
            shared = sum(_content(row) in trained for row in rows)
            if shared:
                whose = "its test file" if name == self._lesson.task.name else f"the test file of '{name}'"
                where = found_path(self._folder, self._lesson.train.path if self._lesson.train else "")
                what = f"the training file and {whose} share rows: {shared} of the {len(rows)} test rows are also trained on"
                self.faults.add(what, where=where, fix="take them out of the training file")

    def _check_settings(self) -> Settings | None:
        with self.faults.collect():
            settings = make_settings(self._state.settings if self._state else {}, self._lesson.overrides)
            with self.faults.collect():
                check_method(settings, self._experts(settings) if settings.of_so_many(self._experts(settings)) is settings else None)
            if self._state:
                with self.faults.collect():
                    check_overrides(settings, self._state.settings)
            if self._lesson.given is None:
                from recall_merge.training.settings import check_arguments

                with self.faults.collect():
                    check_arguments(settings.training)
                if self._lesson.train is None:
                    self.faults.add("there is nothing to train on", fix="give --train FILE, or a trained expert by --expert")
            elif self._lesson.start == "last":
                self.faults.add("an expert that is given is not fine-tuned from anything", fix="leave out --from, or --expert")
            elif settings.method == "recall" and self._lesson.train is None:
                self.faults.add("RECALL compares representations on the newest expert's data", fix="give its training rows: --train FILE")
            return settings
        return None

    def _lengths(self) -> None:
        """Whether the base can read all rows: those to train on, and those of all tasks."""
        if self._base is None or self._settings is None or find_spec("lm_eval") is None:
            return
        from recall_merge.evaluation.scores import check_lengths, window_of
        from recall_merge.models.load import load_tokenizer
        from recall_merge.training.fine_tuning import check_rows

        settings = self._settings
        if self._train_rows and self._lesson.given is None:
            with self.faults.collect():
                window = window_of(self._base, load_tokenizer(self._base))
                check_rows(self._base, self._train_rows, settings.training_settings(), window)
        with self.faults.collect():
            specs = [spec for spec in self._specs().values() if spec.rows]
            self.faults.extend(check_lengths(self._base, specs, template=settings.template))

    def _experts(self, settings: Settings) -> int:
        learnt = len(self._state.lineage()) if self._state else 0
        return min(learnt, 1) + 1 if settings.strategy == "sequential" else learnt + 1

    def _models(self, state: State) -> None:
        """Whether base, experts, and where it is needed the merge before, are what they were."""
        with self.faults.collect():
            self._base = locate_model(self._folder, state.base)
            self._same(self._base, state.base, "the base", "the workspace was made")
        lineage = state.lineage()
        one_shot = self._settings is None or self._settings.strategy == "one_shot"
        for stage in lineage if one_shot else ():
            with self.faults.collect():
                place = locate_model(self._folder, stage.expert)
                self._same(place, stage.expert, f"the expert of '{stage.task.name}'", f"stage {stage.id}")
        self._statistics(lineage)
        if not lineage:
            return
        self._has_before = found_path(self._folder, lineage[-1].merged.path).is_dir()
        needed = {stage.parent for stage in (*lineage, self._lesson) if stage.start == "last"} if one_shot else {self._lesson.parent}
        for stage in lineage:
            if stage.id in needed or (stage is lineage[-1] and self._has_before):
                with self.faults.collect():
                    place = found_path(self._folder, stage.merged.path)
                    self._same(place, stage.merged, f"the merge of stage {stage.id}", "it was made")

    def _statistics(self, lineage: Sequence[Stage]) -> None:
        """Whether the statistics are there that the method will ask for."""
        from recall_merge.files.statistics import STATS
        from recall_merge.maths.methods import METHODS

        method = METHODS.get(self._settings.method) if self._settings else None
        if method is None or not method.informed or self._settings is None or self._settings.strategy == "sequential":
            return
        for stage in lineage:
            if stage.stats is not None and not (place := found_path(self._folder, stage.stats) / STATS).is_file():
                self.faults.add(f"the input statistics of '{stage.task.name}' is missing", where=place, fix="put it back")

    def _same(self, place: Path, model: Model, what: str, since: str) -> None:
        if not place.is_dir():
            raise CheckpointError(f"{what} is missing", where=place, fix="put it back")
        if fingerprint(place) != model.fingerprint:
            raise CheckpointError(f"{what} has changed since {since}", where=place, fix="put back what was there")

    def _check_given(self, base: Path, given: Model, same_base: bool) -> Model:
        """A given expert, with its fingerprint; it must fit the base."""
        from recall_merge.merging.plan import make_plan
        from recall_merge.merging.run import MergeRun

        if given.fingerprint:
            self._same(locate_model(self._folder, given), given, "the given expert", "it was given")
            return given
        here = found_path(self._folder, given.path)
        place = Located(here) if here.exists() else locate(given.path)
        entry = {"name": self._lesson.task.name, "path": str(place.folder), "same_base": same_base}
        named = self._state.base.path if self._state and self._state.base.on_hub else str(base)
        make_plan(MergeRun.model_validate({"base": named, "experts": [entry], "method": "linear"}), writes=False)
        return Model(path=f"{place.repo}@{place.revision}" if place.repo else given.path, fingerprint=fingerprint(place.folder))

    def _specs(self) -> dict[str, TaskSpec]:
        return {name: TaskSpec(name, self._rows[name] if task.test else None, task.metric) for name, task in self._tests.items()}


def locate_model(folder: Path, model: Model) -> Path:
    """The folder of a model that the state names: here, or fetched from the hub.

    Raises:
        CheckpointError: if it is not to be had.
    """
    return locate(model.path).folder if model.on_hub else found_path(folder, model.path)


def refuse_other(folder: Path, state: State, stage_spec: StageSpec) -> None:
    """Refuse a stage while another is unfinished.

    Raises:
        WorkspaceError: naming both ways out.
    """
    begun = state.unfinished
    if begun is None or begun == stage_spec:
        return
    what = f"stage {begun.id} ('{begun.task.name}') was begun and is not finished; this is not the same request"
    fix = f"`recall learn {folder}` goes on with it; `recall rollback {folder} --to {state.head}` gives it up"
    raise WorkspaceError(what, where=folder, fix=fix)


def _hash(task: Task) -> str | None:
    return task.test.sha256 if task.test else None


def _content(row: Row) -> tuple[Any, ...]:
    return (*((role, content.strip()) for role, content in row.prompt), row.completion.strip())
