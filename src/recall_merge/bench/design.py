"""The design of a bench: its trials (a method on an order with a seed), and the jobs that each of them is made of."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from recall_merge.bench.jobs import Anchor, Base, Merged, Model, OwnStatistics, Question, Scores, StatisticsJob, Trained
from recall_merge.bench.scenario import (
    BASELINE_OPTIONS,
    BASELINES,
    BaselineOptions,
    EwcOptions,
    Kind,
    MethodEntry,
    OLoraOptions,
    ProtectedOptions,
    ReplayOptions,
    Scenario,
)
from recall_merge.evaluation.scores import check_lengths
from recall_merge.evaluation.tasks import TaskSpec, check_tasks
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.hub import locate
from recall_merge.files.rows import Row
from recall_merge.merging.rules import make_rules, method_named, takes_gradients
from recall_merge.merging.run import ByLayer, FromHiddenStates, FromLosses, MergeRun, Samples
from recall_merge.runtime.device import hardware
from recall_merge.runtime.errors import DataError, Faults, RunError, did_you_mean
from recall_merge.runtime.sections import parse
from recall_merge.training.earlier import OWN
from recall_merge.training.fine_tuning import check_rows
from recall_merge.training.settings import WHOLE, Protect, TrainSettings, check_arguments, training_device


@dataclass(frozen=True)
class Trial:
    """One method on one order of the tasks with one seed."""

    kind: Kind
    method: str
    order: tuple[str, ...]  # the tasks as they arrive; a method that ignores the order has one trial, in the order listed
    seed: int
    scores: Mapping[tuple[int, str], Scores] = field(repr=False)  # by (stage, task); stage 0 is the base
    jobs: tuple[Scores, ...] = field(repr=False)  # the same, each once, in the order of the stages


@dataclass(frozen=True)
class Design:
    """A scenario with its rows read, and its trials."""

    scenario: Scenario
    trials: tuple[Trial, ...]
    questions: Mapping[str, Question]
    experts: Mapping[tuple[int, str], Scores]  # (seed, task) -> the score of that task's own expert
    base: Base
    train_rows: Mapping[str, int]  # how many rows each task is trained on


def make_design(scenario: Scenario, allowed: Collection[str] = ()) -> Design:
    """Read the rows and lay out the trials: by kind, seed, order, and method as listed. Raises RecallError with every fault of it all."""
    faults = Faults()
    train: dict[str, tuple[Row, ...]] = {}
    specs: list[TaskSpec] = []
    for task in (*scenario.tasks, *scenario.unseen):
        with faults.collect():
            rows = task.test.under(scenario.data).read()[: task.test_rows or scenario.rows.test]
            specs.append(TaskSpec(task.name, rows, task.metric))
    for task in scenario.tasks:
        with faults.collect():
            train[task.name] = tuple(task.train.under(scenario.data).read()[: task.train_rows or scenario.rows.train])
    faults.extend(check_tasks(specs))
    base: Base | None = None
    with faults.collect():
        folder = locate(scenario.model).folder
        device = training_device(scenario.device)
        base = Base(folder, open_checkpoint(folder).fingerprint, str(device), hardware(device))
    _check_methods(scenario, allowed, faults)
    if base is not None and not len(faults):
        _check_lengths(scenario, base, train, specs, faults)
    faults.raise_any(RunError)
    assert base is not None
    scoring = scenario.scoring
    questions = {
        spec.name: Question(spec.name, tuple(spec.rows or ()), spec.metric, scenario.template, scoring.dtype, scoring.batch_size)
        for spec in specs
    }
    jobs = _Jobs(scenario, base, train, questions)
    experts = {
        (seed, task): jobs.scores(f"the expert of {task}", jobs.expert(task, seed), [task]) for seed in scenario.seeds for task in train
    }
    return Design(scenario, tuple(jobs.trials()), questions, experts, base, {task: len(rows) for task, rows in train.items()})


def _check_lengths(scenario: Scenario, base: Base, train: Mapping[str, Sequence[Row]], specs: Sequence[TaskSpec], faults: Faults) -> None:
    """Check that the base can read all rows whole, or as each way of training cuts them."""
    with faults.collect():
        faults.extend(check_lengths(base.folder, specs, template=scenario.template))
        settings = [scenario.settings(entry, 0) for entry in (None, *scenario.methods)]
        for way in {(s.max_length, str(s.arguments.get("completion_only_loss"))): s for s in settings}.values():
            for task, rows in train.items():
                with faults.collect():
                    try:
                        check_rows(base.folder, rows, way)
                    except DataError as error:
                        raise DataError(replace(fault, where=f"task '{task}', {fault.where}") for fault in error.faults) from None


def _check_methods(scenario: Scenario, allowed: Collection[str], faults: Faults) -> None:
    from recall_merge.maths.methods import ALIASES, METHODS

    with faults.collect():
        parse(Samples, {**scenario.samples, "path": "rows"}, where="samples")
    count = len(scenario.tasks)
    one_shot = [count] if scenario.scoring.stages == "last" else range(2, count + 1)
    merged = {"multi-model": [n for n in one_shot if n > 1], "sequential": [2] if count > 1 else [], "single-model": [1]}
    numbers = {number for kind in scenario.kinds for number in merged[kind]}  # how many experts a merge of this scenario has
    with faults.collect():
        check_arguments(scenario.settings(None, 0), allowed)
    for entry in scenario.methods:
        if not entry.is_baseline and method_named(entry.method) is None:
            fix = did_you_mean(entry.method, [*METHODS, *ALIASES, *BASELINES])
            faults.add(f"there is neither a method nor a baseline '{entry.method}'", where="methods", fix=fix)
            continue
        options = None
        with faults.collect():
            options = _baseline_options(entry)
        with faults.collect():
            settings = scenario.settings(entry, 0)
            check_arguments(settings, allowed)
            _check_baseline(entry, options, settings)
        if entry.is_baseline:
            continue
        if entry.training:
            faults.add("a merge has no training of its own: it shares the experts", where=f"methods, {entry.name}", fix="leave it out")
        for number in sorted(numbers):
            with faults.collect():  # a run of as many experts, to have the options checked before there are any
                experts = [{"name": f"expert {i}", "path": "."} for i in range(number)]
                make_rules(parse(MergeRun, {**_run_of(entry), "base": ".", "experts": experts}, where=f"methods, {entry.name}"))


def _check_baseline(entry: MethodEntry, options: BaselineOptions | None, settings: TrainSettings) -> None:
    """Raises RunError for options of a baseline that do not fit how it trains, or name a merge method that there is not."""
    from recall_merge.maths.methods import METHODS

    where, faults = f"methods, {entry.name}", Faults()
    if isinstance(options, OLoraOptions) and settings.kind in WHOLE:
        faults.add("O-LoRA trains adapters, not whole models", where=where, fix="give `kind: lora`")
    if isinstance(options, ProtectedOptions):
        if options.start == "adapter" and settings.protect is not None and settings.protect.asks_for_rows:
            what, fix = "the adapter so far has its rows of A already", "leave out `protect.rows_of_a`, or `start: last`"
            faults.add(what, where=where, fix=fix)
        if method_named(options.merge) is None:
            faults.add(f"there is no merge method '{options.merge}'", where=where, fix=did_you_mean(options.merge, METHODS))
    faults.raise_any(RunError)


def _run_of(entry: MethodEntry) -> dict[str, Any]:
    """An entry's part of a run."""
    keys = entry.model_dump(mode="json", include={"weights", "scale_by_layer", "prune"})
    return {"method": entry.method, "options": entry.options, **{key: value for key, value in keys.items() if value is not None}}


