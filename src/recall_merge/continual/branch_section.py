"""The section of one branch on a workspace's page: R and its items, each task from stage to stage, the metrics of continual learning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from recall_merge.continual.state import unchanged_rows
from recall_merge.continual.workspace import Branch, scores_by_row
from recall_merge.files.rows import Row
from recall_merge.maths.bootstrap import metric_intervals
from recall_merge.maths.metrics import METRICS, item_changes
from recall_merge.report import workspace_charts as charts
from recall_merge.report.page import Block, Cell, Figure, Item, Items, Matrix, Text
from recall_merge.report.words import Words

Score = Mapping[str, Any]  # as a stage's file keeps it, with its items
DRAWS = 500  # of the bootstrap
LEAST = 0.1  # smallest change of an item's score that is listed; from wrong to right is 1
LISTED = 30  # most items listed per direction and cell


@dataclass(frozen=True)
class Change:
    """How the items of one task changed between two stages: shares of all items, what guessing alone gives of either, and counts."""

    lost: float
    won: float
    chance: float
    lost_items: int
    won_items: int
    n: int


class BranchScores:
    """A branch with the scores behind its numbers, by row of R (0 is the base) and task."""

    def __init__(self, folder: Path, branch: Branch, scores: Mapping[int, Mapping[str, Mapping[str, Score]]]) -> None:
        self.branch, self.folder = branch, folder
        self.tasks = (*branch.tasks, *branch.unseen)
        self.end = branch.stages[-1].id
        self.rows = ["0 base", *(f"{stage.id} {stage.task.name}" for stage in branch.stages)]
        by_row = scores_by_row(branch.stages, lambda stage: scores[stage.id])
        self.scores = {(row, task): score for (row, task), score in by_row.items() if task in self.tasks}
        self.experts = {stage.task.name: scores[stage.id]["expert"][stage.task.name] for stage in branch.stages}

    def row_before(self, row: int, task: str) -> int | None:
        """The last row before one in which the task was scored."""
        return next((earlier for earlier in range(row - 1, -1, -1) if (earlier, task) in self.scores), None)

    def changes(self) -> Iterator[tuple[int, str, Change]]:
        """How the items of each task changed at each stage, where it was scored before."""
        for row, task in product(range(1, len(self.rows)), self.tasks):
            score, earlier = self.scores.get((row, task)), self.row_before(row, task)
            if score is not None and earlier is not None and (change := _change_of(self.scores[earlier, task], score)):
                yield row, task, change


def branch_blocks(branch: BranchScores, words: Words, *, first: bool) -> Iterator[Block]:
    """All that is shown of a branch; the `first` on its page also says how to see texts."""
    yield _matrix(branch, words)
    yield _picture(branch)
    if first and not words.wanted:
        yield Text("To see the texts of items and samples on this page, where they are kept:")
        yield Text("recall report WORKSPACE --text", is_code=True)
    yield _curves(branch)
    yield from _numbers(branch)
    yield from _flow(branch)


def _matrix(branch: BranchScores, words: Words) -> Matrix:
    rows, panels = [], []
    stages = branch.branch.stages
    tests = {task.name: task.test for task in (*stages[-1].unseen, *(stage.task for stage in stages))}
    found = {name: unchanged_rows(branch.folder, test) if words.wanted else None for name, test in tests.items()}
    texts = {name: None if tests[name] is None else {row.index: row for row in rows or ()} for name, rows in found.items()}
    for number, name in enumerate(branch.rows):
        cells = []
        for column, task in enumerate(branch.tasks):
            score, earlier, anchor = branch.scores.get((number, task)), branch.row_before(number, task), ""
            if score is not None and earlier is not None and _pairs_of(branch.scores[earlier, task], score):
                anchor = f"items-{branch.end}-{number}-{column}"
                title = f"{task}, after stage {name}, against {branch.rows[earlier]}"
                panels.append(_changed_items(anchor, title, branch.scores[earlier, task], score, texts[task], words))
            cells.append(_cell(score, anchor, new=number > 0 and task == stages[number - 1].task.name))
        rows.append((name, cells))
    rows.append(("own expert", [_cell(branch.experts.get(task)) for task in branch.tasks]))
    caption = (
        "R: the score of each task after each stage, ± standard error over items. Choose a score to see the items that changed;"
        " framed is what was learnt there."
    )
    metrics = {task: score["metric"] for (_, task), score in branch.scores.items()}
    columns = [f"{task} ({metrics[task]})" + (" unseen" if task in branch.branch.unseen else "") for task in branch.tasks]
    return Matrix(caption, columns, rows, panels)


def _picture(branch: BranchScores) -> Figure:
    """R once more as a chart, for the files."""
    cells = [
        {"row": row, "column": column, "score": _share(score), "shown": f"{score['score']:.2f}"}
        for row in range(len(branch.rows))
        for column, task in enumerate(branch.tasks)
        if (score := branch.scores.get((row, task))) is not None
    ]
    shown = [[name, *(_shown(branch.scores.get((row, task))) or "-" for task in branch.tasks)] for row, name in enumerate(branch.rows)]
    says = "Rows are stages, columns tasks; empty cells were not scored. All scores run from 0 to 1."
    chart, head = charts.matrix(cells, branch.rows, branch.tasks), ["after stage", *branch.tasks]
    return Figure(f"R-{branch.end}", "R as a picture", says, chart, head, shown, on_page=False)


def _curves(branch: BranchScores) -> Figure:
    points = []
    for (row, task), score in sorted(branch.scores.items()):
        error = score["stderr"]
        low, high = (None, None) if error is None else (max(0.0, score["score"] - 1.96 * error), min(1.0, score["score"] + 1.96 * error))
        points.append({"at": row, "task": task, "score": score["score"], "low": low, "high": high})
    rows = [[point["task"], branch.rows[point["at"]], *(_number(point[key]) for key in ("score", "low", "high"))] for point in points]
    says = "One line per task. Bars are 95 % intervals over test items (1.96 standard errors)."
    chart = charts.curves(points, branch.rows, branch.tasks)
    head = ["task", "after stage", "score", "low", "high"]
    return Figure(f"curves-{branch.end}", "Each task from stage to stage", says, chart, head, rows)


def _numbers(branch: BranchScores) -> Iterator[Figure]:
    numbers = {name: value for name, value in branch.branch.numbers.items() if value is not None}
    if not numbers:
        return
    intervals = _intervals(branch, numbers)
    rows = []
    for at, (name, value) in enumerate(numbers.items()):
        low, high = (bound if math.isfinite(bound) else None for bound in intervals.get(name, (math.nan, math.nan)))
        label, short = METRICS[name].label, METRICS[name].short
        rows.append({"at": at, "name": f"{label} ({short})" if short.isupper() else label, "value": value, "low": low, "high": high})
    shown = [
        [row["name"], *(_number(row[key]) for key in ("value", "low", "high")), METRICS[name].formula]
        for name, row in zip(numbers, rows, strict=True)
    ]
    says = f"Bars are 95 % bootstrap intervals over test items ({DRAWS} draws), the tasks and their order being given."
    head = ["number", "value", "low", "high", "formula"]
    yield Figure(f"numbers-{branch.end}", "The numbers of continual learning", says, charts.numbers(rows), head, shown)


def _intervals(branch: BranchScores, numbers: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of the numbers over items; none where items have no scores of their own."""
    items = []
    for task in branch.tasks:
        column = [branch.scores.get((row, task)) for row in range(len(branch.rows))] + [branch.experts.get(task)]
        scores = [None if score is None else [item["score"] for item in score["items"]] for score in column]
        sizes = {len(values) for values in scores if values is not None}
        if len(sizes) != 1 or any(value is None for values in scores if values is not None for value in values):
            return {}
        missing = [math.nan] * sizes.pop()
        items.append(np.array([missing if values is None else values for values in scores], dtype=np.float64))
    return metric_intervals(items, numbers, draws=DRAWS)


