"""From jobs to results: R of every trial, the numbers of continual learning, one tidy table of scores, a page in Markdown, pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.bench.design import Design, Trial
from recall_merge.bench.jobs import Store
from recall_merge.maths.metrics import FORMULAS, continual_metrics

if TYPE_CHECKING:
    import numpy as np

NUMBERS = tuple(FORMULAS)
OF_STAGES = ("learning_accuracy", "backward_transfer", "forgetting", "forward_transfer")  # what a model without stages does not have


@dataclass(frozen=True)
class ScoreRow:
    """One row of the tidy table: one model on one task."""

    kind: str
    method: str
    seed: int
    order: str
    """The tasks as they arrive, with ' > ' between them."""
    stage: int
    learnt: str
    """The task of this stage; empty for the base."""
    task: str
    seen: bool
    """The model, or one that it is merged from, was trained on this task."""
    metric: str
    score: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Measured:
    """A trial with its numbers; those that its scores do not give are NaN.

    Attributes:
        scores: R, (T + 1, T).
        item_error: standard error of the average performance over test items, the tasks being given.
    """

    trial: Trial
    scores: np.ndarray
    numbers: Mapping[str, float]
    item_error: float


@dataclass(frozen=True)
class MethodRow:
    """A method's numbers over its orders and seeds."""

    kind: str
    method: str
    trials: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    """Standard deviation over the trials (n - 1); NaN for a single one."""
    item_error: float
    """Of the average performance: the mean over the trials, which share their test items."""
    final: Mapping[str, float]
    """Mean score of each task at the end, unseen ones too."""
    final_spread: Mapping[str, float]
    """Its standard deviation over the trials."""


@dataclass(frozen=True)
class Summary:
    """All results of a bench, of the trials that are complete."""

    folder: Path
    rows: tuple[ScoreRow, ...]
    measured: tuple[Measured, ...]
    methods: tuple[MethodRow, ...]
    experts: Mapping[str, float]
    """Mean over seeds of the score of each task's own expert; NaN where it is not known yet."""
    unfinished: Mapping[tuple[str, str], int]
    """(kind, method) -> trials that are not complete."""

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "methods": [_plain(asdict(row)) for row in self.methods],
            "experts": _plain(dict(self.experts)),
            "unfinished": [{"kind": kind, "method": method, "trials": left} for (kind, method), left in self.unfinished.items()],
        }


def summarise(design: Design, store: Store, folder: Path, *, command: str = "") -> Summary:
    """Write the results of all trials that are complete: `scores` and `numbers` as CSV and Parquet, `R.json`, `summary.md`, pictures."""
    from recall_merge.bench.markdown import write_page

    complete = [trial for trial in design.trials if not any(store.missing(job) for job in trial.jobs)]
    rows = [row for trial in complete for row in _score_rows(trial, design, store)]
    experts = {key: _expert(key, design, store) for key in design.experts}
    measured = [_measure(trial, design, store, experts) for trial in complete]
    unfinished: dict[tuple[str, str], int] = {}
    for trial in design.trials:
        if trial not in complete:
            unfinished[trial.kind, trial.method] = unfinished.get((trial.kind, trial.method), 0) + 1
    means = {task: _mean([score for (_, name), score in experts.items() if name == task]) for task in dict.fromkeys(t for _, t in experts)}
    summary = Summary(folder, tuple(rows), tuple(measured), tuple(_methods(measured, rows)), means, unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "scores", [asdict(row) for row in rows])
    _write_table(folder / "numbers", [_number_row(one, store.seconds(one.trial.jobs)) for one in measured])
    (folder / "R.json").write_text(json.dumps([_matrix(one) for one in measured], indent=1) + "\n", "utf-8")
    write_page(summary, design, store, command)
    return summary


