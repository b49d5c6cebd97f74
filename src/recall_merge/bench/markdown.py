"""The page of a bench, in Markdown: what was compared, the numbers with their formulas, and what is missing."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from recall_merge.bench.design import Design
from recall_merge.bench.jobs import Merged, Store
from recall_merge.bench.scenario import BASELINES, MethodEntry, Scenario
from recall_merge.files.record import versions
from recall_merge.maths.metrics import FORMULAS
from recall_merge.runtime.errors import MissingExtra

if TYPE_CHECKING:
    from recall_merge.bench.results import MethodRow, Summary

SHORT = {
    "average_performance": "AP",
    "learning_accuracy": "learning accuracy",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer": "FWT",
    "retention": "retention",
    "unseen_delta": "unseen delta",
}
SIGNED = ("backward_transfer", "forgetting", "forward_transfer", "unseen_delta")
KINDS = {
    "multi-model": "Experts trained on their own from the base, merged in one shot after each task; a single expert is taken as it is.",
    "sequential": "After each task the last merge and the newest expert are merged; the first expert is taken as it is.",
    "single-model": "The base and one expert: each task is a trial of its own, and all other tasks count as unseen.",
}


def write_page(summary: Summary, design: Design, store: Store, command: str) -> None:
    """Write `summary.md`, and beside it the pictures where the `report` extra is installed."""
    pictures: list[Path] = []
    try:
        from recall_merge.report.bench_charts import draw_matrices, draw_numbers

        if summary.methods:
            pictures = [draw_numbers(summary, summary.folder / "numbers.png"), draw_matrices(summary, summary.folder / "R.png")]
    except MissingExtra:
        pass
    text = "\n".join(
        [
            *_head(summary, design, store, command),
            *_numbers(summary, design),
            *_tasks(summary),
            *_costs(design, store),
            *_foot(summary, pictures),
        ]
    )
    (summary.folder / "summary.md").write_text(text, "utf-8")


def _head(summary: Summary, design: Design, store: Store, command: str) -> list[str]:
    scenario, notes = design.scenario, store.notes()
    lines = ["# Bench", ""]
    if command:
        lines += ["```", command, "```", ""]
    lines += [f"- base: `{Path(scenario.model).name}`"]
    lines += [f"- orders: {'; '.join(' > '.join(order) for order in scenario.task_orders)}"]
    lines += [f"- seeds: {', '.join(map(str, scenario.seeds))}"]
    told = scenario.training.model_dump(mode="json", exclude={"seed", "template", "arguments"})
    lines += ["- training: " + ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)]
    lines += [f"- scoring: {scenario.scoring.dtype}, chat template {'on' if scenario.template else 'off'}; {_stages(scenario)}"]
    lines += [f"- machine: {_machine()}"]
    if notes:
        hours = sum(note["seconds"] for note in notes) / 60
        lines += [f"- time: {hours:.0f} minutes of work in {len(notes)} jobs, {scenario.workers} at a time, each on one thread"]
    lines += ["- versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()), ""]
    return [*lines, *_task_table(summary, design)]


def _stages(scenario: Scenario) -> str:
    return {
        "all": "all tasks learnt so far are scored after every stage",
        "learnt": "after each stage the newest task is scored, and all at the end: forgetting is from there, or from the base",
        "last": "tasks are scored at the end only",
    }[scenario.scoring.stages]


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _task_table(summary: Summary, design: Design) -> list[str]:
    base = {row.task: (row.score, row.metric) for row in summary.rows if row.stage == 0}
    rows = []
    for task in (*design.scenario.tasks, *design.scenario.unseen):
        score, metric = base.get(task.name, (float("nan"), task.metric or ""))
        question = design.questions[task.name]
        trained = str(design.train_rows.get(task.name, 0)) if task.name in design.train_rows else "none, unseen"
        rows.append(
            [task.name, task.kind, trained, str(len(question.rows)), metric, _number(score), _number(summary.experts.get(task.name))]
        )
    return [*_table(["task", "kind", "rows trained on", "rows scored", "metric", "base", "own expert"], rows), ""]


def _numbers(summary: Summary, design: Design) -> list[str]:
    lines: list[str] = []
    for kind in design.scenario.kinds:
        methods = [row for row in summary.methods if row.kind == kind]
        if not methods:
            continue
        known = [name for name in FORMULAS if any(not math.isnan(row.mean[name]) for row in methods)]
        rows = [[row.method, str(row.trials), *(_spread(row, name) for name in known)] for row in methods]
        lines += [f"## {kind.capitalize()}", "", KINDS[kind], ""]
        lines += [*_table(["method", "trials", *(SHORT[name] for name in known)], rows), ""]
        errors = [row.item_error for row in methods if not math.isnan(row.item_error)]
        if errors:
            lines += [
                f"Mean ± standard deviation over trials (orders and seeds). Beside it, the test rows are few: the standard error of AP over"
                f" them is {min(errors):.3f} to {max(errors):.3f}; methods are scored on the same rows, so differences are somewhat surer.",
                "",
            ]
        lines += [f"- {SHORT[name]}: {FORMULAS[name]}" for name in known] + [""]
    return [*lines, *map(_entry, design.scenario.methods), ""]


def _entry(entry: MethodEntry) -> str:
    """What a method of the tables is."""
    given: dict[str, object] = {**entry.options, **entry.training}
    given |= {key: value for key, value in entry.model_dump(exclude_defaults=True).items() if key in ("scale_by_layer", "prune")}
    if entry.weights != "uniform":
        given["weights"] = entry.model_dump(mode="json", exclude_unset=True)["weights"]
    what = BASELINES.get(entry.method, f"the merge method `{entry.method}`")
    return f"- {entry.name}: {what}" + (f" ({', '.join(f'{key} {value}' for key, value in given.items())})" if given else "")


def _tasks(summary: Summary) -> list[str]:
    lines: list[str] = []
    for kind in dict.fromkeys(row.kind for row in summary.methods):
        methods = [row for row in summary.methods if row.kind == kind]
        tasks = list(dict.fromkeys(task for row in methods for task in row.final))
        base = {row.task: row.score for row in summary.rows if row.stage == 0}
        rows = [["the base", *(_number(base.get(task)) for task in tasks)]]
        rows += [[row.method, *(_number(row.final.get(task)) for task in tasks)] for row in methods]
        lines += [f"Mean score of each task at the end, {kind}:", "", *_table(["method", *tasks], rows), ""]
    return lines


def _costs(design: Design, store: Store) -> list[str]:
    """What the last merges of every method took, and the statistics that they were made by."""
    rows = []
    for method in dict.fromkeys(trial.method for trial in design.trials):
        merges = [trial.jobs[-1].model for trial in design.trials if trial.method == method and isinstance(trial.jobs[-1].model, Merged)]
        seconds = [taken for merge in merges if (taken := store.merge_seconds(merge)) is not None]
        if not seconds:
            continue
        statistics = [cost for merge in merges for _, stats in merge.statistics if (cost := store.statistics_cost(stats)) is not None]
        told = ["-", "-"]
        if statistics:
            sizes, times = zip(*statistics, strict=True)
            told = [f"{fmean(sizes) / 1e6:.1f} MB", f"{fmean(times):.0f} s"]
        rows.append([method, f"{fmean(seconds):.1f} s", *told])
    if not rows:
        return []
    head = ["method", "weights and merge", "input statistics", "made in"]
    return ["What a merge of all experts takes on one thread, besides reading the base once more to run it:", "", *_table(head, rows), ""]


def _foot(summary: Summary, pictures: Sequence[Path]) -> list[str]:
    lines = [f"![{picture.stem}]({picture.name})" for picture in pictures]
    if summary.unfinished:
        left = ", ".join(f"{method} ({kind}): {count} trials" for (kind, method), count in summary.unfinished.items())
        lines += ["", f"Not finished, and not in the tables: {left}."]
    return [*lines, ""]


def _spread(row: MethodRow, name: str) -> str:
    mean, spread = row.mean[name], row.spread[name]
    return _number(mean, signed=name in SIGNED) + ("" if math.isnan(mean) or math.isnan(spread) else f" ± {spread:.3f}")


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(jobs) + " |" for jobs in (head, ["---"] * len(head), *rows)]


def shown(row: MethodRow) -> Mapping[str, str]:
    """A method's numbers as the page has them."""
    return {SHORT[name]: _spread(row, name) for name in FORMULAS}
