"""The commands of a workspace: init, learn, status, rollback; with the lineage as a tree, R as a table, and the metrics' formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_merge.cli import terminal_charts
from recall_merge.cli.console import leave_unless, out, print_decisions, print_json, print_notes, progress, table
from recall_merge.cli.options import (
    Allowed,
    AsJson,
    Device,
    KeepIf,
    Method,
    NoTemplate,
    Quiet,
    Sets,
    TemplateFile,
    settings_of,
    words_of,
    written_by,
)
from recall_merge.runtime.errors import RunError

if TYPE_CHECKING:
    from recall_merge.continual.state import State
    from recall_merge.continual.validation import Request
    from recall_merge.continual.workspace import Branch, Status

Workspace = Annotated[Path, typer.Argument(help="The folder of the workspace.")]


def init(
    workspace: Workspace,
    base: Annotated[str, typer.Option(help="Base: a folder, or a hub name with optional @revision.")],
    method: Method = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Make a workspace for a model that learns task after task; or tell one where its base lies now.

    Example: recall init ws --base HuggingFaceTB/SmolLM2-135M-Instruct --set training.epochs=3
    """
    from recall_merge.continual.workspace import init

    state = init(workspace, base, ({"method": method} if method is not None else {}) | settings_of(sets))
    if as_json:
        return print_json({"path": str(workspace), **state.model_dump(mode="json")})
    return out().print(f"{'a' if state.stages else 'made a'} workspace in {workspace}; its base is {state.base.path}")


