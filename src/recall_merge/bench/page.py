"""The results of a bench as an HTML page: methods against tasks and orders, what is kept, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recall_merge.bench.results import Results, Spread, read_results
from recall_merge.bench.scenario import KINDS
from recall_merge.maths.metrics import METRICS
from recall_merge.report import bench_charts as charts
from recall_merge.report import page
from recall_merge.report.page import Figure, Page, Section, Text
from recall_merge.report.pictures import save_chart
from recall_merge.runtime.errors import DataError

PLOTTED = ("average_performance", "backward_transfer", "forgetting", "retention", "unseen_delta")


def is_bench(folder: Path) -> bool:
    return (folder / "scores.csv").is_file() and (folder / "numbers.csv").is_file()


def bench_page(folder: Path) -> Page:
    """The page of a bench's folder. Raises DataError if its tables cannot be read, or no trial is complete."""
    results = read_results(folder)
    if results.numbers.empty:
        raise DataError("no trial of this bench is complete", where=folder, fix="let `recall bench` go on, then `recall bench --summary`")
    counts = {column: results.numbers[column].nunique() for column in ("method", "order", "seed")}
    return Page(
        f"Bench: {folder.absolute().resolve().name}",
        ", ".join(f"{count} {column}{'s' * (count != 1)}" for column, count in counts.items()),
        [sentence for kind in results.kinds for sentence in _findings(results, kind)],
        [section for kind in results.kinds for section in _sections(results, kind)],
        [(METRICS[name].label, METRICS[name].formula) for name in PLOTTED],
    )


def save_pictures(results: Results) -> list[Path]:
    """Save `numbers.png`, the numbers of every method, and `R.png`, R of the first trial of every method that was scored between stages."""
    first: dict[tuple[str, str], Any] = {}
    for trial in results.matrices():
        if any(score is not None for row in trial["R"][1:-1] for score in row):
            first.setdefault((trial["kind"], trial["method"]), trial)
    matrices = [
        charts.matrix(trial["R"], trial["stages"], f"{method}, seed {trial['seed']} ({kind})") for (kind, method), trial in first.items()
    ]
    numbers = [
        figure.chart.properties(title=f"{figure.title}, {kind}") for kind in results.kinds for figure in _number_figures(results, kind)
    ]
    pictures = {"numbers.png": charts.grid(numbers, 1), "R.png": charts.grid(matrices, 3)}
    return [save_chart(chart, results.folder / name) for name, chart in pictures.items() if chart is not None]


def _findings(results: Results, kind: str) -> Iterator[str]:
    performance = {row.method: row.numbers["average_performance"] for row in results.of_kind(kind)}
    ranked = sorted(performance.items(), key=lambda item: -item[1].mean)
    yield f"{kind}, average performance at the end: {'; '.join(f'{method} {spread}' for method, spread in ranked)}."
    if errors := results.item_errors(kind):
        yield (
            f"± is the spread over trials (standard deviation). The test rows alone make each uncertain by {min(errors):.3f} to"
            f" {max(errors):.3f} (standard error): smaller differences say little."
        )
    counts = {method: spread.trials for method, spread in performance.items()}
    if len(set(counts.values())) > 1:
        yield "Not all methods have the same number of trials: " + ", ".join(f"{method} {count}" for method, count in counts.items()) + "."


def _sections(results: Results, kind: str) -> Iterator[Section]:
    blocks = [Text(KINDS.get(kind, kind)), _tasks(results, kind), *_number_figures(results, kind)]
    yield Section(f"{kind}-tasks", f"Methods and tasks, {kind}", blocks)
    kept = "To the right, more is kept of what was learnt; up, better on tasks not trained on. Lines: standard deviation over trials."
    paid = "All work behind one trial (training, merging, scoring), what it shares with others counted in full. Up and left is better."
    figures = [
        *_ranks(results, kind),
        *_scatter(results, kind, "retention-unseen", "What is kept, and what is left elsewhere", kept, "retention", "unseen_delta"),
        *_scatter(results, kind, "cost-quality", "Cost against quality", paid, "seconds", "average_performance"),
    ]
    if figures:
        yield Section(f"{kind}-trade", f"Orders, what is kept elsewhere, and what it costs, {kind}", figures)
    head, rows = results.numbers_table(kind)
    numbers = page.Table("Mean ± standard deviation over trials", head, [list(map(str, row)) for row in rows])
    yield Section(f"{kind}-numbers", f"All numbers, {kind}", [numbers])


