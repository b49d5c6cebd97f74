"""The results of a bench: a table of scores, a table of trials, and what pages and terminals print of both."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from recall_merge.bench.design import Design, Trial
from recall_merge.bench.jobs import Merged, Scores, Store, with_needs
from recall_merge.bench.scenario import ARROW
from recall_merge.maths.metrics import METRICS, none_if_nan, score_table, table_metrics
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import DataError

Frame = Any  # pandas.DataFrame, whose annotations cannot tell a table from a column
TRIAL: Any = {"kind": "str", "method": "str", "seed": "int64", "order": "str"}
# stage 0 is the base; seen: the model, or one that it is merged from, was trained on the task
SCORES = TRIAL | {"stage": "int64", "learnt": "str", "task": "str", "seen": "bool", "metric": "str"}
SCORES |= {"score": "float64", "stderr": "float64", "n": "int64"}
# all work behind a trial; its last merge alone; the mean over its experts of what input statistics take; what a stage takes on average,
# without scores, and the most memory that a process held
COSTS = ("seconds", "merge_seconds", "statistics_bytes", "statistics_seconds", "stage_seconds", "peak_bytes")
NUMBERS = TRIAL | dict.fromkeys((*METRICS, "item_error", *COSTS), "float64")
NAN = math.nan


class Spread(NamedTuple):
    """A number over the trials that have it."""

    mean: float = NAN  # where no trial has it
    deviation: float = NAN  # standard deviation (n - 1); NaN for a single trial
    trials: int = 0
    signed: bool = False

    def __str__(self) -> str:
        """
        >>> str(Spread(0.5, 0.1, 2)), str(Spread(0.5, trials=1, signed=True)), str(Spread())
        ('0.500 ± 0.100', '+0.500', '-')
        """
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:{'+' if self.signed else ''}.3f}" + ("" if math.isnan(self.deviation) else f" ± {self.deviation:.3f}")


@dataclass(frozen=True)
class MethodResults:
    """A method over its orders and seeds, in one kind of scenario."""

    kind: str
    method: str
    trials: int
    numbers: Mapping[str, Spread]  # by the columns of the table of trials
    final: Mapping[str, Spread]  # the score of each task at the end, unseen ones too


class Table(NamedTuple):
    """A table to print. Each row begins with a name; `str` puts what follows in words."""

    head: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Results:
    """All results of a bench, of the trials that are complete."""

    folder: Path
    scores: Frame  # one row per score, with the columns `SCORES`
    numbers: Frame  # one row per trial, with the columns `NUMBERS`; NaN where the scores do not give a number
    experts: Mapping[str, float] = field(default_factory=dict)  # mean score of each task's own expert; NaN where it is not known yet
    unfinished: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (kind, method) -> trials that are not complete

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(self.numbers["kind"]))

    @cached_property
    def methods(self) -> list[MethodResults]:
        """All methods of all kinds, in the order of the scenario."""
        ends = self.scores[self.scores["stage"] == self.scores["order"].str.count(ARROW) + 1]
        ends = ends[ends["seen"] | (ends["kind"] != "single-model")]  # where each task is a trial, its own score counts
        final: dict[Any, dict[str, Spread]] = {}
        for (kind, method, task), scores in ends.groupby(["kind", "method", "task"], sort=False)["score"]:
            final.setdefault((kind, method), {})[task] = _spread(scores)
        columns = [name for name in NUMBERS if name not in TRIAL]
        return [
            MethodResults(kind, method, len(rows), {name: _spread(rows[name], name) for name in columns}, final[kind, method])
            for (kind, method), rows in self.numbers.groupby(["kind", "method"], sort=False)
        ]

    def of_kind(self, kind: str) -> list[MethodResults]:
        return [row for row in self.methods if row.kind == kind]

    @property
    def base_scores(self) -> dict[str, float]:
        """The base's score on each task."""
        rows = self.scores[self.scores["stage"] == 0]
        return dict(zip(rows["task"], rows["score"], strict=True))

    def known(self, kind: str) -> list[str]:
        """The numbers of continual learning that a method has."""
        return [name for name in METRICS if any(row.numbers[name].trials for row in self.of_kind(kind))]

    def numbers_table(self, kind: str) -> Table:
        names = self.known(kind)
        rows = [[row.method, row.trials, *(row.numbers[name] for name in names)] for row in self.of_kind(kind)]
        return Table(["method", "trials", *(METRICS[name].short for name in names)], rows)

    def final_table(self, kind: str) -> Table:
        """The score of each task at the end and, for the base, before: the tasks that are learnt first, then the others."""
        learnt = set(self.scores["task"][self.scores["seen"]])
        finals = {"the base": {task: Spread(score, trials=1) for task, score in self.base_scores.items()}}
        finals |= {row.method: row.final for row in self.of_kind(kind)}
        tasks = sorted(dict.fromkeys(task for final in finals.values() for task in final), key=lambda task: task not in learnt)
        head = ["method", *(task if task in learnt else f"{task} (unseen)" for task in tasks)]
        return Table(head, [[name, *(final.get(task, Spread()) for task in tasks)] for name, final in finals.items()])

    def costs_table(self, kind: str) -> Table:
        """What a stage takes without scores, what the last merges took, and the input statistics that they were made by."""

        def said(value: float, unit: str, size: float = 1.0) -> str:
            return "-" if math.isnan(value) else f"{value / size:.{0 if unit == 's' else 1}f} {unit}"

        rows = []
        for row in self.of_kind(kind):
            merge, size, made, stage, peak = (row.numbers[name].mean for name in COSTS[1:])
            merged = "-" if math.isnan(merge) else f"{merge:.1f} s"
            rows.append([row.method, said(stage, "s"), said(peak, "GB", 1e9), merged, said(size, "MB", 1e6), said(made, "s")])
        head = ["method", "a stage", "peak memory", "weights and merge", "input statistics", "made in"]
        return Table(head, [row for row in rows if {*row[1:]} != {"-"}])

    def item_errors(self, kind: str) -> list[float]:
        """The standard error of each method's average performance over test items."""
        return [row.numbers["item_error"].mean for row in self.of_kind(kind) if row.numbers["item_error"].trials]

    def matrices(self) -> list[dict[str, Any]]:
        """R of every trial: a row per stage from the base on, a column per task in the order of learning; None where no score was taken."""
        found = []
        for (kind, method, seed, order), rows in self.scores.groupby(list(TRIAL), sort=False):
            tasks = order.split(ARROW)
            taken = dict(zip(zip(rows["stage"], rows["task"], strict=True), rows["score"], strict=True))
            r = score_table(taken, tasks, experts={})[:-1].tolist()
            values = [[none_if_nan(round(score, 6)) for score in row] for row in r]
            found.append({"kind": kind, "method": method, "seed": seed, "order": tasks, "stages": ["base", *tasks], "R": values})
        return found

    def write(self) -> None:
        """Write `scores` and `numbers` as CSV and Parquet, where an unknown number is empty, and `R.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, table in (("scores", self.scores), ("numbers", self.numbers)):
            table.to_parquet(self.folder / f"{name}.parquet", index=False)
            table.to_csv(self.folder / f"{name}.csv", index=False)
        write_whole(self.folder / "R.json", json.dumps(self.matrices(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        def plain(numbers: Mapping[str, Spread]) -> dict[str, Any]:
            return {name: {key: none_if_nan(value) for key, value in spread._asdict().items()} for name, spread in numbers.items()}

        return {
            "folder": str(self.folder),
            "methods": [vars(row) | {"numbers": plain(row.numbers), "final": plain(row.final)} for row in self.methods],
            "experts": {task: none_if_nan(score) for task, score in self.experts.items()},
            "unfinished": [{"kind": kind, "method": method, "trials": left} for (kind, method), left in self.unfinished.items()],
        }


def gather(design: Design, store: Store, folder: Path) -> Results:
    """The results of all trials that are complete."""
    from pandas import DataFrame

    unfinished = Counter[tuple[str, str]]()
    own = {
        (seed, task): NAN if store.missing(job) else store.read("scores", job.score_key(design.questions[task]))["score"]
        for (seed, task), job in design.experts.items()
    }
    scores: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []
    for trial in design.trials:
        if any(store.missing(job) for job in trial.jobs):
            unfinished[trial.kind, trial.method] += 1
            continue
        named = {"kind": trial.kind, "method": trial.method, "seed": trial.seed, "order": ARROW.join(trial.order)}
        taken = {(stage, task): store.read("scores", job.score_key(design.questions[task])) for (stage, task), job in trial.scores.items()}
        for (stage, task), score in taken.items():
            at = {"stage": stage, "learnt": trial.order[stage - 1] if stage else "", "task": task, "seen": task in trial.order[:stage]}
            scores.append(named | at | {key: score[key] for key in ("metric", "score", "stderr", "n")})
        numbers.append(named | _metrics(trial, taken, {task: own[trial.seed, task] for task in trial.order}) | _costs(trial, store))
    tables = [DataFrame(rows, columns=list(types)).astype(types) for rows, types in ((scores, SCORES), (numbers, NUMBERS))]
    experts = {name: [score for (_, task), score in own.items() if task == name] for _, name in own}
    return Results(folder, tables[0], tables[1], {task: sum(values) / len(values) for task, values in experts.items()}, unfinished)


def read_results(folder: Path) -> Results:
    """The results in a folder, from its tables. Raises DataError if one cannot be read, or lacks a column."""
    import pandas

    tables = []
    for path, types in ((folder / "scores.csv", SCORES), (folder / "numbers.csv", NUMBERS)):
        fix = "write it again: recall bench SCENARIO.yaml --summary"
        unknown = {name: [""] for name, kind in types.items() if kind == "float64"}  # elsewhere 'nan' may be a method's name
        try:
            table = pandas.read_csv(path, dtype=types, keep_default_na=False, na_values=unknown)
        except (OSError, ValueError) as error:
            raise DataError(f"this table cannot be read: {error}", where=path, fix=fix) from error
        if missing := sorted(types.keys() - {*table, *COSTS}):
            raise DataError(f"the table lacks the column '{missing[0]}'", where=path, fix=fix)
        tables.append(table.reindex(columns=list(types)))
    return Results(folder, *tables)


def _metrics(trial: Trial, taken: Mapping[tuple[int, str], Mapping[str, Any]], experts: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a trial; those that need stages only where a model between the base and the last was scored."""
    last = len(trial.order)
    unseen = [task for stage, task in taken if stage == last and task not in trial.order]
    table = score_table({key: score["score"] for key, score in taken.items()}, trial.order, experts=experts, unseen=unseen)
    staged = any(0 < stage < last for stage, _ in taken)
    numbers = {name: NAN if METRICS[name].needs_stages and not staged else value for name, value in table_metrics(table).items()}
    errors = [taken[last, task]["stderr"] for task in trial.order]
    return numbers | {"item_error": NAN if None in errors else math.hypot(*errors) / last}


