"""`recall evaluate`: the command, and how its scores are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.console import leave_unless, out, print_decisions, print_json, print_notes, progress, table
from recall_merge.cli.options import AsJson, Device, Executor, NoTemplate, Quiet, TemplateFile, pairs, words_of, written_by
from recall_merge.evaluation.scoring import CHOICE_METRICS, METRICS

if TYPE_CHECKING:
    from recall_merge.evaluation.gate import Decision
    from recall_merge.evaluation.scores import TaskScore


def evaluate(
    model: Annotated[str, typer.Argument(help="A model, adapter or workspace: a folder, or a hub name.")],
    tasks: Annotated[
        str, typer.Option(metavar="A,B,..", help="FILE, NAME=FILE, NAME={path: .., columns: ..}, a task of lm-eval, or paper:NAME.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=METRIC",
            help=f"Metric of a task, repeatable: {', '.join(CHOICE_METRICS)} of rows with choices; else {', '.join(METRICS)}.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, if not the one that it names.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch; changes only the speed.")] = 8,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the model; float32 on the processor by default, else the model's own.")
    ] = None,
    template: TemplateFile = None,
    no_template: NoTemplate = False,
    executor: Executor = "local",
    require: Annotated[
        list[str] | None, typer.Option(metavar="TASK>=SCORE", help="Exit with status 3 if a score is lower; `all` for every task; repeat.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Add the scores to the model card (README.md).")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on tasks.

    Example: recall evaluate merged --tasks french.jsonl,hellaswag --metric french=chrf
    """
    from recall_merge.continual.state import current_model, is_workspace
    from recall_merge.evaluation.evaluate import CardError, evaluate

    written = written_by(template, no_template)
    work = partial(
        evaluate,
        current_model(Path(model)) if is_workspace(Path(model)) else model,
        words_of(tasks),
        base=base,
        metrics=dict(pairs("--metric", "TASK=METRIC", metric)),
        batch_size=batch_size,
        limit=limit,
        device=device,
        dtype=dtype,
        template=True if written is None else written,
        executor=executor,
        card=card,
        require=require or (),
        progress=progress(quiet or as_json),
    )
    try:
        scores = work()
    except CardError as error:
        _show(model, error.scores, require, as_json)
        raise
    leave_unless(_show(model, scores, require, as_json))


def _show(model: str, scores: Sequence[TaskScore], require: Sequence[str] | None, as_json: bool) -> list[Decision]:
    """Print scores, and what they say of each condition."""
    from recall_merge.evaluation.gate import decide, read_conditions
    from recall_merge.evaluation.scores import Scores

    found = {score.task: asdict(score) for score in scores}
    decisions = decide(read_conditions(require or (), found, where="--require"), found, {})
    if as_json:
        told = {"conditions": list(map(asdict, decisions))} if require else {}
        print_json({"model": model, "scores": [*found.values()], **told})
        return decisions
    rows = table(*Scores.head)
    for line in Scores(scores).lines():
        rows.add_row(*line)
    out().print(rows)
    print_decisions(decisions)
    print_notes([f"{score.task}: {note}" for score in scores for note in score.notes])
    return decisions
