"""The results of a bench in Markdown: what was compared, the numbers with their formulas, and what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recall_merge.bench.design import Design
from recall_merge.bench.results import NAN, Results, Spread, Table
from recall_merge.bench.scenario import BASELINES, KINDS, MethodEntry
from recall_merge.files.record import versions
from recall_merge.maths.metrics import METRICS

STAGES = {
    "all": "all tasks learnt so far are scored after every stage",
    "learnt": "after each stage the newest task is scored, and all at the end: forgetting is from there, or from the base",
    "last": "tasks are scored at the end only",
}


def summary_page(results: Results, design: Design, notes: Sequence[dict[str, Any]], *, command: str, pictures: Sequence[Path]) -> str:
    """The page. `notes` are the store's; `command` is what a reader should type to get these results again."""
    lines = [*_head(design, notes, command), *_tasks(results, design)]
    for kind in results.kinds:
        lines += [f"## {kind.capitalize()}", "", KINDS[kind], "", *_numbers(results, kind)]
    lines += [*map(_entry, design.scenario.methods), "", *(f"![{picture.stem}]({picture.name})" for picture in pictures)]
    if results.unfinished:
        left = ", ".join(f"{method} ({kind}): {count} trials" for (kind, method), count in results.unfinished.items())
        lines += ["", f"Not finished, and not in the tables: {left}."]
    return "\n".join([*lines, ""])


def _head(design: Design, notes: Sequence[dict[str, Any]], command: str) -> Iterator[str]:
    scenario = design.scenario
    settings = scenario.training.model_dump(mode="json", exclude={"seed", "template", "arguments"})
    yield from ("# Bench", "", *(["```", command, "```", ""] if command else []))
    yield f"- base: `{Path(scenario.model).name}`"
    yield f"- orders: {'; '.join(' > '.join(order) for order in scenario.task_orders)}"
    yield f"- seeds: {', '.join(map(str, scenario.seeds))}"
    yield "- training: " + ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    yield (f"- scoring: {scenario.scoring.dtype}, chat template {'on' if scenario.template else 'off'}; {STAGES[scenario.scoring.stages]}")
    accelerator = "" if design.base.hardware == "cpu" else f"; {design.base.hardware}"
    yield f"- machine: {_processor()}, {os.cpu_count()} cores, {platform.system()}{accelerator}"
    if notes:
        minutes = sum(note["seconds"] for note in notes) / 60
        yield f"- time: {minutes:.0f} minutes of work in {len(notes)} jobs, {scenario.workers} at a time, each on one thread"
    yield from ("- versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()), "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _tasks(results: Results, design: Design) -> list[str]:
    metrics = dict(zip(results.scores["task"], results.scores["metric"], strict=True))
    rows = []
    for task in (*design.scenario.tasks, *design.scenario.unseen):
        trained = design.train_rows.get(task.name, "none, unseen")
        scores = (Spread(known.get(task.name, NAN)) for known in (results.base_scores, results.experts))
        scored = len(design.questions[task.name].rows)
        rows.append([task.name, task.kind, trained, scored, metrics.get(task.name, task.metric or ""), *scores])
    return _table(Table(["task", "kind", "rows trained on", "rows scored", "metric", "base", "own expert"], rows))


def _numbers(results: Results, kind: str) -> Iterator[str]:
    yield from _table(results.numbers_table(kind))
    if errors := results.item_errors(kind):
        yield (
            "Mean ± standard deviation over trials (orders and seeds). The test rows are few: from them alone, AP has a standard error"
            f" of {min(errors):.3f} to {max(errors):.3f}. Methods are scored on the same rows, so their differences are somewhat surer."
        )
        yield ""
    yield from (f"- {METRICS[name].short}: {METRICS[name].formula}" for name in results.known(kind))
    yield from ("", f"Mean score of each task at the end, {kind}:", "", *_table(results.final_table(kind)))
    if (costs := results.costs_table(kind)).rows:
        yield "On one thread: all that a stage makes, without scores; the merge of all experts, without reading the base once more to"
        yield from ("run it; and the input statistics of an expert.", "", *_table(costs))


def _entry(entry: MethodEntry) -> str:
    """What a method of the tables is."""
    options = {**entry.options, **entry.training, **entry.model_dump(exclude_defaults=True, include={"scale_by_layer", "prune"})}
    if entry.weights != "uniform":
        options["weights"] = entry.model_dump(mode="json", exclude_unset=True)["weights"]
    what = BASELINES.get(entry.method, f"the merge method `{entry.method}`")
    return f"- {entry.name}: {what}" + (f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else "")


def _table(table: Table) -> list[str]:
    return [*("| " + " | ".join(map(str, cells)) + " |" for cells in (table.head, ["---"] * len(table.head), *table.rows)), ""]
