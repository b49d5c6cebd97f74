"""`recall compare`: the command, and how candidates are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_merge.cli.console import out as console
from recall_merge.cli.console import print_json, progress, table
from recall_merge.cli.options import (
    AsJson,
    Base,
    Device,
    Experts,
    NoTemplate,
    Overwrite,
    Quiet,
    RunFile,
    Samples,
    Sets,
    Target,
    TemplateFile,
    pairs,
    read_run,
    words_of,
    written_by,
)
from recall_merge.runtime.safe_yaml import parse_yaml

if TYPE_CHECKING:
    from recall_merge.bench.compare import Candidate, Comparison


def compare(
    tasks: Annotated[str, typer.Option(metavar="A,B,..", help="Validation rows that no expert was trained on: FILE, or NAME=FILE.")],
    run: RunFile = None,
    base: Base = None,
    expert: Experts = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,..", help="Methods to try; by default all that the run has what it takes for.")
    ] = None,
    set_grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V,..", help="Values of an option to try, e.g. scale=0.8,1,1.2; repeat.")
    ] = None,
    samples: Samples = None,
    out: Target = None,
    overwrite: Overwrite = False,
    metric: Annotated[list[str] | None, typer.Option(metavar="TASK=METRIC", help="Metric of a task; repeat.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch; changes only the speed.")] = 8,
    template: TemplateFile = None,
    no_template: NoTemplate = False,
    device: Device = None,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge the same experts in several ways, score each, and keep the best as `out`; of those that are level, the simplest.

    Example: recall compare run.yaml --tasks french-valid.jsonl --methods linear,tsv --set-grid scale=0.8,1
    """
    from recall_merge import compare, merge

    written = written_by(template, no_template)
    options: dict[str, Any] = {"out": out, "overwrite": overwrite, "device": device, "sets": sets}
    merge_run = read_run(run, base=base, experts=expert, samples=samples, **options)
    found = compare(
        merge_run,
        words_of(tasks),
        methods=words_of(methods) if methods else (),
        grid=dict(pairs("--set-grid", "KEY=V,V,..", set_grid, read=lambda text: parse_yaml(f"[{text}]"))),
        metrics=dict(pairs("--metric", "TASK=METRIC", metric)),
        batch_size=batch_size,
        limit=limit,
        template=True if written is None else written,
        progress=progress(quiet or as_json),
    )
    if not as_json:
        _print(found)
    kept = None
    if merge_run.out.path is not None:
        kept = merge(found.chosen.plan.run, progress=progress(quiet or as_json)).path
    if as_json:
        told = [_facts(found, candidate) for candidate in found.candidates]
        return print_json({"candidates": told, "chosen": found.chosen.name, "path": None if kept is None else str(kept)})
    return console().print(f"kept: {found.chosen.name}{', in ' + str(kept) if kept else '; give --out FOLDER to have it written'}")


def _print(found: Comparison) -> None:
    """One line per candidate, the best first."""
    rows = table(*found.head)
    for line in found.lines():
        rows.add_row(*line)
    console().print(rows)
    level = [each.name for each in found.candidates[: found.finalists] if found.is_level(each)]
    if len(level) > 1:
        console().print(f"level on these rows: {'; '.join(level)}. More rows would tell them apart, or not")


def _facts(found: Comparison, candidate: Candidate) -> dict[str, Any]:
    behind = found.behind(candidate)
    return {
        "name": candidate.name,
        "method": candidate.plan.name,
        "options": candidate.plan.run.options,
        "rows": candidate.rows,
        "score": candidate.score,
        "scores": candidate.scores,
        "behind": {"estimate": behind.estimate, "low": behind.low, "high": behind.high},
        "level": found.is_level(candidate),
        "merge_seconds": round(candidate.merge_seconds, 3),
        "score_seconds": round(candidate.score_seconds, 3),
    }