def _costs(trial: Trial, store: Store) -> dict[str, float | None]:
    """The columns `COSTS`, as far as they are known."""
    merge, costs = trial.jobs[-1].model, dict[str, float | None]({"seconds": store.seconds(trial.jobs)})
    made = [store.read("notes", job.key) for job in with_needs(trial.jobs) if not isinstance(job, Scores)]
    made += [store.read("merges", job.model.key) for job in trial.jobs if isinstance(job.model, Merged)]
    if known := [note["seconds"] for note in made if note]:
        costs["stage_seconds"] = sum(known) / len(trial.order)
    costs["peak_bytes"] = max((note["peak_bytes"] for note in made if "peak_bytes" in note), default=None)
    if isinstance(merge, Merged):
        costs["merge_seconds"] = store.read("merges", merge.key).get("seconds")
        jobs = [job for _, job in merge.statistics if store.is_done(job)]
        if jobs:
            sizes = [file.stat().st_size for job in jobs for file in store.path_of(job).glob("stats.*")]
            costs["statistics_bytes"] = sum(sizes) / len(jobs)
            costs["statistics_seconds"] = sum(store.read("notes", job.key)["seconds"] for job in jobs) / len(jobs)
    return costs


def _spread(values: Any, name: str = "") -> Spread:
    return Spread(float(values.mean()), float(values.std()), int(values.count()), name in METRICS and METRICS[name].signed)