def learn(
    workspace: Workspace,
    task: Annotated[str | None, typer.Option(help="Name of the new task; leave it out to continue a stopped stage.")] = None,
    train: Annotated[
        str | None, typer.Option(metavar="ROWS", help="Rows to train on: a file, a folder, or {path: .., columns: ..}.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="ROWS", help="Rows to score on, at this stage and all later ones.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System text for the task's rows, kept with it.")] = None,
    template: TemplateFile = None,
    no_template: NoTemplate = False,
    metric: Annotated[str | None, typer.Option(help="Metric; by default acc for rows with choices, or exact_match.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="What to fine-tune: base, or last for the last merge; by default as the strategy has it.")
    ] = None,
    expert: Annotated[str | None, typer.Option(help="An expert trained elsewhere: folder or hub name.")] = None,
    same_base: Annotated[bool, typer.Option("--same-base", help="Accept an adapter whose config names another base.")] = False,
    unseen: Annotated[
        str | None, typer.Option(metavar="A,B,..", help="Tasks to score but not to learn: FILE, NAME=FILE, or of lm-eval.")
    ] = None,
    keep_if: KeepIf = None,
    method: Method = None,
    device: Device = None,
    sets: Sets = None,
    allow: Allowed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn a task: fine-tune, merge, score all tasks so far.

    If it was stopped, the same command continues. Where a condition fails, the model stays what it was, and the exit status is 3.

    Example: recall learn ws --task french --train french.jsonl --test french-test.jsonl
    """
    from recall_merge.continual.stages import learn
    from recall_merge.continual.state import current_model
    from recall_merge.continual.workspace import branch

    tasks = words_of(unseen)
    options = {"train": train, "metric": metric, "start": start, "expert": expert, "same_base": same_base}
    options |= {
        "system": system,
        "template": written_by(template, no_template),
        "unseen": tasks,
        "keep_if": tuple(keep_if or ()),
        "method": method,
        "sets": settings_of(sets) | ({"device": device} if device else {}),
    }
    learned = learn(workspace, _request(task, test, options), allowed=allow or (), progress=progress(quiet or as_json))
    stage, line = learned.stage, branch(learned.state, learned.stage.id)
    model = current_model(workspace, learned.state)
    if as_json:
        facts = {"path": str(workspace), "model": model, "stage": stage.model_dump(mode="json")}
        more = {"moved": learned.moved, "conditions": list(map(asdict, learned.decisions)), "notes": list(learned.notes)}
        print_json({**facts, **_branch_json(line), **more})
        return leave_unless(learned.decisions)
    _print_changes(line)
    if learned.moved:
        moved = ", ".join(f"{task} {share:.2%}" for task, share in learned.moved.items())
        out().print(f"training moved the answers of earlier tasks by: {moved}")
    if not quiet:
        _print_metrics(line)
        print_notes(learned.notes)
    print_decisions(learned.decisions)
    if stage.refused:
        out().print(f"stage {stage.id} learnt {stage.task.name} and was not kept: the model is still {model}")
        out().print(f"`recall rollback {workspace} --to {stage.id}` takes it nevertheless")
        return leave_unless(learned.decisions)
    return out().print(f"stage {stage.id} learnt {stage.task.name}; the model is {model}")


def status(workspace: Workspace, as_json: AsJson = False) -> None:
    """Show the lineage, the scores after every stage, and metrics.

    Example: recall status ws
    """
    from recall_merge.continual.workspace import status

    now = status(workspace)
    if as_json:
        print_json(_status_json(workspace, now))
    else:
        _print_status(workspace, now)


def rollback(
    workspace: Workspace,
    to: Annotated[int, typer.Option(help="The number of a stage; 0 is the base.")],
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier merge; nothing is deleted.

    The next stage starts a branch there. An unfinished stage is given up.

    Example: recall rollback ws --to 1
    """
    from recall_merge.continual.state import current_model
    from recall_merge.continual.workspace import rollback

    state = rollback(workspace, to)
    model = current_model(workspace, state)
    if as_json:
        return print_json({"path": str(workspace), "head": state.head, "model": model})
    return out().print(f"the model is {model}, of stage {state.head}; later stages are kept")


def _request(task: str | None, test: str | None, options: dict[str, Any]) -> Request | None:
    """What is to be learnt; None to continue a stopped stage."""
    from recall_merge.continual.validation import Request

    if options["start"] not in {None, "base", "last"}:
        raise RunError(f"--from {options['start']}: it must be base or last", fix="write --from base, or --from last")
    if task is not None and test is not None:
        return Request(task, test, **options)
    if task or test or any(options.values()) or options["template"] is not None:
        missing = " and ".join(name for name, value in (("--task", task), ("--test", test)) if value is None)
        raise RunError(f"a new task needs {missing}", fix="give both; without any option, learn continues a stopped stage")
    return None


def _status_json(folder: Path, now: Status) -> dict[str, Any]:
    from recall_merge.continual.state import current_model
    from recall_merge.maths.metrics import METRICS

    unfinished = None
    if now.unfinished is not None:
        unfinished = {"part": now.unfinished[1], **now.unfinished[0].model_dump(mode="json")}
    return {
        "path": str(folder),
        "model": current_model(folder, now.state),
        **now.state.model_dump(mode="json"),
        "unfinished": unfinished,
        "in_use": now.holder,
        "missing": list(now.missing),
        "branches": [_branch_json(line) for line in now.branches],
        "formulas": {name: metric.formula for name, metric in METRICS.items()},
    }


def _branch_json(line: Branch) -> dict[str, Any]:
    return {
        "line": [stage.id for stage in line.stages],
        "tasks": list(line.tasks),
        "R": line.r,
        "experts": line.experts,
        "unseen": list(line.unseen),
        "R_unseen": line.r_unseen,
        "numbers": line.numbers,
    }


def _print_status(folder: Path, now: Status) -> None:
    from recall_merge.continual.state import current_model

    console, state = out(), now.state
    console.print(f"base: {state.base.path}\nmodel: {current_model(folder, state)}")
    console.print(_tree(state))
    for line in now.branches:
        end = line.stages[-1].id
        console.print(f"\nR, the branch to stage {end}" + (" (now)" if end == state.head else ""))
        for part in _matrix(line, console):
            console.print(part)
        _print_metrics(line)
    if now.unfinished is not None:
        stage, part = now.unfinished
        how = f"`recall learn {folder}` continues it, `recall rollback {folder} --to {state.head}` gives it up"
        how = f"in progress: {now.holder}" if now.holder else how
        console.print(f"\nunfinished: stage {stage.id} ({stage.task.name}), in part '{part}'; {how}")
    elif now.holder is not None:
        console.print(f"\nin use by {now.holder}")
    for missing in now.missing:
        console.print(missing)


def _tree(state: State) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    def label(number: int, words: str) -> Text:
        return Text(f"{number} {words}" + ("  <- now" if number == state.head else ""), style="bold" if number == state.head else "")

    nodes = {0: Tree(label(0, "base"))}
    for stage in state.stages:
        words = f"{stage.task.name}  ({stage.origin}, {stage.created})"
        refused = f"; not kept: {', '.join(stage.refused)}" if stage.refused else ""
        nodes[stage.id] = nodes[stage.parent].add(label(stage.id, words + refused))
    return nodes[0]


def _matrix(line: Branch, console: Any) -> Iterator[Any]:
    """R and the experts' own scores; on a terminal as a heat map, with a line of bars per task from the base to now."""
    head = ["after stage", *line.tasks, *(f"{name} (unseen)" for name in line.unseen)]
    names = ["0 base", *(f"{stage.id} {task}" for stage, task in zip(line.stages, line.tasks, strict=True))]
    stages = [(name, (*row, *unseen)) for name, row, unseen in zip(names, line.r, line.r_unseen, strict=True)]
    own = ("own expert", (*line.experts, *(None for _ in line.unseen)))
    rows = [(name, [terminal_charts.Cell(_number(score), score) for score in scores]) for name, scores in (*stages, own)]
    trends = [terminal_charts.spark(scores) for scores in zip(*(scores for _, scores in stages), strict=True)]
    below = ("base to now", trends) if terminal_charts.is_watched(console) else None
    return terminal_charts.heat(head, rows, console.width, below=below)


def _print_changes(line: Branch) -> None:
    """What the last stage did to each task."""
    rows = table("task", "base", "before", "now", "change", "its expert")
    names = (*line.tasks, *(f"{name} (unseen)" for name in line.unseen))
    columns = zip(*((*row, *unseen) for row, unseen in zip(line.r, line.r_unseen, strict=True)), strict=True)
    experts = (*line.experts, *(None for _ in line.unseen))
    for name, scores, expert in zip(names, columns, experts, strict=True):
        base, before, now = scores[0], scores[-2], scores[-1]
        change = "-" if before is None or now is None else f"{now - before:+.3f}"
        rows.add_row(name, _number(base), _number(before), _number(now), change, _number(expert))
    out().print(rows)


def _print_metrics(line: Branch) -> None:
    from recall_merge.maths.metrics import METRICS

    for name, value in line.numbers.items():
        if value is not None:  # backward transfer, for example, is not defined for a single task
            out().print(f"{METRICS[name].label}: {value:.3f}   ({METRICS[name].formula})")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