def _tasks(results: Results, kind: str) -> Figure:
    table = results.final_table(kind)
    cells = [
        {"method": method, "task": task, "score": spread.mean, "shown": str(spread)}
        for method, *spreads in table.rows
        for task, spread in zip(table.head[1:], spreads, strict=True)
        if spread.trials
    ]
    says = "The mean score of each task at the end; the table has the spread over trials. Scores run from 0 to 1, each in its own metric."
    chart = charts.methods_by_tasks(cells, [row[0] for row in table.rows], table.head[1:])
    rows = [list(map(str, row)) for row in table.rows]
    return Figure(f"{kind}-methods-tasks", "Each method on each task", says, chart, table.head, rows)


def _number_figures(results: Results, kind: str) -> Iterator[Figure]:
    """Each number of every method, trial by trial."""
    trials = results.numbers[results.numbers["kind"] == kind]
    for name in PLOTTED:
        rows = [row for row in results.of_kind(kind) if row.numbers[name].trials]
        if rows:
            label, formula = METRICS[name].label, METRICS[name].formula
            points = [
                {"method": trial["method"], "value": trial[name], "order": f"{trial['order']}, seed {trial['seed']}"}
                for trial in trials.dropna(subset=[name]).to_dict("records")
            ]
            chart = charts.dots(points, [row.method for row in rows], label)
            says = f"{formula[0].upper()}{formula[1:]}. Bars are means, points are trials."
            values = [[row.method, str(row.numbers[name]), str(row.numbers[name].trials)] for row in rows]
            head = ["method", "mean ± spread", "trials"]
            yield Figure(f"{kind}-{name.replace('_', '-')}", label[0].upper() + label[1:], says, chart, head, values)


def _ranks(results: Results, kind: str) -> Iterator[Figure]:
    """Places by average performance, among the methods that have a trial in every order that is compared."""
    trials = results.numbers[results.numbers["kind"] == kind]
    values = trials.pivot_table(index=["order", "seed"], columns="method", values="average_performance", sort=False)
    values = values[values.count(axis="columns") > 1].dropna(axis="columns")
    methods = [row.method for row in results.of_kind(kind) if row.method in values]
    if len(methods) < 2:
        return
    ranks = values[methods].rank(axis="columns", ascending=False, method="min").astype(int)
    orders = [f"{order}, seed {seed}" for order, seed in ranks.index]
    numbers = [str(number) for number in range(1, len(orders) + 1)]
    cells = [
        {"method": method, "trial": number, "order": order, "rank": int(ranks[method].iloc[at]), "value": float(values[method].iloc[at])}
        for at, (number, order) in enumerate(zip(numbers, orders, strict=True))
        for method in methods
    ]
    says = f"Only methods with a trial in each of these orders. {'; '.join(map(': '.join, zip(numbers, orders, strict=True)))}."
    chart = charts.ranks(cells, methods, numbers)
    lines = [[method, *map(str, ranks[method])] for method in methods]
    yield Figure(f"{kind}-ranks", "Places from order to order", says, chart, ["method", *numbers], lines)


def _scatter(results: Results, kind: str, name: str, title: str, says: str, x: str, y: str) -> Iterator[Figure]:
    """One number of every method against another, where a method has both."""
    rows = [row for row in results.of_kind(kind) if row.numbers[x].trials and row.numbers[y].trials]
    if not rows:
        return
    labels = [METRICS[number].label if number in METRICS else f"{number} of work (log)" for number in (x, y)]
    points = [{"method": row.method, **_ends("x", row.numbers[x]), **_ends("y", row.numbers[y])} for row in rows]
    chart = charts.against(points, [row.method for row in results.of_kind(kind)], *labels, log=x not in METRICS)
    lines = [[row.method, f"{row.numbers[x].mean:.3f}", f"{row.numbers[y].mean:.3f}"] for row in rows]
    yield Figure(f"{kind}-{name}", title, says, chart, ["method", *labels], lines)


def _ends(axis: str, spread: Spread) -> dict[str, float | None]:
    low, high = (None, None) if spread.trials < 2 else (spread.mean - spread.deviation, spread.mean + spread.deviation)
    return {axis: spread.mean, f"{axis}_low": low, f"{axis}_high": high}
