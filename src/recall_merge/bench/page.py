"""The page of a bench: methods against tasks, orders, what is kept and what is paid, from the tables that `recall bench` writes."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recall_merge.maths.metrics import FORMULAS
from recall_merge.report import bench_charts as charts
from recall_merge.report.page import Figure, Page, Section, Table, Text
from recall_merge.runtime.errors import DataError

SCORES, NUMBERS = "scores.csv", "numbers.csv"
TITLES = {
    "average_performance": "average performance",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "retention": "retention of the experts' gains",
    "unseen_delta": "tasks not trained on, less the base",
}
KINDS = {
    "multi-model": "experts merged in one shot",
    "sequential": "the last merge and the newest expert",
    "single-model": "the base and one expert",
}
Row = dict[str, str]


@dataclass(frozen=True)
class Tables:
    """The scores and numbers of one kind of a bench."""

    kind: str
    scores: Sequence[Row]
    numbers: Sequence[Row]

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.numbers))

    @cached_property
    def trials(self) -> list[tuple[str, str]]:
        """(order, seed) of every trial, those with an order of their own."""
        return list(dict.fromkeys((row["order"], row["seed"]) for row in self.numbers))

    def values(self, method: str, name: str) -> list[float]:
        return [float(row[name]) for row in self.numbers if row["method"] == method and row.get(name)]

    def last(self) -> list[Row]:
        """The scores at the end."""
        return [row for row in self.scores if int(row["stage"]) == len(row["order"].split(" > ")) and _counts(row, self.kind)]


def is_bench(folder: Path) -> bool:
    return (folder / SCORES).is_file() and (folder / NUMBERS).is_file()


def bench_page(folder: Path) -> Page:
    """The page of a bench's folder.

    Raises:
        DataError: if its tables cannot be read, or no trial of it is complete.
    """
    scores, numbers = (
        _read(folder / SCORES, {"kind", "method", "order", "stage", "task", "seen", "score", "n"}),
        _read(folder / NUMBERS, {"kind", "method", "seed", "order", *TITLES}),
    )
    if not numbers:
        raise DataError("no trial of this bench is complete", where=folder, fix="let `recall bench` go on, then `recall bench --summary`")
    kinds = list(dict.fromkeys(row["kind"] for row in numbers))
    tables = [Tables(kind, [r for r in scores if r["kind"] == kind], [r for r in numbers if r["kind"] == kind]) for kind in kinds]
    sections = [section for one in tables for section in _sections(one)]
    words = [word for one in tables for word in _lede(one)]
    counts = {what: len({row[what] for row in numbers}) for what in ("method", "order", "seed")}
    subject = ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())
    return Page(f"Bench: {folder.absolute().resolve().name}", subject, words, sections, [(TITLES[name], FORMULAS[name]) for name in TITLES])


def _sections(tables: Tables) -> Iterator[Section]:
    kind = tables.kind
    yield Section(
        f"{kind}-tasks", f"Methods and tasks, {kind}", [Text(f"{kind}: {KINDS.get(kind, kind)}."), _tasks(tables), *_all_numbers(tables)]
    )
    figures = [figure for figure in (_ranks(tables), _both(tables), _cost(tables)) if figure is not None]
    if figures:
        yield Section(f"{kind}-trade", f"Orders, what is kept elsewhere, and what it costs, {kind}", figures)
    yield Section(f"{kind}-numbers", f"All numbers, {kind}", [_table(tables)])


def _lede(tables: Tables) -> Iterator[str]:
    means = {method: values for method in tables.methods if (values := tables.values(method, "average_performance"))}
    ranked = sorted(means, key=lambda method: -statistics.fmean(means[method]))
    shown = [f"{method} {_spread(means[method])}" for method in ranked]
    yield f"{tables.kind}, average performance at the end: {'; '.join(shown)}."
    errors = [float(row["item_error"]) for row in tables.numbers if row.get("item_error")]
    if errors:
        yield (
            f"± is the spread over trials (standard deviation). The test rows alone make each uncertain by {min(errors):.3f} to"
            f" {max(errors):.3f} (standard error): smaller differences say little."
        )
    counts = {method: len(values) for method, values in means.items()}
    if len(set(counts.values())) > 1:
        yield "Not all methods have the same number of trials: " + ", ".join(f"{method} {count}" for method, count in counts.items()) + "."


def _tasks(tables: Tables) -> Figure:
    last = tables.last()
    base = [row for row in tables.scores if int(row["stage"]) == 0]
    seen = {row["task"] for row in last if row["seen"] == "true"}
    tasks = sorted(dict.fromkeys(row["task"] for row in (*last, *base)), key=lambda task: task not in seen)
    names = {task: task if task in seen else f"{task} (unseen)" for task in tasks}
    groups = {("the base", task): [r for r in base if r["task"] == task] for task in tasks}
    groups |= {
        (method, task): [r for r in last if (r["method"], r["task"]) == (method, task)] for method in tables.methods for task in tasks
    }
    found = {key: [float(row["score"]) for row in rows] for key, rows in groups.items() if rows}
    jobs = [
        {
            "method": method,
            "task": names[task],
            "score": statistics.fmean(values),
            "shown": _spread(values if method != "the base" else values[:1]),
        }
        for (method, task), values in found.items()
    ]
    methods = ["the base", *tables.methods]
    rows = [
        [m, *(_spread(found[m, t] if m != "the base" else found[m, t][:1]) if (m, t) in found else "-" for t in tasks)] for m in methods
    ]
    says = "The mean score of each task at the end; the table has the spread over trials. Scores run from 0 to 1, each in its own metric."
    chart = charts.methods_by_tasks(jobs, methods, list(names.values()))
    return Figure(f"{tables.kind}-methods-tasks", "Each method on each task", says, chart, ["method", *names.values()], rows)


def _all_numbers(tables: Tables) -> Iterator[Figure]:
    for name, title in TITLES.items():
        points = [
            {"method": row["method"], "value": float(row[name]), "order": f"{row['order']}, seed {row['seed']}"}
            for row in tables.numbers
            if row.get(name)
        ]
        methods = list(dict.fromkeys(point["method"] for point in points))
        if points:
            rows = [[method, _spread(tables.values(method, name)), str(len(tables.values(method, name)))] for method in methods]
            says = f"{FORMULAS[name][0].upper()}{FORMULAS[name][1:]}. Bars are means, points are trials."
            figure = charts.dots(points, methods, title)
            yield Figure(
                f"{tables.kind}-{name.replace('_', '-')}", title.capitalize(), says, figure, ["method", "mean ± spread", "trials"], rows
            )


def _ranks(tables: Tables) -> Figure | None:
    """Places by average performance, among the methods that have a trial in every order that is compared."""
    by_trial = {trial: {} for trial in tables.trials}
    for row in tables.numbers:
        if row["average_performance"]:
            by_trial[row["order"], row["seed"]][row["method"]] = float(row["average_performance"])
    full = {trial: found for trial, found in by_trial.items() if len(found) > 1}
    methods = [method for method in tables.methods if full and all(method in found for found in full.values())]
    if len(methods) < 2:
        return None
    names = {trial: str(number) for number, trial in enumerate(full, start=1)}
    jobs = []
    for trial, found in full.items():
        for method in methods:
            rank = 1 + sum(found[other] > found[method] for other in methods)
            order = f"{trial[0]}, seed {trial[1]}"
            jobs.append({"method": method, "trial": names[trial], "rank": rank, "value": found[method], "order": order})
    rows = [[m, *(str(c["rank"]) for c in jobs if c["method"] == m)] for m in methods]
    orders = "; ".join(f"{name}: {order}, seed {seed}" for (order, seed), name in names.items())
    says = f"Only methods with a trial in each of these orders. {orders}."
    return Figure(
        f"{tables.kind}-ranks",
        "Places from order to order",
        says,
        charts.ranks(jobs, methods, list(names.values())),
        ["method", *names.values()],
        rows,
    )


def _both(tables: Tables) -> Figure | None:
    points = _points(tables, "retention", "unseen_delta")
    if not points:
        return None
    says = "To the right, more is kept of what was learnt; up, better on tasks not trained on. Lines: standard deviation over trials."
    chart = charts.against(points, tables.methods, "retention of the experts' gains", "tasks not trained on, less the base")
    return _scatter(
        f"{tables.kind}-retention-unseen",
        "What is kept, and what is left elsewhere",
        says,
        chart,
        points,
        ["retention", "unseen-task delta"],
    )


def _cost(tables: Tables) -> Figure | None:
    points = _points(tables, "seconds", "average_performance")
    if not points:
        return None
    says = "All work behind one trial (training, merging, scoring), what it shares with others counted in full. Up and left is better."
    chart = charts.against(points, tables.methods, "seconds of work (log)", "average performance", log=True)
    return _scatter(f"{tables.kind}-cost-quality", "Cost against quality", says, chart, points, ["seconds", "average performance"])


def _points(tables: Tables, x: str, y: str) -> list[dict[str, Any]]:
    points = []
    for method in tables.methods:
        xs, ys = tables.values(method, x), tables.values(method, y)
        if xs and ys:
            ends = {
                f"{axis}_{end}": value
                for axis, values in (("x", xs), ("y", ys))
                for end, value in zip(("low", "high"), _ends(values), strict=True)
            }
            points.append({"method": method, "x": statistics.fmean(xs), "y": statistics.fmean(ys), **ends})
    return points


def _scatter(name: str, title: str, says: str, chart: Any, points: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Figure:
    rows = [[point["method"], f"{point['x']:.3f}", f"{point['y']:.3f}"] for point in points]
    return Figure(name, title, says, chart, ["method", *columns], rows)


def _table(tables: Tables) -> Table:
    names = [name for name in FORMULAS if any(row.get(name) for row in tables.numbers)]
    rows = [
        [method, str(sum(row["method"] == method for row in tables.numbers)), *(_spread(tables.values(method, name)) for name in names)]
        for method in tables.methods
    ]
    return Table("Mean ± standard deviation over trials", ["method", "trials", *(name.replace("_", " ") for name in names)], rows)


def _ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return mean - spread, mean + spread


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _counts(row: Row, kind: str) -> bool:
    """In the single-model scenario a trial's own task is what counts at its end; elsewhere all tasks."""
    return kind != "single-model" or row["seen"] == "true"


def _read(path: Path, needed: set[str]) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"this table cannot be read: {error}", where=path, fix="write it again: recall bench SCENARIO.yaml --summary"
        ) from error
    if rows and (missing := sorted(needed - set(rows[0]))):
        raise DataError(
            f"the table lacks the column '{missing[0]}'", where=path, fix="write it again: recall bench SCENARIO.yaml --summary"
        )
    return rows
