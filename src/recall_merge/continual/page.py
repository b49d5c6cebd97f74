"""The page of a workspace: what was gained and forgotten, stage by stage and item by item, and how it came to where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.continual.items import Change, change_of, pairs_of, panel, rows_of
from recall_merge.continual.scores import StageScores, read_scores
from recall_merge.continual.state import Stage, State, found_path, read_journal
from recall_merge.continual.workspace import Branch, Status
from recall_merge.files.checkpoint import read_json
from recall_merge.files.record import RECORD
from recall_merge.report import workspace_charts as charts
from recall_merge.report.merge_page import MergeFacts, about, lede, merge_sections
from recall_merge.report.page import Block, Cell, Code, Figure, Matrix, Page, Section, Text, Tree
from recall_merge.report.words import Words

if TYPE_CHECKING:
    from recall_merge.maths.metrics import Interval

DRAWS = 500  # of the bootstrap
NAMES = {
    "average_performance": "average performance (AP)",
    "learning_accuracy": "learning accuracy",
    "backward_transfer": "backward transfer (BWT)",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer (FWT)",
    "retention": "retention",
    "unseen_delta": "unseen-task delta",
}


class Line:
    """A branch with the scores behind its numbers: by row of R (0 is the base) and task."""

    def __init__(self, folder: Path, branch: Branch, kept: Mapping[int, StageScores]) -> None:
        self.branch, self.folder = branch, folder
        self.tasks = (*branch.tasks, *branch.unseen)
        self.scores: dict[tuple[int, str], dict[str, Any]] = {}
        self.experts: dict[str, dict[str, Any]] = {}
        for number, stage in enumerate(branch.stages, start=1):
            found = kept[stage.id]
            for row, role in ((0, "base"), (number - 1, "before"), (number, "merged")):
                for task, score in found.get(role, {}).items():
                    if task in self.tasks:
                        self.scores[row, task] = score
            self.experts |= {task: score for task, score in found.get("expert", {}).items() if task == stage.task.name}

    @property
    def rows(self) -> list[str]:
        return ["0 base", *(f"{stage.id} {stage.task.name}" for stage in self.branch.stages)]

    def before(self, row: int, task: str) -> int | None:
        """The last row before one in which the task was scored."""
        return next((earlier for earlier in range(row - 1, -1, -1) if (earlier, task) in self.scores), None)

    def changes(self) -> Iterator[tuple[int, str, Change]]:
        """What became of the items of each task at each stage, where it was scored before."""
        for row in range(1, len(self.rows)):
            for task in self.tasks:
                earlier = self.before(row, task)
                if (row, task) in self.scores and earlier is not None:
                    change = change_of(self.scores[earlier, task], self.scores[row, task])
                    if change is not None:
                        yield row, task, change


def workspace_page(folder: Path, found: Status, merge: MergeFacts | None, words: Words) -> Page:
    """The page of a workspace with at least one stage."""
    state = found.state
    kept = {stage.id: read_scores(found_path(folder, stage.scores.file)) for stage in state.stages}
    lines = [Line(folder, branch, kept) for branch in found.branches]
    sections = [Section("lineage", "How it came to where it is", list(_lineage(folder, state)))]
    for place, line in enumerate(lines):
        end = line.branch.stages[-1]
        name = "What was gained, kept and forgotten"
        if place or end.id != state.head:
            name = f"Another line, to stage {end.id} ({end.task.name})"
        sections.append(Section(f"line-{end.id}", name, list(_line(line, words, place == 0))))
    if merge is not None:
        sections += [
            Section(part.anchor, f"The merge of now: {part.title[0].lower()}{part.title[1:]}", part.blocks)
            for part in merge_sections(merge)
        ]
    told = _lede(state, lines, found)
    facts = about(merge.record) if merge is not None else []
    if words.spent_out:
        facts.append(("texts", "some are left out, to keep this page small"))
    base = state.base.path if state.base.on_hub else Path(state.base.path).name
    subject = f"base {base}; {len(state.stages)} stages; now at stage {state.head}"
    return Page(
        f"Workspace: {folder.absolute().resolve().name}", subject, [*told, *(lede(merge.record)[1:] if merge else [])], sections, facts
    )


def _lede(state: State, lines: Sequence[Line], found: Status) -> list[str]:
    told = []
    if state.head and lines:
        line = lines[0]
        last = len(line.rows) - 1
        tasks = [task for task in line.branch.tasks if (0, task) in line.scores and (last, task) in line.scores]
        gains = [f"{task} {line.scores[0, task]['score']:.2f} → {line.scores[last, task]['score']:.2f}" for task in tasks]
        told.append(f"From the base to stage {state.head}: {', '.join(gains)}.")
        changes = [(task, change) for row, task, change in line.changes() if row == last and task != line.branch.tasks[-1]]
        if changes:
            lost, won = sum(change.lost_items for _, change in changes), sum(change.won_items for _, change in changes)
            of = sum(change.n for _, change in changes)
            told.append(f"The last stage lost {lost} and won {won} of the {of} test items of the tasks before it.")
    else:
        told.append("The workspace stands at its base.")
    if found.unfinished is not None:
        told.append(f"Stage {found.unfinished[0].id} ({found.unfinished[0].task.name}) is unfinished, in part '{found.unfinished[1]}'.")
    return [*told, *found.missing]


def _lineage(folder: Path, state: State) -> Iterator[Block]:
    lanes = _lanes(state)
    stages = [{"at": 0, "lane": 0, "name": "base", "now": state.head == 0}]
    stages += [{"at": s.id, "lane": lanes[s.id], "name": f"{s.id} {s.task.name}", "now": s.id == state.head} for s in state.stages]
    edges = [_edge(stage.parent, stage.id, lanes, back=False) for stage in state.stages]
    journal = [entry for entry in read_journal(folder) if entry.get("event") == "rollback"]
    known = range(len(state.stages) + 1)
    edges += [_edge(e["was"], e["to"], lanes, back=True) for e in journal if e.get("was") in known and e.get("to") in known]
    says = "Stages in the order of their making, a row a line; the orange one is the model of now, dashed lines are rollbacks."
    rows = [[f"{s.id} {s.task.name}", str(s.parent), _how(s), s.created, "now" if s.id == state.head else ""] for s in state.stages]
    chart = charts.lineage(stages, edges)
    yield Figure("lineage-chart", "Lineage", says, chart, ["stage", "after", "how", "made", ""], rows)
    yield Tree(_tree(state))
    for entry in journal:
        yield Text(f"{entry.get('time', '')}: back from stage {entry.get('was')} to stage {entry.get('to')}; nothing was deleted.")


def _lanes(state: State) -> dict[int, int]:
    """A row for each stage: the first child goes on in its parent's row, the others begin rows of their own."""
    lanes, taken, most = {0: 0}, set(), 0
    for stage in state.stages:
        if stage.parent in taken:
            most += 1
            lanes[stage.id] = most
        else:
            lanes[stage.id] = lanes[stage.parent]
        taken.add(stage.parent)
    return lanes


