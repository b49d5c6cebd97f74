"""`recall evaluate`: the command, and how its scores are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.options import AsJson, EngineName, Quiet
from recall_merge.runtime.errors import RunError

if TYPE_CHECKING:
    from recall_merge.evaluation.scores import TaskScore


def evaluate(
    model: Annotated[str, typer.Argument(help="A model, adapter or workspace: a folder, or a hub name.", show_default=False)],
    tasks: Annotated[str, typer.Option(metavar="A,B,..", help="FILE, NAME=FILE, a name lm-eval knows, or paper:NAME.", show_default=False)],
    metric: Annotated[
        list[str] | None, typer.Option(metavar="TASK=METRIC", help="By default acc, or exact_match; repeat.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="What an adapter is on, if not what it names.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time; changes the time only.")] = 8,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one, by default.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 on a CPU, by default.", show_default=False)] = None,
    template: Annotated[bool, typer.Option(help="Apply the model's chat template where it has one.")] = True,
    executor: EngineName = "local",
    card: Annotated[bool, typer.Option("--card", help="Add the scores to the model's card (README.md).")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a model on tasks.

    Example: recall evaluate merged --tasks french.jsonl,hellaswag --metric french=chrf
    """
    from recall_merge.cli.console import progress
    from recall_merge.continual.state import current_model, is_workspace
    from recall_merge.evaluation.evaluate import evaluate as recipe

    metrics = dict(_metric(word) for word in metric or [])
    scores = recipe(
        current_model(Path(model)) if is_workspace(Path(model)) else model,
        [word for word in tasks.split(",") if word],
        base=base,
        metrics=metrics,
        batch_size=batch_size,
        limit=limit,
        device=device,
        dtype=dtype,
        template=template,
        executor=executor,
        card=card,
        progress=progress(quiet or as_json),
    )
    _show(model, scores, as_json=as_json)


def _metric(word: str) -> tuple[str, str]:
    task, equals, name = word.partition("=")
    if not equals:
        raise RunError(f"--metric {word}: no '=' in it", fix="write --metric TASK=METRIC")
    return task, name


def _show(model: str, scores: list[TaskScore], *, as_json: bool) -> None:
    if as_json:
        from recall_merge.cli.show import print_json

        return print_json({"model": model, "scores": [score.to_json() for score in scores]})
    from rich.table import Table

    from recall_merge.cli.console import out

    table = Table("task", "metric", "score", "standard error", "rows", box=None)
    for score in scores:
        error = "-" if score.stderr is None else f"{score.stderr:.3f}"
        table.add_row(score.task, score.metric, f"{score.score:.3f}", error, str(score.n))
    out().print(table)
    return None
