"""Charts of a bench: the numbers of each method with their spread, and R of each method as a heat map.

`summary` is the recipe's own, `bench.results.Summary`; pictures know what they show by its fields alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.report.pictures import altair, save_chart
from recall_merge.report.theme import SEQUENTIAL, WON, model_colours

WIDTH = 860
SHOWN = {  # number -> its title
    "average_performance": "average performance",
    "retention": "retention of the experts' gains",
    "backward_transfer": "backward transfer",
    "unseen_delta": "tasks not trained on, less the base",
}


def draw_numbers(summary: Any, path: Path) -> Path:
    """Save the numbers of every method, a panel each: the mean as a bar, every trial as a point.

    Raises:
        MissingExtra: without the `report` extra.
        OutputError: if the suffix of `path` is not one of a picture.
    """
    alt = altair()
    points = [
        {"kind": one.trial.kind, "method": one.trial.method, "number": name, "value": one.numbers[name]}
        for one in summary.measured
        for name in SHOWN
        if not math.isnan(one.numbers[name])
    ]
    methods = list(dict.fromkeys(row.method for row in summary.methods))
    panels = []
    for name, title in SHOWN.items():
        values = [point for point in points if point["number"] == name]
        if not values:
            continue
        base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("method:N", sort=methods, title=None, axis=alt.Axis(labelLimit=260)))
        x = alt.X("value:Q", title=title)
        bars = base.mark_bar(color="#9ecae1", height={"band": 0.7}).encode(x=alt.X("mean(value):Q", title=title))
        dots = base.mark_point(filled=True, size=34, color="#08306b", opacity=0.8).encode(x=x)
        panel = alt.layer(bars, dots).properties(width=300, height=22 * len(methods))
        kinds = list(dict.fromkeys(point["kind"] for point in values))
        panels.append(panel.facet(row=alt.Row("kind:N", title=None)) if len(kinds) > 1 else panel)
    rows = [alt.hconcat(*panels[start : start + 2]) for start in range(0, len(panels), 2)]
    return save_chart(alt.vconcat(*rows), path)


def draw_matrices(summary: Any, path: Path) -> Path:
    """Save R of the first trial of every method that has stages, as heat maps: a row a stage, a column a task.

    Raises:
        MissingExtra: without the `report` extra.
        OutputError: if the suffix of `path` is not one of a picture.
    """
    alt = altair()
    first: dict[tuple[str, str], Any] = {}
    for one in summary.measured:
        if one.trial.staged:
            first.setdefault((one.trial.kind, one.trial.method), one)
    panels = []
    for (kind, method), one in first.items():
        stages = ["base", *(f"{number} {task}" for number, task in enumerate(one.trial.order, start=1))]
        jobs = [
            {"stage": stage, "task": task, "score": score, "text": f"{score:.2f}"}
            for stage, row in zip(stages, one.scores.tolist(), strict=True)
            for task, score in zip(one.trial.order, row, strict=True)
            if not math.isnan(score)
        ]
        base = alt.Chart(alt.Data(values=jobs)).encode(
            x=alt.X("task:N", sort=list(one.trial.order), title=None, axis=alt.Axis(labelAngle=-35)),
            y=alt.Y("stage:N", sort=stages, title="after stage"),
        )
        tiles = base.mark_rect().encode(color=alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], scheme="blues"), title="score"))
        dark = alt.condition("datum.score > 0.6", alt.value("white"), alt.value("black"))
        words = base.mark_text(fontSize=12).encode(text="text:N", color=dark)
        title = f"{method}, seed {one.trial.seed}" + (f" ({kind})" if len({k for k, _ in first}) > 1 else "")
        panels.append(alt.layer(tiles, words).properties(width=260, height=180, title=title))
    if not panels:
        return draw_numbers(summary, path)
    rows = [alt.hconcat(*panels[start : start + 3]) for start in range(0, len(panels), 3)]
    return save_chart(alt.vconcat(*rows), path)


def methods_by_tasks(jobs: Sequence[Mapping[str, Any]], methods: Sequence[str], tasks: Sequence[str]) -> Any:
    """Scores at the end, a row a method and a column a task.    jobs: method, task, score (mean over trials), shown."""
    alt = altair()
    base = alt.Chart(alt.Data(values=list(jobs))).encode(
        x=alt.X("task:N", title=None, scale=alt.Scale(domain=list(tasks)), axis=alt.Axis(labelAngle=-90, orient="top", labelOverlap=False)),
        y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))),
    )
    tiles = base.mark_rect().encode(
        color=alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], scheme=SEQUENTIAL), title="score at the end"),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("task:N"), alt.Tooltip("shown:N", title="score")],
    )
    words = base.mark_text(fontSize=11).encode(text=alt.Text("score:Q", format=".2f"), color=_ink_on_tiles(alt, "score > 0.6"))
    return alt.layer(tiles, words).properties(width=WIDTH, height=30 * len(methods))


def dots(points: Sequence[Mapping[str, Any]], methods: Sequence[str], title: str) -> Any:
    """A number of every method: the mean as a bar's end, every trial as a point.    points: method, value."""
    alt = altair()
    base = alt.Chart(alt.Data(values=list(points))).encode(y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))))
    bars = base.mark_bar(color=WON, opacity=0.3, height={"band": 0.7}).encode(x=alt.X("mean(value):Q", title=title))
    trials = base.mark_point(filled=True, size=46, color=WON, opacity=0.9).encode(
        x=alt.X("value:Q", title=title), tooltip=[alt.Tooltip("method:N"), alt.Tooltip("value:Q", format="+.3f"), alt.Tooltip("order:N")]
    )
    return alt.layer(bars, trials).properties(width=WIDTH, height=28 * len(methods))


