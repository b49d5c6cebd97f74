"""What the commands of a workspace print: the lineage as a tree, R as a table, the numbers with their formulas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.cli import terminal_charts
from recall_merge.cli.console import out
from recall_merge.cli.show import notes, print_json

if TYPE_CHECKING:
    from recall_merge.continual.stages import Learned
    from recall_merge.continual.state import State
    from recall_merge.continual.workspace import Branch, Status


def made(folder: Path, state: State, *, as_json: bool) -> None:
    if as_json:
        return print_json({"path": str(folder), **state.model_dump(mode="json")})
    out().print(f"a workspace in {folder}; its base is {state.base.path}", markup=False)
    return None


def learned(folder: Path, found: Learned, *, as_json: bool, quiet: bool) -> None:
    from recall_merge.continual.workspace import branch

    line = branch(found.state, found.stage.id)
    if as_json:
        facts = {"path": str(folder), "model": str(folder / found.stage.merged.path), "stage": found.stage.model_dump(mode="json")}
        return print_json({**facts, **_branch(line), "notes": list(found.notes)})
    console = out()
    console.print(_changes(line))
    if not quiet:
        _numbers(line)
        notes(found.notes)
    console.print(f"stage {found.stage.id} learnt {found.stage.task.name}: the model is {folder / found.stage.merged.path}", markup=False)
    return None


def rolled_back(folder: Path, state: State, *, as_json: bool) -> None:
    from recall_merge.continual.state import current_model

    if as_json:
        return print_json({"path": str(folder), "head": state.head, "model": current_model(folder, state)})
    out().print(f"the model is {current_model(folder, state)}, of stage {state.head}; later stages stay where they are", markup=False)
    return None


def status(folder: Path, found: Status, *, as_json: bool) -> None:
    from recall_merge.continual.state import current_model

    if as_json:
        return _status_json(folder, found)
    console, state = out(), found.state
    console.print(f"base: {state.base.path}", markup=False)
    console.print(f"model: {current_model(folder, state)}", markup=False)
    console.print(_tree(state))
    for line in found.branches:
        end = line.stages[-1].id
        console.print(f"\nR, the line to stage {end}" + (" (now)" if end == state.head else ""), markup=False)
        for table in _matrix(line, console):
            console.print(table)
        _numbers(line)
    if found.unfinished is not None:
        stage_spec, part = found.unfinished
        how = (
            f"at work: {found.holder}"
            if found.holder
            else f"`recall learn {folder}` goes on, `recall rollback {folder} --to {state.head}` gives it up"
        )
        console.print(f"\nunfinished: stage {stage_spec.id} ({stage_spec.task.name}), in part '{part}'; {how}", markup=False)
    elif found.holder is not None:
        console.print(f"\nin use by {found.holder}", markup=False)
    for missing in found.missing:
        console.print(missing, markup=False)
    return None


def _status_json(folder: Path, found: Status) -> None:
    from recall_merge.continual.state import current_model
    from recall_merge.maths.metrics import FORMULAS

    unfinished = None
    if found.unfinished is not None:
        unfinished = {"part": found.unfinished[1], **found.unfinished[0].model_dump(mode="json")}
    facts: dict[str, Any] = {"path": str(folder), "model": current_model(folder, found.state), **found.state.model_dump(mode="json")}
    facts |= {"unfinished": unfinished, "in_use": str(found.holder) if found.holder else None, "missing": list(found.missing)}
    print_json(facts | {"branches": [_branch(line) for line in found.branches], "formulas": FORMULAS})


def _branch(line: Branch) -> dict[str, Any]:
    return {
        "line": [stage.id for stage in line.stages],
        "tasks": list(line.tasks),
        "R": line.r,
        "experts": line.experts,
        "unseen": list(line.unseen),
        "R_unseen": line.r_unseen,
        "numbers": line.numbers,
    }


def _tree(state: State) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    def label(number: int, words: str) -> Text:
        return Text(f"{number} {words}" + ("  <- now" if number == state.head else ""), style="bold" if number == state.head else "")

    nodes = {0: Tree(label(0, "base"))}
    for stage in state.stages:
        how = "expert given" if stage.given else f"fine-tuned from {'the base' if stage.start == 'base' else f'stage {stage.parent}'}"
        nodes[stage.id] = nodes[stage.parent].add(label(stage.id, f"{stage.task.name}  ({how}, {stage.created})"))
    return nodes[0]


def _matrix(line: Branch, console: Any) -> Iterator[Any]:
    """R and the experts' own scores; on a terminal as a heat map, with a line of bars a task from the base to now."""
    head = ["after stage", *line.tasks, *(f"{name} (unseen)" for name in line.unseen)]
    names = ["0 base", *(f"{stage.id} {task}" for stage, task in zip(line.stages, line.tasks, strict=True))]
    stages = [(name, (*row, *unseen)) for name, row, unseen in zip(names, line.r, line.r_unseen, strict=True)]
    own = ("own expert", (*line.experts, *(None for _ in line.unseen)))
    rows = [(name, [_cell(score) for score in scores]) for name, scores in (*stages, own)]
    watched = terminal_charts.watched(console)
    trends = [terminal_charts.spark([scores[at] for _, scores in stages]) for at in range(len(head) - 1)]
    return terminal_charts.heat(head, rows, console.width, below=("base to now", trends) if watched else None)


def _cell(score: float | None) -> terminal_charts.Cell:
    return terminal_charts.Cell(_number(score), score)


def _changes(line: Branch) -> Any:
    """What the last stage did to each task."""
    from rich.table import Table

    table = Table("task", "base", "before", "now", "change", "its expert", box=None)
    names = (*line.tasks, *(f"{name} (unseen)" for name in line.unseen))
    columns = zip(*((*row, *unseen) for row, unseen in zip(line.r, line.r_unseen, strict=True)), strict=True)
    experts = (*line.experts, *(None for _ in line.unseen))
    for name, scores, expert in zip(names, columns, experts, strict=True):
        base, before, now = scores[0], scores[-2], scores[-1]
        change = "-" if before is None or now is None else f"{now - before:+.3f}"
        table.add_row(name, _number(base), _number(before), _number(now), change, _number(expert))
    return table


def _numbers(line: Branch) -> None:
    from recall_merge.maths.metrics import FORMULAS

    for name, value in line.numbers.items():
        if value is None:
            continue  # not defined, as backward transfer is not for a single task
        out().print(f"{name.replace('_', ' ')}: {_number(value)}   ({FORMULAS[name]})", markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
