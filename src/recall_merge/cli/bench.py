"""`recall bench`: the command, and how its progress and results are printed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli import terminal_charts
from recall_merge.cli.options import AsJson, ExecutorName, Quiet, Sets, settings_of

if TYPE_CHECKING:
    from recall_merge.bench.bench import JobDone
    from recall_merge.bench.results import MethodRow, Summary
    from recall_merge.bench.scenario import Scenario

PLACES = {"model": "MODEL", "data": "DATA"}  # keys whose values are folders of this machine


def bench(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.yaml", help="Tasks, orders, seeds, methods.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the jobs and the results.", show_default=False)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what there is to do and about how long it takes; do nothing.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Write the results of what is done so far; do nothing else.")] = False,
    executor: ExecutorName = "local",
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods over tasks, orders and seeds: R matrices, one table, a summary, pictures. Stopped, it goes on from there.

    Example: recall bench benchmarks/five_tasks.yaml --set data=DATA --set model=MODEL --out runs/five_tasks
    """
    from recall_merge.bench import bench as run
    from recall_merge.bench.design import make_design
    from recall_merge.bench.results import summarise
    from recall_merge.bench.scenario import load_scenario

    overrides = settings_of(sets)
    told = load_scenario(scenario, overrides | ({"out": str(out)} if out is not None else {}))
    words = [f"--set {key}={PLACES.get(key, value)}" for key, value in overrides.items() if key != "out"]
    command = " ".join(["recall bench", scenario.name, *words])
    if plan:
        _planned(told, as_json=as_json)
    elif summary:
        _show(summarise(make_design(told), run.store_of(told), run.out_of(told), command=command), as_json=as_json)
    else:
        _show(
            run.bench(told, executor=executor, command=command, listener=(lambda _: None) if quiet or as_json else _tell), as_json=as_json
        )


def _planned(scenario: Scenario, *, as_json: bool) -> None:
    from recall_merge.bench.bench import make_agenda, seconds_left, store_of
    from recall_merge.bench.design import make_design
    from recall_merge.cli.console import out, print_json

    design, store = make_design(scenario), store_of(scenario)
    agenda = make_agenda(design, store)
    left = Counter(type(job).__name__.lower() for job in agenda.left)
    seconds = seconds_left(agenda.left, store, scenario.workers)
    if as_json:
        return print_json({"trials": len(design.trials), "jobs": len(agenda.jobs), "left": dict(left), "seconds_left": round(seconds)})
    words = ", ".join(f"{kind} {count}" for kind, count in left.items()) or "nothing"
    guess = "from the jobs done so far" if store.notes() else "a rough guess, until jobs have been done"
    out().print(f"trials: {len(design.trials)}, of {len(agenda.jobs)} jobs; left: {words}; about {_time(seconds)} ({guess})")
    out().print("no faults found; nothing was done.")
    return None


def _show(summary: Summary, *, as_json: bool) -> None:
    from recall_merge.bench.markdown import SHORT, shown
    from recall_merge.cli.console import err, out, print_json

    if as_json:
        return print_json(summary.to_json())
    console = out()
    for kind in dict.fromkeys(row.kind for row in summary.methods):
        rows = [row for row in summary.methods if row.kind == kind]
        known = [name for name in SHORT.values() if any(shown(row)[name] != "-" for row in rows)]
        numbers = [
            (row.method, [terminal_charts.Cell(text) for text in (str(row.trials), *(shown(row)[name] for name in known))]) for row in rows
        ]
        tasks = list(dict.fromkeys(task for row in rows for task in row.final))
        scores = [(row.method, [_score(row, task) for task in tasks]) for row in rows]
        for title, head, lines in (("", ["method", "trials", *known], numbers), (", each task at the end", ["method", *tasks], scores)):
            console.print(f"{kind}{title}: mean ± standard deviation over trials")
            for table in terminal_charts.heat(head, lines, console.width):
                console.print(table)
    for (kind, method), count in summary.unfinished.items():
        err().print(f"note: not finished: {method} ({kind}), {count} trials", markup=False)
    out().print(f"results: {summary.folder / 'summary.md'}", markup=False)
    return None


def _score(row: MethodRow, task: str) -> terminal_charts.Cell:
    mean, spread = row.final.get(task), row.final_spread.get(task, math.nan)
    if mean is None or math.isnan(mean):
        return terminal_charts.Cell("-")
    return terminal_charts.Cell(f"{mean:.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}"), mean)


def _tell(done: JobDone) -> None:
    """A line a job, on a terminal and in a log alike: jobs take minutes."""
    from recall_merge.cli.console import err

    left = f"; about {_time(done.seconds_left)} left" if done.number < done.total else ""
    err().print(f"{done.number}/{done.total} {done.kind}: {done.label} ({_time(done.seconds)}){left}", markup=False)


def _time(seconds: float) -> str:
    """Seconds in words.

    >>> _time(42.4), _time(600), _time(9000)
    ('42 s', '10 min', '2.5 h')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
