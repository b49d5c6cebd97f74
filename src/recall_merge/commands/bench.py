"""`recall bench`: the command, and how its progress and results are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_merge.commands.options import AsJson, Quiet, Sets

if TYPE_CHECKING:
    from recall_merge.recipes.bench.run import Agenda, CellDone
    from recall_merge.recipes.bench.scenario import Scenario
    from recall_merge.recipes.bench.summary import Summary


def bench(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO.yaml", help="Tasks, orders, seeds, methods.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the cells and the results.", show_default=False)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what there is to do and about how long it takes; do nothing.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Write the results of what is done so far; do nothing else.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods over tasks, orders and seeds: R matrices, one table, a summary, pictures. Stopped, it goes on from there.

    Example: recall bench benchmarks/five_tasks.yaml --set data=DATA --set model=MODEL --out runs/five_tasks
    """
    from recall_merge.commands.options import settings_of
    from recall_merge.recipes.bench import run, summary as results
    from recall_merge.recipes.bench.design import make_design
    from recall_merge.recipes.bench.scenario import load_scenario

    told = load_scenario(scenario, settings_of(sets) | ({"out": str(out)} if out is not None else {}))
    if plan:
        design, store = make_design(told), run.store_of(told)
        return _planned(told, run.make_agenda(design, store), run, as_json=as_json)
    if summary:
        return _show(results.summarise(make_design(told), run.store_of(told), run.out_of(told)), as_json=as_json)
    return _show(run.bench(told, listener=_silent if quiet or as_json else _tell), as_json=as_json)
