"""A stage as it is asked for, and every check that can be made before it begins: all faults at once, nothing written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recall_merge.continual.kept_scores import read_scores
from recall_merge.continual.places import check_places
from recall_merge.continual.settings import Settings, check_method, check_overrides, make_settings, strategy_of
from recall_merge.continual.state import NAME, DataFile, Model, StageSpec, Start, State, Task, found_path, locate_model, stored_path
from recall_merge.continual.steps import fingerprint, is_same
from recall_merge.evaluation.gate import ALL, Condition, read_conditions
from recall_merge.evaluation.scores import check_lengths
from recall_merge.evaluation.tasks import TaskSpec, check_tasks, task_word
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.hashing import FileStates
from recall_merge.files.hub import Located, locate
from recall_merge.files.row_sources import RowSource
from recall_merge.files.rows import FORMATS, Row, is_local
from recall_merge.files.statistics import STATS, open_statistics
from recall_merge.maths.methods import Method
from recall_merge.merging.plan import make_plan
from recall_merge.merging.rules import Rules
from recall_merge.merging.run import MergeRun, SampleWeights
from recall_merge.models.load import load_tokenizer
from recall_merge.models.own_text import start_token
from recall_merge.runtime.device import find_device
from recall_merge.runtime.errors import CheckpointError, Faults, MissingExtra, WorkspaceError
from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.sections import parse
from recall_merge.training.earlier import Earlier, open_earlier
from recall_merge.training.fine_tuning import check_rows
from recall_merge.training.settings import Protect, check_arguments, training_device

RESERVED = ("base", "merged", ALL)  # words that stand beside the names of tasks, or for them


@dataclass(frozen=True)
class Request:
    """A request to learn a task.

    Attributes:
        task: its name, everywhere.
        train, test: rows, as `RowSource.of` takes them. `train` may be left out where an expert is given and the method compares no
            representations.
        system, template: how the task's rows are written, to train on and to score: a system text for rows that have none, and what writes
            them (as in `RowSource`). Both are kept with the task.
        start: what the expert is fine-tuned from, the base or the last merge; by default the last merge where the newest expert alone
            is kept, and else the base.
        expert: an expert that is already trained: a folder or a hub name.
        same_base: that expert was trained on this base, although its config names another.
        keep_if: conditions under which the stage's model becomes the workspace's, as `read_conditions` takes them.
        unseen: further tasks to score, from now on, that nothing is trained on: FILE, NAME=FILE, or a name that lm-eval knows.
        method, sets: for this stage alone: the merge method, and any setting by its dotted key.
    """

    task: str
    test: RowSource | Path | str
    train: RowSource | Path | str | None = None
    metric: str | None = None
    system: str | None = None
    template: bool | str | Path | None = None
    start: Start | None = None
    expert: str | None = None
    same_base: bool = False
    keep_if: Sequence[str] = ()
    unseen: Sequence[str] = ()
    method: str | None = None
    sets: Mapping[str, Any] = field(default_factory=dict)


def draft(folder: Path, state: State | None, request: Request) -> StageSpec:
    """A request as a stage, without the hashes of its files, which validation fills in."""

    def unread(given: RowSource | Path | str, split: str, **written: Any) -> DataFile:
        source = RowSource.of(given, split)
        place = path_of(source.path)
        path = stored_path(folder, place) if is_local(source.path) or exists(place) else source.path
        return parse(DataFile, {**source.model_dump(), "path": path, "sha256": "", **written}, where=source.path)

    written: dict[str, Any] = {} if request.system is None else {"system": request.system}
    written |= {} if request.template is None else {"template": request.template}
    unseen = [Task(name=name, test=unread(file, "test") if file else None) for name, file in map(task_word, request.unseen)]
    names = {request.task, *(task.name for task in unseen)}
    inherited = [task for stage in (state.lineage() if state else ())[-1:] for task in stage.unseen if task.name not in names]
    expert = request.expert
    if expert is not None and exists(path_of(expert)):
        expert = stored_path(folder, path_of(expert))
    overrides = ({"method": request.method} if request.method is not None else {}) | dict(request.sets)
    builds = state is not None and state.head and expert is None and strategy_of(state.settings, overrides) == "newest"
    return StageSpec(
        id=len(state.stages) + 1 if state else 1,
        parent=state.head if state else 0,
        task=Task(name=request.task, metric=request.metric, test=unread(request.test, "test", **written)),
        train=unread(request.train, "train", **written) if request.train else None,
        start=request.start or ("last" if builds else "base"),
        given=Model(path=expert, fingerprint="") if expert else None,
        unseen=(*inherited, *unseen),
        overrides=overrides,
        keep_if=tuple(request.keep_if),
    )


@dataclass(frozen=True)
class ValidatedStage:
    """A stage that has passed all checks, and what they have read."""

    state: State
    spec: StageSpec
    settings: Settings
    base: Path
    rows: list[Row]  # to train on; none where an expert is given without
    tasks: dict[str, TaskSpec]  # all that are scored, by name: those learnt, in order, then the unseen ones
    inputs: FileStates  # of all these files, before they were first read
    has_before: bool  # whether the merge before is there
    earlier: Earlier  # the input statistics of what is protected
    conditions: tuple[Condition, ...]  # that its scores must meet


class StageValidation:
    """Every check of a stage. Faults are added to those found before."""

    def __init__(
        self, folder: Path, state: State | None, spec: StageSpec, faults: Faults, *, same_base: bool, allowed: Collection[str]
    ) -> None:
        self._folder, self._state, self._spec, self._faults = path_of(folder), state, spec, faults
        self._same_base, self._allowed = same_base, allowed
        self._lineage = state.lineage() if state else ()
        self._asked = (spec.task, *spec.unseen)  # the tasks of this stage
        self._tests: dict[str, Task] = {}  # by task, with hashes
        self._rows: dict[str, list[Row]] = {}  # of the tests
        self._settings: Settings | None = None
        self._rules: Rules | None = None
        self._base: Path | None = None
        self._given = spec.given
        self._has_before = spec.parent != 0
        self._earlier: Earlier = {}
        self._conditions: list[Condition] = []
        self._inputs: list[FileStates] = []

    def run(self) -> ValidatedStage:
        """Make all checks. Raises WorkspaceError with every fault."""
        self._check_names()
        self._train, self._train_rows = self._read(self._spec.train, "the training file")
        self._check_tasks()
        self._check_overlap()
        self._check_settings()
        if self._state is not None:
            self._check_models(self._state)
        self._check_lengths()
        self._check_conditions()
        if NAME.fullmatch(self._spec.task.name):
            self._faults.attempt(check_places, self._folder, self._spec.id, self._spec.name)
        self._faults.raise_any(WorkspaceError)
        assert self._settings is not None and self._base is not None and self._state is not None
        unseen = tuple(self._tests[task.name] for task in self._spec.unseen)
        filled = {"task": self._tests[self._spec.task.name], "train": self._train, "given": self._given, "unseen": unseen}
        spec = self._spec.model_copy(update=filled)
        self._refuse_other(self._state, spec)
        inputs = FileStates({file: state for seen in reversed(self._inputs) for file, state in seen.files.items()})
        read = (self._train_rows, self._task_specs(), inputs, self._has_before, self._earlier, tuple(self._conditions))
        return ValidatedStage(self._state, spec, self._settings, self._base, *read)

    def _check_names(self) -> None:
        add, names = self._faults.add, [task.name for task in self._asked]
        for name in names:
            if not NAME.fullmatch(name) or name in RESERVED:
                fix = "letters, digits, '.', '-' and '_', at most 64, not " + " or ".join(f"'{word}'" for word in RESERVED)
                add(f"'{name}' cannot be the name of a task", fix=fix)
        for name in sorted({name for name in names if names.count(name) > 1}):
            add(f"the name '{name}' is given twice", fix="give one another name: NAME=FILE")
        for stage in self._lineage:
            if stage.task.name in names:
                fix = f"give another name, or go back before it first: recall rollback {self._folder} --to {stage.parent}"
                add(f"a task named '{stage.task.name}' was learnt already", where=f"stage {stage.id}", fix=fix)

    def _read(self, file: DataFile | None, what: str, since: str = "it was given") -> tuple[DataFile | None, list[Row]]:
        """A file with its hash, and its rows."""
        if file is None:
            return None, []
        source, fix = file.under(self._folder.absolute().resolve()), f"give the path of a file of rows: {', '.join(FORMATS)}"
        if file.sha256:
            fix = f"put back the file of SHA-256 {file.sha256}, or write where it lies now into workspace.json"
        if source.is_missing:
            self._faults.add(f"{what} is missing", where=source.path, fix=fix)
            return file, []
        self._inputs.append(FileStates.of([path_of(source.path)] if exists(path_of(source.path)) else []))
        rows = self._faults.attempt(source.read)
        if rows is None:
            return file, []
        sha256 = source.digest(rows)
        if file.sha256 and sha256 != file.sha256:
            self._faults.add(f"{what} has changed since {since}", where=source.path, fix=fix)
        return file.model_copy(update={"sha256": sha256}), rows

    def _check_tasks(self) -> None:
        """Read every test file: of the task, of the unseen ones, and of what was learnt before."""
        tasks = {stage.task.name: (stage.task, f"stage {stage.id}") for stage in self._lineage}
        tasks |= {task.name: (task, "it was given") for task in self._asked}
        for name, (task, since) in tasks.items():
            file, self._rows[name] = self._read(task.test, f"the test file of '{name}'", since)
            self._tests[name] = task.model_copy(update={"test": file})
        self._check_same_as_before()
        specs = [spec for spec in self._task_specs().values() if spec.rows != []]
        if find_spec("lm_eval") is None:
            self._faults.extend(MissingExtra("eval", "scoring").faults)
            specs = [spec for spec in specs if spec.rows is not None]  # lm-eval's own tasks cannot be looked up
        self._faults.extend(check_tasks(specs))

    def _check_same_as_before(self) -> None:
        """A task that was scored before under this name must be the same one: its scores stand in one column."""
        before = {task.name: task for stage in self._lineage[-1:] for task in stage.unseen}
        for task in (self._tests[task.name] for task in self._asked):
            old = before.get(task.name)
            if old is not None and (old.test and old.test.identity, old.metric) != (task.test and task.test.identity, task.metric):
                what = f"'{task.name}' was scored before with another file, format or metric"
                self._faults.add(what, where=task.test.path if task.test else task.name, fix="give it as it was, or another name")

    def _check_overlap(self) -> None:
        """No row of a test may be trained on."""
        trained = {row.content for row in self._train_rows}
        for name, rows in self._rows.items():
            if shared := sum(row.content in trained for row in rows):
                whose = "its test file" if name == self._spec.task.name else f"the test file of '{name}'"
                where = found_path(self._folder, self._spec.train.path if self._spec.train else "")
                what = f"the training file and {whose} share rows: {shared} of the {len(rows)} test rows are also trained on"
                self._faults.add(what, where=where, fix="take them out of the training file")

    def _check_settings(self) -> None:
        spec, faults = self._spec, self._faults
        with faults.collect():
            settings = make_settings(self._state.settings if self._state else {}, spec.overrides)
            experts = {"one_shot": len(self._lineage), "sequential": min(len(self._lineage), 1), "newest": 0}[settings.strategy] + 1
            with faults.collect():
                self._rules = check_method(settings, experts if settings.for_stage(experts) is settings else None)
            if self._state:
                with faults.collect():
                    check_overrides(settings, self._state.settings)
            faults.attempt(find_device, settings.scoring_device)
            if spec.given is None:
                faults.attempt(training_device, settings.device)
                with faults.collect():
                    check_arguments(settings.training, self._allowed)
                if spec.train is None:
                    faults.add("there is nothing to train on", fix="give --train FILE, or a trained expert by --expert")
                if settings.strategy == "newest" and self._lineage and spec.start == "base":
                    what = "the newest expert alone is kept, and it is to be trained from the base: all earlier stages would be forgotten"
                    faults.add(
                        what, where="strategy", fix="leave out --from; or give `--method aligned`, or another: it merges all experts"
                    )
            elif settings.strategy == "newest" and self._lineage:
                what = "the newest expert alone is kept, and this one was not trained from the last merge"
                faults.add(what, where="strategy", fix="give a --method, which merges all experts")
            elif spec.start == "last":
                faults.add("an expert that is given is not fine-tuned from anything", fix="leave out --from, or --expert")
            elif spec.train is None and self._rules is not None and isinstance(self._rules.weights, SampleWeights):
                what = f"the weights come from {self._rules.weights.compares} on the newest expert's data"
                faults.add(what, fix="give its training rows: --train FILE")
            self._settings = settings

    def _check_lengths(self) -> None:
        """Whether the base can read all rows: those to train on, and those of all tasks."""
        if self._base is None or self._settings is None or find_spec("lm_eval") is None:
            return
        if self._train_rows and self._spec.given is None:
            with self._faults.collect():
                check_rows(self._base, self._train_rows, self._settings.training_settings())
        with self._faults.collect():
            specs = [spec for spec in self._task_specs().values() if spec.rows]
            self._faults.extend(check_lengths(self._base, specs, template=self._settings.template))

    def _check_conditions(self) -> None:
        """Whether the conditions can be decided: by the scores of this stage, and of the model before it."""
        last = self._lineage[-1] if self._lineage else None
        before = self._tests if last is None or self._has_before else last.scores.merged
        with self._faults.collect():
            self._conditions = read_conditions(self._spec.keep_if, self._tests, where="--keep-if", before=before)
        if last is not None and any(condition.is_change for condition in self._conditions):
            with self._faults.collect():
                read_scores(self._folder, last)

    def _check_models(self, state: State) -> None:
        """Whether base, experts, and where it is needed the merge before, are what they were."""
        with self._faults.collect():
            self._base = locate_model(self._folder, state.base)
            self._check_same(self._base, state.base, "the base", "the workspace was made")
        one_shot = self._settings is None or self._settings.strategy == "one_shot"
        for stage in self._lineage if one_shot else ():
            with self._faults.collect():
                folder = locate_model(self._folder, stage.expert)
                self._check_same(folder, stage.expert, f"the expert of '{stage.task.name}'", f"stage {stage.id}")
        if one_shot and self._rules is not None and self._rules.method.informed:
            self._check_statistics(self._rules.method)
        if self._settings is not None and self._settings.training.protect is not None and self._spec.given is None:
            self._open_earlier(self._settings.training.protect)
        if self._lineage:
            last, started = self._lineage[-1], {stage.parent for stage in (*self._lineage, self._spec) if stage.start == "last"}
            self._has_before = found_path(self._folder, last.merged.path).is_dir()
            needed = (started if one_shot else {self._spec.parent}) | ({last.id} if self._has_before else set())
            for stage in self._lineage:
                if stage.id in needed:
                    with self._faults.collect():
                        folder = found_path(self._folder, stage.merged.path)
                        self._check_same(folder, stage.merged, f"the merge of stage {stage.id}", "it was made")
        if self._spec.given is not None and self._base is not None:
            with self._faults.collect():
                self._given = self._check_given(self._base, self._spec.given)

    def _check_statistics(self, method: Method) -> None:
        """Whether the statistics that the method will read are there, with what it takes of them."""
        for stage in self._lineage:
            self._inputs.append(FileStates.of([found_path(self._folder, stage.stats)] if stage.stats else []))
            if stage.stats is not None and not (file := found_path(self._folder, stage.stats) / STATS).is_file():
                self._faults.add(f"the input statistics of '{stage.task.name}' are missing", where=file, fix="put them back")
                continue
            with self._faults.collect():
                stats = None if stage.stats is None else open_statistics(found_path(self._folder, stage.stats))
                if stats is not None and method.gradients and not stats.has_gradients:
                    what = f"the input statistics of '{stage.task.name}' hold no gradients, which `{method.name}` takes"
                    fix = "give another method; a workspace takes gradients only in stages that are merged by such a method"
                    raise CheckpointError(what, where=stats.folder, fix=fix)

    def _open_earlier(self, protect: Protect) -> None:
        """The input statistics of what is to be protected: of all earlier stages that have them, and of experts from elsewhere."""
        folders = {stage.task.name: found_path(self._folder, stage.stats) for stage in self._lineage if stage.stats is not None}
        folders |= {name: path_of(folder) for name, folder in protect.statistics.items()}
        if self._base is not None and protect.wants_base:
            with self._faults.collect():
                start_token(load_tokenizer(self._base))
        if self._base is not None and protect.is_on:
            self._inputs.append(FileStates.of([folder for folder in folders.values() if folder.is_dir()]))
            with self._faults.collect():
                self._earlier = open_earlier(folders, open_checkpoint(self._base))

    def _check_given(self, base: Path, given: Model) -> Model:
        """A given expert, with its fingerprint; it must fit the base."""
        if given.fingerprint:
            self._check_same(locate_model(self._folder, given), given, "the given expert", "it was given")
            return given
        here = found_path(self._folder, given.path)
        expert = Located(here) if here.exists() else locate(given.path)
        self._inputs.append(FileStates.of([expert.folder]))
        entry = {"name": self._spec.task.name, "path": str(expert.folder), "same_base": self._same_base}
        named = self._state.base.path if self._state and self._state.base.on_hub else str(base)
        make_plan(MergeRun.model_validate({"base": named, "experts": [entry], "method": "linear"}), writes=False)
        return Model(path=f"{expert.repo}@{expert.revision}" if expert.repo else given.path, fingerprint=fingerprint(expert.folder))

    def _refuse_other(self, state: State, spec: StageSpec) -> None:
        """Refuse a stage while another is unfinished."""
        begun = state.unfinished
        if begun is not None and begun != spec:
            what = f"stage {begun.id} ('{begun.task.name}') was begun and is not finished; this is not the same request"
            fix = f"`recall learn {self._folder}` goes on with it; `recall rollback {self._folder} --to {state.head}` gives it up"
            raise WorkspaceError(what, where=self._folder, fix=fix)

    def _check_same(self, folder: Path, model: Model, what: str, since: str) -> None:
        if not folder.is_dir():
            moved = "; or say where it lies now: recall init WORKSPACE --base FOLDER" if what == "the base" else ""
            raise CheckpointError(f"{what} is missing", where=folder, fix=f"put it back{moved}")
        self._inputs.append(FileStates.of([folder]))
        if not is_same(folder, model.fingerprint):
            raise CheckpointError(f"{what} has changed since {since}", where=folder, fix="put back what was there")

    def _task_specs(self) -> dict[str, TaskSpec]:
        return {name: TaskSpec(name, self._rows[name] if task.test else None, task.metric) for name, task in self._tests.items()}
