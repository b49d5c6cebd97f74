"""The commands of a workspace: init, learn, status, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recall_merge.cli.options import AsJson, MethodName, Quiet, Sets, settings_of
from recall_merge.runtime.errors import RunError

Workspace = Annotated[Path, typer.Argument(help="The folder of the workspace.", show_default=False)]


def init(
    workspace: Workspace,
    base: Annotated[str, typer.Option(help="Base: a folder, or a hub name with optional @revision.", show_default=False)],
    method: MethodName = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Make a workspace: a folder for a model that learns one task after another.

    Example: recall init ws --base HuggingFaceTB/SmolLM2-135M-Instruct --set training.epochs=3
    """
    from recall_merge.cli import show_workspace
    from recall_merge.continual.workspace import init as recipe

    state = recipe(workspace, base, ({"method": method} if method is not None else {}) | settings_of(sets))
    show_workspace.made(workspace, state, as_json=as_json)


def learn(
    workspace: Workspace,
    task: Annotated[str | None, typer.Option(help="Name of the new task; without it, a stopped stage goes on.", show_default=False)] = None,
    train: Annotated[Path | None, typer.Option(help="Rows to train on.", show_default=False)] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to score on, at this stage and all later ones.", show_default=False)] = None,
    metric: Annotated[str | None, typer.Option(help="acc for rows with choices, else exact_match, by default.", show_default=False)] = None,
    start: Annotated[str, typer.Option("--from", help="What to fine-tune: the base, or the last merge (last).")] = "base",
    expert: Annotated[str | None, typer.Option(help="An expert trained elsewhere: folder or hub name.", show_default=False)] = None,
    same_base: Annotated[bool, typer.Option("--same-base", help="That adapter is on this base, whatever its config says.")] = False,
    unseen: Annotated[
        str | None, typer.Option(metavar="A,B,..", help="Tasks to score from now on: FILE, NAME=FILE, or lm-eval's.", show_default=False)
    ] = None,
    method: MethodName = None,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn a task: fine-tune, merge, score all tasks so far. Stopped, the same command goes on where it was.

    Example: recall learn ws --task french --train french.jsonl --test french-test.jsonl
    """
    from recall_merge.cli import show_workspace
    from recall_merge.cli.console import progress
    from recall_merge.continual.request import Request
    from recall_merge.continual.stages import learn as recipe

    request = None
    if start not in {"base", "last"}:
        raise RunError(f"--from {start}: there are base and last", fix="write --from base, or --from last")
    if task is not None and test is not None:
        words = [word for word in (unseen or "").split(",") if word]
        request = Request(
            task, test, train, metric, "last" if start == "last" else "base", expert, same_base, words, method, settings_of(sets)
        )
    elif any(option not in (None, False, []) for option in (task, train, test, metric, expert, unseen, method, sets)) or start != "base":
        missing = " and ".join(name for name, value in (("--task", task), ("--test", test)) if value is None)
        raise RunError(f"a new task needs {missing}", fix="give both; without any option, learn goes on with a stage that was stopped")
    learned = recipe(workspace, request, progress=progress(quiet or as_json))
    show_workspace.learned(workspace, learned, as_json=as_json, quiet=quiet)


def status(workspace: Workspace, as_json: AsJson = False) -> None:
    """Show lineage, scores after every stage (R), and what is kept and forgotten.

    Example: recall status ws
    """
    from recall_merge.cli import show_workspace
    from recall_merge.continual.workspace import status as recipe

    show_workspace.status(workspace, recipe(workspace), as_json=as_json)


def rollback(
    workspace: Workspace,
    to: Annotated[int, typer.Option(help="A stage's number; 0 is the base.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier merge. Nothing is deleted; learning again begins a branch there. An unfinished stage is given up.

    Example: recall rollback ws --to 1
    """
    from recall_merge.cli import show_workspace
    from recall_merge.continual.workspace import rollback as recipe

    show_workspace.rolled_back(workspace, recipe(workspace, to), as_json=as_json)


COMMANDS = (init, learn, status, rollback)
