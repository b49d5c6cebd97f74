"""`recall bench`: the command, and how its progress and results are printed."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli import terminal_charts
from recall_merge.cli.console import err, print_json
from recall_merge.cli.console import out as console
from recall_merge.cli.options import Allowed, AsJson, Device, Executor, Quiet, Sets, settings_of

if TYPE_CHECKING:
    from recall_merge.bench.bench import JobDone
    from recall_merge.bench.results import Results
    from recall_merge.bench.scenario import Scenario

PLACEHOLDERS = {"model": "MODEL", "data": "DATA"}  # for keys whose values are folders of this machine


def bench(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.yaml", help="Tasks, orders, seeds, methods.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the jobs and the results.", show_default=False)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what there is to do and about how long it takes; do nothing.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Write the results of what is done so far; do nothing else.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="These methods of the scenario alone, by name.", show_default=False)
    ] = None,
    executor: Executor = "local",
    device: Device = None,
    sets: Sets = None,
    allow: Allowed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods over tasks, orders and seeds: R matrices, one table, a summary, pictures. Stopped, it goes on from there.

    Example: recall bench benchmarks/five_tasks.yaml --set data=DATA --set model=MODEL --out runs/five_tasks
    """
    from recall_merge.bench import bench as run
    from recall_merge.bench.design import make_design
    from recall_merge.bench.scenario import load_scenario, narrowed

    overrides = settings_of(sets) | ({"device": device} if device else {})
    loaded = narrowed(load_scenario(scenario, overrides | ({"out": str(out)} if out is not None else {})), only or ())
    words = [f"--set {key}={PLACEHOLDERS.get(key, value)}" for key, value in overrides.items() if key != "out"]
    words += [f"--only {shlex.quote(name)}" for name in only or ()]
    words += [f"--allow-argument {name}" for name in allow or ()]
    command = " ".join(["recall bench", scenario.name, *words])
    if plan:
        _plan(loaded, allow or (), as_json=as_json)
    elif summary:
        _show(run.write_results(make_design(loaded, allow or ()), run.store_of(loaded), command=command), as_json=as_json)
    else:
        listener = (lambda _: None) if quiet or as_json else _report_job
        _show(run.bench(loaded, executor=executor, command=command, allowed=allow or (), listener=listener), as_json=as_json)


def _plan(scenario: Scenario, allowed: Collection[str], *, as_json: bool) -> None:
    from recall_merge.bench.bench import make_agenda, seconds_left, store_of
    from recall_merge.bench.design import make_design

    design, store = make_design(scenario, allowed), store_of(scenario)
    agenda = make_agenda(design, store)
    left = Counter(job.kind for job in agenda.left)
    seconds = seconds_left(agenda.left, store, scenario.workers)
    if as_json:
        return print_json({"trials": len(design.trials), "jobs": len(agenda.jobs), "left": dict(left), "seconds_left": round(seconds)})
    words = ", ".join(f"{kind} {count}" for kind, count in left.items()) or "nothing"
    guess = "estimated from the jobs done so far" if store.notes() else "a rough guess, until jobs have been done"
    console().print(f"{len(design.trials)} trials with {len(agenda.jobs)} jobs; left: {words}; about {_time(seconds)} ({guess})")
    return console().print("no faults found; nothing was done.")


def _show(results: Results, *, as_json: bool) -> None:
    if as_json:
        return print_json(results.to_json())
    for kind in results.kinds:
        for title, table, share in (("", results.numbers_table(kind), False), (", each task at the end", results.final_table(kind), True)):
            console().print(f"{kind}{title}: mean ± standard deviation over trials")
            rows = [
                (name, [terminal_charts.Cell(str(value), value.mean if share and value.trials else None) for value in values])
                for name, *values in table.rows
            ]
            for part in terminal_charts.heat(table.head, rows, console().width):
                console().print(part)
    for (kind, method), count in results.unfinished.items():
        err().print(f"note: not finished: {method} ({kind}), {count} trials")
    return console().print(f"results: {results.folder / 'summary.md'}")


def _report_job(done: JobDone) -> None:
    """One line per job, on a terminal and in a log alike: jobs take minutes."""
    left = f"; about {_time(done.seconds_left)} left" if done.number < done.total else ""
    err().print(f"{done.number}/{done.total} {done.kind}: {done.label} ({_time(done.seconds)}){left}")


def _time(seconds: float) -> str:
    """Seconds in words.

    >>> _time(42.4), _time(600), _time(9000)
    ('42 s', '10 min', '2.5 h')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