def _score_rows(trial: Trial, design: Design, store: Store) -> list[ScoreRow]:
    rows = []
    for (stage, task), job in trial.scores.items():
        score = store.score(job, design.questions[task])
        learnt = trial.order[stage - 1] if stage else ""
        # a model without stages is there at the end, with all tasks in it
        seen = task in trial.order[:stage]
        told = (score["metric"], score["score"], score["stderr"], score["n"])
        rows.append(ScoreRow(trial.kind, trial.method, trial.seed, " > ".join(trial.order), stage, learnt, task, seen, *told))
    return rows


def _expert(key: tuple[int, str], design: Design, store: Store) -> float:
    job = design.experts[key]
    return float("nan") if store.missing(job) else store.score(job, design.questions[key[1]])["score"]


def _measure(trial: Trial, design: Design, store: Store, experts: Mapping[tuple[int, str], float]) -> Measured:
    import numpy as np

    last = len(trial.order)

    def taken(stage: int, task: str) -> dict[str, Any]:
        job = trial.scores.get((stage, task))
        return store.score(job, design.questions[task]) if job is not None else {"score": float("nan"), "stderr": float("nan")}

    scores = np.array([[taken(stage, task)["score"] for task in trial.order] for stage in range(last + 1)], dtype=np.float64)
    unseen = [task for stage, task in trial.scores if stage == last and task not in trial.order]
    ends = tuple([taken(stage, task)["score"] for task in unseen] for stage in (0, last))
    own = [experts[trial.seed, task] for task in trial.order]
    numbers = continual_metrics(scores, experts=own, unseen=(ends[0], ends[1]) if unseen else None)
    for name in NUMBERS:
        if name not in numbers or (name in OF_STAGES and not trial.staged):
            numbers[name] = float("nan")
    errors = [taken(last, task)["stderr"] for task in trial.order]
    known = [float("nan") if error is None else error for error in errors]
    return Measured(trial, scores, numbers, math.sqrt(sum(error**2 for error in known)) / last)


def _methods(measured: Sequence[Measured], rows: Sequence[ScoreRow]) -> list[MethodRow]:
    found = []
    for kind, method in dict.fromkeys((one.trial.kind, one.trial.method) for one in measured):
        own = [one for one in measured if (one.trial.kind, one.trial.method) == (kind, method)]
        values = {name: [one.numbers[name] for one in own] for name in NUMBERS}
        last = [row for row in rows if (row.kind, row.method) == (kind, method) and row.stage == len(row.order.split(" > "))]
        if kind == "single-model":
            last = [row for row in last if row.seen or " > " in row.order]
        tasks = dict.fromkeys(row.task for row in last)
        ends = {task: [row.score for row in last if row.task == task] for task in tasks}
        final, final_spread = ({task: of(scores) for task, scores in ends.items()} for of in (_mean, _spread))
        mean = {name: _mean(numbers) for name, numbers in values.items()}
        spread = {name: _spread(numbers) for name, numbers in values.items()}
        found.append(MethodRow(kind, method, len(own), mean, spread, _mean([one.item_error for one in own]), final, final_spread))
    return found


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else float("nan")


def _number_row(one: Measured, seconds: float | None) -> dict[str, Any]:
    trial = one.trial
    where = {"kind": trial.kind, "method": trial.method, "seed": trial.seed, "order": " > ".join(trial.order)}
    return {**where, **{name: one.numbers[name] for name in NUMBERS}, "item_error": one.item_error, "seconds": seconds}


def _matrix(one: Measured) -> dict[str, Any]:
    trial = one.trial
    rows = [[None if math.isnan(score) else round(score, 6) for score in row] for row in one.scores.tolist()]
    return {
        "kind": trial.kind,
        "method": trial.method,
        "seed": trial.seed,
        "order": list(trial.order),
        "stages": ["base", *trial.order],
        "R": rows,
    }


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same table as Parquet and as CSV, where a number that is not known is empty."""
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.Table.from_pylist([_plain(row) for row in rows])
    parquet.write_table(table, path.with_suffix(".parquet"))
    csv.write_csv(table, path.with_suffix(".csv"))


def _plain(value: Any) -> Any:
    """NaN as None, also inside."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