def _baseline_options(entry: MethodEntry) -> BaselineOptions | None:
    where = f"options of {entry.name}"
    if entry.is_baseline and (entry.weights != "uniform" or entry.scale_by_layer or entry.prune):
        raise RunError(f"'{entry.method}' has no weights", where=where, fix="leave them out")
    if entry.method in BASELINE_OPTIONS:
        return parse(BASELINE_OPTIONS[entry.method], entry.options, where=where)
    if entry.is_baseline and entry.options:
        raise RunError(f"'{entry.method}' has no options", where=where, fix="leave them out")
    return None


@dataclass(frozen=True)
class _Jobs:
    """Makes the jobs of a scenario's trials."""

    scenario: Scenario
    base: Base
    train: Mapping[str, tuple[Row, ...]]
    questions: Mapping[str, Question]

    def trials(self) -> Iterator[Trial]:
        """The first order for every method, then the second: stopped at any time, the methods are compared on the same orders."""
        seeds, drawn = self.scenario.seeds, self.scenario.task_orders
        paired = self.scenario.trials == "paired"
        pairs = [(s, [order]) for s, order in zip(seeds, drawn, strict=True)] if paired else [(s, drawn) for s in seeds]
        for kind, (seed, orders) in itertools.product(self.scenario.kinds, pairs):
            columns = [[(entry, order) for order in self._orders(entry, kind, orders)] for entry in self.scenario.methods]
            for row in itertools.zip_longest(*columns):
                yield from (self._trial(entry, kind, order, seed) for entry, order in filter(None, row))

    def _orders(self, entry: MethodEntry, kind: Kind, drawn: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """The orders that a method is tried on: in the single-model scenario each task alone; one where the order does not matter."""
        if kind == "single-model":
            return [(task,) for task in self.train] if entry.method == "experts" or not entry.is_baseline else []
        return [tuple(self.train)] if entry.method in {"experts", "joint"} else drawn

    def _trial(self, entry: MethodEntry, kind: Kind, order: tuple[str, ...], seed: int) -> Trial:
        last = len(order)
        unseen = [*(task for task in self.train if task not in order), *(task.name for task in self.scenario.unseen)]
        scored: list[tuple[int, Scores]] = [(0, self.scores("the base", self.base, [*order, *unseen]))]
        if entry.method == "experts" and kind != "single-model":
            scored += [(last, self.scores(f"the expert of {task}", self.expert(task, seed), [task])) for task in order]
        elif entry.method == "joint":
            rows = _numbered([row for rows in self.train.values() for row in rows])
            model = Trained(f"{entry.name}, seed {seed}", self.base, rows, self.scenario.settings(entry, seed))
            scored.append((last, self.scores(model.label, model, [*order, *unseen])))
        else:
            for stage, model in enumerate(self._models(entry, kind, order, seed), start=1):
                if tasks := self._scored_tasks(order, stage, unseen):
                    scored.append((stage, self.scores(f"{entry.name} after {' > '.join(order[:stage])}", model, tasks)))
        scores = {(stage, question.task): job for stage, job in scored for question in job.questions}
        return Trial(kind, entry.name, order, seed, scores, tuple(job for _, job in scored))

    def scores(self, label: str, model: Model, tasks: Sequence[str]) -> Scores:
        return Scores(label, model, tuple(self.questions[task] for task in tasks))

    def _scored_tasks(self, order: tuple[str, ...], stage: int, unseen: list[str]) -> list[str]:
        """The tasks that the model after a stage is scored on."""
        scoring = self.scenario.scoring
        if stage == len(order):
            return [*order, *unseen]
        first, end = {"all": (0, len(order)), "learnt": (stage - 1, stage + 1), "last": (0, 0)}[scoring.stages]
        return list(order[first : end if scoring.unlearnt else min(stage, end)])

    def _models(self, entry: MethodEntry, kind: Kind, order: tuple[str, ...], seed: int) -> Iterator[Model]:
        """The model after each stage."""
        if isinstance(options := _baseline_options(entry), ProtectedOptions):
            yield from self._protected(entry, options, order, seed)
        elif isinstance(options, OLoraOptions):
            yield from self._o_lora(entry, options, order, seed)
        elif entry.is_baseline and entry.method != "experts":
            yield from self._fine_tuned(entry, order, seed)
        elif kind == "single-model":
            expert = self.expert(order[0], seed)
            yield expert if entry.method == "experts" else self._merge(entry, [(order[0], expert)], seed, f"{entry.name} of {order[0]}")
        elif kind == "multi-model":
            yield from (self._one_shot(entry, order[:stage], seed) for stage in range(1, len(order) + 1))
        else:
            yield from self._chain(entry, order, seed)

    def expert(self, task: str, seed: int) -> Trained:
        return Trained(f"the expert of {task}, seed {seed}", self.base, self.train[task], self.scenario.settings(None, seed))

    def _fine_tuned(self, entry: MethodEntry, order: tuple[str, ...], seed: int) -> Iterator[Trained]:
        """One task after another: the same adapter, or the same weights, are trained further."""
        settings, options = self.scenario.settings(entry, seed), _baseline_options(entry)
        model: Trained | None = None
        anchor: Anchor | None = None
        strength = 0.0
        for number, task in enumerate(order):
            rows = self.train[task]
            if isinstance(options, ReplayOptions):
                rows = _numbered([*rows, *(row for old in order[:number] for row in replayed(self.train[old], options.share, seed))])
            if isinstance(options, EwcOptions) and model is not None:
                before = order[number - 1]
                anchor = Anchor(f"what {before} needs, {model.label}", model, self.train[before][: options.rows], anchor)
                strength = options.strength
            model = Trained(f"{entry.name} after {' > '.join(order[: number + 1])}", self.base, rows, settings, model, anchor, strength)
            yield model

    def _o_lora(self, entry: MethodEntry, options: OLoraOptions, order: tuple[str, ...], seed: int) -> Iterator[Trained]:
        """A new adapter for each task on the model so far, at right angles to all before."""
        settings, learnt = self.scenario.settings(entry, seed), list[Trained]()
        for number, task in enumerate(order):
            label, base = f"{entry.name} after {' > '.join(order[: number + 1])}", _whole(learnt[-1]) if learnt else self.base
            strength = options.strength if learnt else 0.0
            learnt.append(Trained(label, base, self.train[task], settings, apart=tuple(learnt), strength=strength))
            yield learnt[-1]

    def _protected(self, entry: MethodEntry, options: ProtectedOptions, order: tuple[str, ...], seed: int) -> Iterator[Model]:
        """One task after another, each trained with the statistics of those before."""
        settings = self.scenario.settings(entry, seed)
        protect = settings.protect or Protect()
        settings = settings.model_copy(update={"protect": protect})
        own = ((OWN, OwnStatistics(f"the input statistics of the base, seed {seed}", self.base, seed)),) if protect.wants_base else ()
        learnt: list[tuple[str, Trained]] = []
        for number, task in enumerate(order):
            label = f"{entry.name} after {' > '.join(order[: number + 1])}"
            earlier = (*own, *((old, self._statistics(old, model, seed)) for old, model in learnt))
            if not earlier:
                newest = self.expert(task, seed)
            else:
                base = _whole(learnt[-1][1]) if learnt and options.start == "last" else self.base
                start = learnt[-1][1] if learnt and options.start == "adapter" else None
                newest = Trained(label, base, self.train[task], settings, start, earlier=earlier)
            learnt.append((task, newest))
            if options.start == "base" and number:
                yield self._merge(MethodEntry.model_validate(options.merge), learnt, seed, label)
            else:
                yield newest

    def _one_shot(self, entry: MethodEntry, learnt: tuple[str, ...], seed: int) -> Model:
        """All experts so far, merged at once. A single one is the model itself: there is nothing to merge."""
        if len(learnt) == 1:
            return self.expert(learnt[0], seed)
        # without an order of their own they come in the order listed, so that the same set of tasks is the same job
        tasks = learnt if self._order_matters(entry) else [task for task in self.train if task in learnt]
        return self._merge(entry, [(task, self.expert(task, seed)) for task in tasks], seed, f"{entry.name} after {' > '.join(learnt)}")

    def _chain(self, entry: MethodEntry, order: tuple[str, ...], seed: int) -> Iterator[Model]:
        """The last merge and the newest expert, merged."""
        last: Model = self.expert(order[0], seed)
        yield last
        for number, task in enumerate(order[1:], start=1):
            label = f"{entry.name} of the last merge and {task}, {' > '.join(order[: number + 1])}"
            newest: Model = self.expert(task, seed)
            if self.scenario.sequential.start == "merge":
                base = _whole(last)
                newest = _whole(replace(newest, label=f"{task} from the last merge of {entry.name}", base=base))
            last = self._merge(entry, [("last", last), (task, newest)], seed, label)
            yield last

    def _merge(self, entry: MethodEntry, experts: Sequence[tuple[str, Model]], seed: int, label: str) -> Merged:
        method = method_named(entry.method)
        assert method is not None  # the scenario was checked
        run = {**_run_of(entry), "seed": seed, "out": {"dtype": "float32"}}
        statistics = tuple(
            (name, self._statistics(name, model, seed)) for name, model in experts if method.informed and isinstance(model, Trained)
        )
        if not _has_samples(entry):
            return Merged(label, self.base, tuple(experts), run, statistics=statistics)
        return Merged(label, self.base, tuple(experts), {**run, "samples": self._samples}, self.train[experts[-1][0]], statistics)

    def _statistics(self, task: str, model: Trained, seed: int) -> StatisticsJob:
        return StatisticsJob(f"the input statistics of {task}, seed {seed}", model, self._samples, self._gradients)

    @cached_property
    def _samples(self) -> dict[str, Any]:
        return {**self.scenario.samples, "template": self.scenario.template}

    @cached_property
    def _gradients(self) -> bool:
        """Whether any method takes gradients: all statistics have them then, so that they are taken once."""
        return any(takes_gradients(entry.method) for entry in self.scenario.methods)

    def _order_matters(self, entry: MethodEntry) -> bool:
        """Whether a merge depends on the order of its experts: by the method, by its weights, or by the newest one's samples."""
        method = method_named(entry.method)
        return (method is not None and method.ordered) or _has_samples(entry) or isinstance(entry.weights, list | ByLayer)


def _has_samples(entry: MethodEntry) -> bool:
    from recall_merge.maths.methods import ALIASES

    return entry.method in ALIASES or isinstance(entry.weights, FromHiddenStates | FromLosses)


def _whole(model: Model) -> Base | Merged:
    """A model with weights of its own: an adapter on its base is written out."""
    if not isinstance(model, Trained):
        return model
    return Merged(f"{model.label}, written out", model.base, (("adapter", model),), {"method": "linear", "out": {"dtype": "float32"}})


def replayed(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A share of a task's rows, at least one, drawn by the seed and kept in their order.

    >>> rows = [Row(i, (), str(i)) for i in range(40)]
    >>> len(replayed(rows, 0.05, seed=0)), replayed(rows, 0.05, seed=0) == replayed(rows, 0.05, seed=0)
    (2, True)
    """
    count = max(1, round(share * len(rows)))
    return [rows[number] for number in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _numbered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of several files, numbered as if they came from one."""
    return tuple(replace(row, index=index) for index, row in enumerate(rows))