def _flow(branch: BranchScores) -> Iterator[Figure]:
    """Items lost and won, where any are known."""
    changes = list(branch.changes())
    if not changes:
        return
    steps = [f"{branch.rows[row]}: {task}" for row, task, _ in changes]
    bars: list[Any] = []
    for at, (_, task, change) in enumerate(changes):
        bars.append({"at": at, "task": task, "kind": "right to wrong", "share": -change.lost, "items": change.lost_items})
        bars.append({"at": at, "task": task, "kind": "wrong to right", "share": change.won, "items": change.won_items})
    says = (
        "One bar per stage and task, against the last time it was scored: to the left what was lost, to the right what was won."
        " An unchanged mean may hide items that change places."
    )
    shown = [[step, f"{c.lost:.1%}", f"{c.won:.1%}", f"{c.chance:.1%}", str(c.n)] for step, (_, _, c) in zip(steps, changes, strict=True)]
    head = ["stage: task", "right to wrong", "wrong to right", "either by chance", "items"]
    yield Figure(f"flow-{branch.end}", "Items lost and won", says, charts.flow(bars, steps), head, shown)


def _cell(score: Mapping[str, Any] | None, anchor: str = "", *, new: bool = False) -> Cell:
    return Cell(_shown(score), None if score is None else _share(score), anchor, new)