def ranks(jobs: Sequence[Mapping[str, Any]], methods: Sequence[str], orders: Sequence[str]) -> Any:
    """Each method's place by average performance in each order; 1 is the best.    jobs: method, trial, rank, value, order."""
    alt = altair()
    most = max(job["rank"] for job in jobs)
    base = alt.Chart(alt.Data(values=list(jobs))).encode(
        x=alt.X("trial:N", title="order and seed", scale=alt.Scale(domain=list(orders)), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))),
    )
    scale = alt.Scale(scheme=SEQUENTIAL, domain=[1, max(2, most)], reverse=True)
    tiles = base.mark_rect().encode(
        color=alt.Color("rank:Q", scale=scale, title="place; 1 is the best", legend=alt.Legend(format="d", tickMinStep=1)),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("order:N"), alt.Tooltip("rank:Q"), alt.Tooltip("value:Q", format=".3f")],
    )
    words = base.mark_text().encode(text="rank:Q", color=_ink_on_tiles(alt, f"rank < {1 + 0.4 * (max(2, most) - 1)}"))
    return alt.layer(tiles, words).properties(width=min(WIDTH, 190 * len(orders)), height=30 * len(methods))


def against(points: Sequence[Mapping[str, Any]], methods: Sequence[str], x_title: str, y_title: str, *, log: bool = False) -> Any:
    """Two numbers of every method against each other, with their spread over trials.    points: method, x, y, x_low .. y_high."""
    alt = altair()
    base = alt.Chart(alt.Data(values=list(points)))
    scale = alt.Scale(type="log", nice=False, padding=30) if log else alt.Scale(zero=False, padding=30)
    x, y = alt.X("x:Q", title=x_title, scale=scale), alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=24))
    colour = alt.Color("method:N", scale=alt.Scale(**model_colours(methods)), title="method")
    marks = base.mark_point(filled=True, size=130, opacity=1).encode(
        x=x,
        y=y,
        color=colour,
        shape=alt.Shape("method:N", scale=alt.Scale(domain=list(methods)), title="method"),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("x:Q", format=".3f", title=x_title), alt.Tooltip("y:Q", format=".3f", title=y_title)],
    )
    wide = base.transform_filter("isValid(datum.x_low)").mark_rule(opacity=0.6, aria=False).encode(x=x, x2="x_high:Q", y=y, color=colour)
    wide = wide.encode(x=alt.X("x_low:Q", title=x_title, scale=scale))
    high = base.transform_filter("isValid(datum.y_low)").mark_rule(opacity=0.6, aria=False).encode(x=x, y2="y_high:Q", color=colour)
    high = high.encode(y=alt.Y("y_low:Q", title=y_title, scale=alt.Scale(zero=False, padding=24)))
    return alt.layer(wide, high, marks).properties(width=WIDTH, height=320)


def _ink_on_tiles(alt: Any, light: str) -> Any:
    return alt.condition(f"datum.{light}", alt.value("black"), alt.value("white"))