def _edge(start: int, end: int, lanes: Mapping[int, int], *, back: bool) -> dict[str, Any]:
    return {"at": start, "lane": lanes[start], "to_at": end, "to_lane": lanes[end], "back": back}


def _tree(state: State) -> list[Any]:
    def node(number: int, label: str) -> Any:
        children = [node(s.id, f"{s.id} {s.task.name} ({_how(s)})") for s in state.stages if s.parent == number]
        return (label, state.head == number, children)

    return [node(0, "0 base")]


def _how(stage: Stage) -> str:
    if stage.given is not None:
        return "expert given"
    return f"fine-tuned from {'the base' if stage.start == 'base' else f'stage {stage.parent}'}"


def _line(line: Line, words: Words, first: bool) -> Iterator[Block]:
    end = line.branch.stages[-1].id
    yield _matrix(line, words)
    yield _picture(line)
    if first and not words.wanted:
        yield Text("To have the words of items and samples on this page, where they are kept:")
        yield Code("recall report WORKSPACE --text")
    yield _curves(line, end)
    yield from _numbers(line, end)
    changes = list(line.changes())
    if changes:
        rows = [(row, task, change) for row, task, change in changes]
        steps = [f"{line.rows[row]}: {task}" for row, task, _ in rows]
        bars = [
            {"at": at, "task": task, "kind": kind, "share": share, "items": items}
            for at, (_, task, change) in enumerate(rows)
            for kind, share, items in (
                ("right to wrong", -change.lost, change.lost_items),
                ("wrong to right", change.won, change.won_items),
            )
        ]
        says = (
            "A bar a stage and task, against the last time it was scored: to the left what was lost, to the right what was won."
            " An unchanged mean may hide items that change places."
        )
        shown = [[step, f"{c.lost:.1%}", f"{c.won:.1%}", f"{c.chance:.1%}", str(c.n)] for step, (_, _, c) in zip(steps, rows, strict=True)]
        head = ["stage: task", "right to wrong", "wrong to right", "either by chance", "items"]
        yield Figure(f"flow-{end}", "Items lost and won", says, charts.flow(bars, steps), head, shown)


def _matrix(line: Line, words: Words) -> Matrix:
    rows, panels = [], []
    tests = {stage.task.name: stage.task for stage in line.branch.stages} | {task.name: task for task in line.branch.stages[-1].unseen}
    texts = {name: rows_of(line.folder, task) if words.wanted else {} for name, task in tests.items()}
    for number, name in enumerate(line.rows):
        jobs = []
        for place, task in enumerate(line.tasks):
            score = line.scores.get((number, task))
            earlier = line.before(number, task)
            anchor = ""
            if score is not None and earlier is not None and pairs_of(line.scores[earlier, task], score):
                anchor = f"items-{line.branch.stages[-1].id}-{number}-{place}"
                title = f"{task}, after stage {name}, against {line.rows[earlier]}"
                panels.append(panel(anchor, title, line.scores[earlier, task], score, texts[task], words))
            new = number > 0 and task == line.branch.stages[number - 1].task.name
            jobs.append(Cell("" if score is None else _score(score), None if score is None else _share(score), anchor, new))
        rows.append((name, jobs))
    caption = (
        "R: the score of each task after each stage, ± standard error over items. Choose a score to see the items that changed;"
        " framed is what was learnt there."
    )
    columns = [f"{task} ({_metric(line, task)})" + (" unseen" if task in line.branch.unseen else "") for task in line.tasks]
    experts = [line.experts.get(task) for task in line.tasks]
    jobs = [Cell("" if e is None else _score(e), None if e is None else _share(e)) for e in experts]
    return Matrix(caption, columns, [*rows, ("own expert", jobs)], panels)


