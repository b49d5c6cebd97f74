"""Learning one task after another, best first: python -m benchmarks.leaderboard [FOLDER]

Takes the tables of `recall bench benchmarks/stream.yaml` from FOLDER, where it is given, into docs/results/stream; writes the leaderboard
from what lies there into docs/leaderboard.md, its first rows into the README, and a picture of what is forgotten into docs/pictures.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from benchmarks.measure import ROOT
from benchmarks.page import placed
from recall_merge.bench.results import MethodResults, Results, read_results
from recall_merge.bench.scenario import ARROW, Scenario, load_scenario
from recall_merge.report.pictures import altair, save_chart
from recall_merge.report.workspace_charts import curves

SCENARIO = ROOT / "benchmarks" / "stream.yaml"
KEPT, PAGE, README = ROOT / "docs" / "results" / "stream", ROOT / "docs" / "leaderboard.md", ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "forgetting.png"
BEGIN, END = "<!-- leaderboard: make leaderboard -->", "<!-- end of leaderboard -->"
FIRST = 5  # rows in the README
# baselines that are no data-free way to one model
REFERENCES = {"experts": "as many models as tasks", "replay": "keeps old rows", "joint": "keeps all rows"}


class Interval(NamedTuple):
    """A mean of paired differences, and its 95 % interval by Student's t; without bounds for fewer than two pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        """
        >>> str(Interval(0.05, -0.01, 0.11, 9)), str(Interval(0.05, math.nan, math.nan, 1))
        ('+0.050 [-0.010, +0.110]', '+0.050')
        """
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.low) else f" [{self.low:+.3f}, {self.high:+.3f}]")


def paired(ours: ArrayLike, theirs: ArrayLike) -> Interval:
    """The mean of ours - theirs over pairs, (n,) each.

    >>> paired([1.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    Interval(mean=1.0, low=-1.484, high=3.484, pairs=3)
    """
    differences = np.subtract(ours, theirs)
    mean, count = float(differences.mean()), len(differences)
    reach = float(student.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5) if count > 1 else math.nan
    return Interval(mean, *(round(bound, 3) for bound in (mean - reach, mean + reach)), count)


def main() -> None:
    for folder in map(Path, sys.argv[1:2]):
        KEPT.mkdir(parents=True, exist_ok=True)
        for name in ("scores.csv", "numbers.csv"):
            shutil.copyfile(folder / name, KEPT / name)
    results, scenario = read_results(KEPT), load_scenario(SCENARIO)
    save_chart(forgetting(results, ("sequential", "protected")), PICTURE)
    for page, rows in ((PAGE, None), (README, FIRST)):
        page.write_text(with_table(page.read_text("utf-8"), leaderboard(results, scenario, rows)), "utf-8")


def with_table(page: str, table: str) -> str:
    """The page with this table between its marks."""
    return placed(page, BEGIN, table, END)


def leaderboard(results: Results, scenario: Scenario, rows: int | None = None) -> str:
    """The table, highest average performance first: all of it with the commands, or its first data-free rows and the references."""
    entries = {entry.name: entry for entry in scenario.methods}
    ranked = sorted((row for row in results.methods if row.method in entries), key=lambda row: -row.numbers["average_performance"].mean)
    free = [row for row in ranked if entries[row.method].method not in REFERENCES]
    shown = ranked if rows is None else [row for row in ranked if row in free[:rows] or row not in free]
    experts = next((entry.name for entry in scenario.methods if entry.method == "experts"), None)
    head = ["method", "orders", "AP", "AP beside the first", "gains kept", "worst order", "retention", "BWT", "forgetting", "unseen delta"]
    lines = [_line([*head, "a stage", "peak memory"]), _line(["---"] * (len(head) + 2))]
    for row in shown:
        name = row.method if row in free else f"*{row.method}: {REFERENCES[entries[row.method].method]}*"
        numbers = [row.numbers[key] for key in ("retention", "backward_transfer", "forgetting", "unseen_delta")]
        beside = "" if row is free[0] else str(paired(*_pairs(results, row.method, free[0].method)))
        kept = [] if experts is None else gains_kept(results, row.method, experts)
        gains = [f"{mean(kept):.3f}" + (f" ± {stdev(kept):.3f}" if len(kept) > 1 else ""), f"{min(kept):.3f}"] if kept else ["-", "-"]
        stage, peak = row.numbers["stage_seconds"].mean, row.numbers["peak_bytes"].mean / 1e9
        costs = ["-" if math.isnan(value) else f"{value:.{digits}f} {unit}" for value, digits, unit in ((stage, 0, "s"), (peak, 1, "GB"))]
        lines.append(_line([name, row.trials, row.numbers["average_performance"], beside, *gains, *numbers, *costs]))
    return "\n".join([*lines, "", *([] if rows else [*_commands(ranked), ""])])


def forgetting(results: Results, methods: Sequence[str]) -> Any:
    """The score of each task from the stage that learns it on, in the first order: methods beside each other."""
    first, parts = results.numbers["order"][results.numbers["method"] == methods[0]].iloc[0], []
    for method in methods:
        rows = results.scores[(results.scores["method"] == method) & (results.scores["order"] == first)]
        tasks = first.split(ARROW)
        seen = [tasks.index(task) < stage for stage, task in zip(rows["stage"], rows["task"], strict=True) if task in tasks]
        learnt = rows[rows["task"].isin(tasks)][seen]
        bounds = zip(learnt["score"] - 1.96 * learnt["stderr"], learnt["score"] + 1.96 * learnt["stderr"], strict=True)
        points = [
            {"at": row.stage - 1, "task": row.task, "score": row.score, "low": max(low, 0.0), "high": min(high, 1.0)}
            for row, (low, high) in zip(learnt.itertuples(), bounds, strict=True)
        ]
        ends = learnt["score"][learnt["stage"] == len(tasks)].mean()
        parts.append(curves(points, tasks, tasks).properties(title=f"{method}: the mean of all tasks ends at {ends:.3f}"))
    return altair().vconcat(*parts)


def _pairs(results: Results, ours: str, theirs: str) -> tuple[Sequence[float], Sequence[float]]:
    """Scores at the end of both methods, paired by seed and task, so by order too: those of tasks that were learnt."""
    scores = results.scores[results.scores["seen"]]
    last = scores[scores["stage"] == scores["order"].str.count(ARROW) + 1].set_index(["method", "seed", "task"])["score"]
    both = last.unstack("method")[[ours, theirs]].dropna()
    return both[ours].tolist(), both[theirs].tolist()


def gains_kept(results: Results, method: str, experts: str) -> list[float]:
    """What a method has won over the base at the end, as a share of what the experts have won, all tasks together, for each order.

    sum over tasks j of R[T, j] - b_j, divided by the sum of E_j - b_j. Unlike retention, the mean of the tasks' own shares, it does not
    hang on a task whose expert has hardly learnt anything.
    """
    scores = results.scores[results.scores["method"].isin([method, experts])]
    end = scores["stage"] == scores["order"].str.count(ARROW) + 1
    last = scores[scores["seen"] & end].groupby(["method", "seed"])["score"].mean()
    learnt = scores["task"].isin(scores["task"][scores["seen"]])
    base = scores[learnt & (scores["stage"] == 0)].groupby(["method", "seed"])["score"].mean()
    return [
        (last[method, seed] - base[method, seed]) / (last[experts, seed] - base[method, seed])
        for seed in sorted(scores["seed"].unique())
        if (method, seed) in last.index and (experts, seed) in last.index
    ]


def _commands(ranked: Sequence[MethodResults]) -> list[str]:
    lines = ["Each entry by itself:", ""]
    for row in ranked:
        lines.append(f'    recall bench benchmarks/stream.yaml --set data=DATA --set model=MODEL --out runs/stream --only "{row.method}"')
    return lines


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