def _shown(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    return f"{score['score']:.2f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.2f}")


def _share(score: Mapping[str, Any]) -> float:
    return min(1.0, max(0.0, score["score"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pairs_of(before: Score, after: Score) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The items that are in both scores, and have scores of their own."""
    old = {item["id"]: item for item in before["items"] if item["score"] is not None}
    return [(old[item["id"]], item) for item in after["items"] if item["id"] in old and item["score"] is not None]


def _change_of(before: Score, after: Score) -> Change | None:
    """What went from right to wrong, and back; None where items have no scores of their own."""
    pairs = _pairs_of(before, after)
    if not pairs:
        return None
    old, new = [item["score"] for item, _ in pairs], [item["score"] for _, item in pairs]
    choices = [item["choices"] for _, item in pairs]
    chance = item_changes(old, new, choices=choices if min(choices) >= 2 else None).chance
    gains, n = [b - a for a, b in zip(old, new, strict=True)], len(pairs)
    lost, won = sum(max(-gain, 0) for gain in gains) / n, sum(max(gain, 0) for gain in gains) / n
    return Change(lost, won, chance, sum(gain < -LEAST for gain in gains), sum(gain > LEAST for gain in gains), n)


def _changed_items(anchor: str, title: str, before: Score, after: Score, rows: Mapping[int, Row] | None, words: Words) -> Items:
    """The items that changed most, lost ones first. `rows` are the task's, as far as their texts are wanted; None for lm-eval's own."""
    changed = [(new["score"] - old["score"], old, new) for old, new in _pairs_of(before, after)]
    changed.sort(key=lambda entry: -abs(entry[0]))
    lost, won = [entry for entry in changed if entry[0] < -LEAST], [entry for entry in changed if entry[0] > LEAST]
    change = _change_of(before, after)
    summary = f"{len(lost)} items lost and {len(won)} won, of {len(changed)}."
    if change and change.chance:
        summary += f" Guessing alone would lose and win {change.chance:.1%} each."
    if max(len(lost), len(won)) > LISTED:
        summary += f" Shown are the {LISTED} of each that changed most."
    return Items(anchor, title, summary, [_item(old, new, rows, words) for _, old, new in (*lost[:LISTED], *won[:LISTED])])


def _item(before: Mapping[str, Any], after: Mapping[str, Any], rows: Mapping[int, Row] | None, words: Words) -> Item:
    row = None if rows is None else rows.get(after["id"])
    name = after["id"] if rows is None else after["id"] + 1  # rows are numbered from 1, as the lines of a file
    texts = {"prompt": words.cut(row.plain), "right": words.cut(row.completion)} if row else {}
    texts |= {"said_before": words.cut(before["prediction"]), "said_after": words.cut(after["prediction"])}
    return Item(str(name), _score(before["score"]), _score(after["score"]), after["score"] < before["score"], **texts)


def _score(value: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(value, f"{value:.2f}")