def _picture(line: Line) -> Figure:
    """R once more as a chart, for the files."""
    jobs = [
        {"row": row, "column": column, "score": _share(score), "shown": f"{score['score']:.2f}"}
        for row in range(len(line.rows))
        for column, task in enumerate(line.tasks)
        if (score := line.scores.get((row, task))) is not None
    ]
    shown = [[name, *(_maybe(line.scores.get((row, task))) for task in line.tasks)] for row, name in enumerate(line.rows)]
    end = line.branch.stages[-1].id
    says = "Rows are stages, columns tasks; empty jobs were not scored. All scores run from 0 to 1."
    return Figure(
        f"R-{end}", "R as a picture", says, charts.matrix(jobs, line.rows, line.tasks), ["after stage", *line.tasks], shown, on_page=False
    )


def _curves(line: Line, end: int) -> Figure:
    points = []
    for (row, task), score in sorted(line.scores.items()):
        error = score["stderr"]
        low, high = (None, None) if error is None else (max(0.0, score["score"] - 1.96 * error), min(1.0, score["score"] + 1.96 * error))
        points.append({"at": row, "task": task, "score": score["score"], "low": low, "high": high})
    rows = [[point["task"], line.rows[point["at"]], *(_number(point[key]) for key in ("score", "low", "high"))] for point in points]
    says = "One line a task. Bars are 95 % intervals over test items (1.96 standard errors)."
    chart = charts.curves(points, line.rows, line.tasks)
    return Figure(f"curves-{end}", "Each task from stage to stage", says, chart, ["task", "after stage", "score", "low", "high"], rows)


def _numbers(line: Line, end: int) -> Iterator[Figure]:
    from recall_merge.maths.metrics import FORMULAS

    known = {name: value for name, value in line.branch.numbers.items() if value is not None}
    if not known:
        return
    spread = _intervals(line)
    rows = []
    for at, (name, value) in enumerate(known.items()):
        low, high = spread.get(name, (math.nan, math.nan))
        finite = math.isfinite(low)
        rows.append({"at": at, "name": NAMES[name], "value": value, "low": low if finite else None, "high": high if finite else None})
    shown = [
        [row["name"], *(_number(row[key]) for key in ("value", "low", "high")), FORMULAS[name]]
        for name, row in zip(known, rows, strict=True)
    ]
    says = f"Bars are 95 % bootstrap intervals over test items ({DRAWS} draws), the tasks and their order being given."
    head = ["number", "value", "low", "high", "formula"]
    yield Figure(f"numbers-{end}", "The numbers of continual learning", says, charts.numbers(rows), head, shown)


def _intervals(line: Line) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of all numbers, over items; moved to the score where that is no mean. None where items are not known."""
    import numpy as np

    from recall_merge.maths.metrics import bootstrap, continual_metrics, score_matrix

    t, unseen = len(line.branch.tasks), line.branch.unseen
    samples = []
    for task in line.tasks:
        rows = [line.scores.get((row, task)) for row in range(t + 1)] + [line.experts.get(task)]
        items = [None if score is None else [item["score"] for item in score["items"]] for score in rows]
        sizes = {len(found) for found in items if found is not None}
        if len(sizes) != 1 or any(value is None for found in items if found is not None for value in found):
            return {}
        size = sizes.pop()
        samples.append(np.array([[math.nan] * size if found is None else found for found in items], dtype=np.float64))

    def numbers(arrays: list[Any]) -> dict[str, float]:
        r = score_matrix(arrays)  # (T + 2, tasks): stages, then experts
        ends = (r[0, t:], r[t, t:]) if unseen else None
        return continual_metrics(r[: t + 1, :t], experts=r[t + 1, :t], unseen=ends)

    found: dict[str, tuple[float, float]] = {}
    for name, value in line.branch.numbers.items():
        if value is not None:
            interval: Interval = bootstrap(lambda arrays, name=name: numbers(arrays)[name], samples, draws=DRAWS)
            found[name] = (value + interval.low - interval.estimate, value + interval.high - interval.estimate)
    return found


def load_record(folder: Path, stage: Stage) -> Mapping[str, Any]:
    """The record of a stage's merge."""
    return read_json(found_path(folder, stage.merged.path) / RECORD)


def _metric(line: Line, task: str) -> str:
    return next(score["metric"] for (_, name), score in line.scores.items() if name == task)


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['score']:.2f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.2f}")


def _maybe(score: Mapping[str, Any] | None) -> str:
    return "-" if score is None else _score(score)


def _share(score: Mapping[str, Any]) -> float:
    return min(1.0, max(0.0, score["score"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
