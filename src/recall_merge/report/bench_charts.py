"""Charts of a bench: methods against tasks and orders, their numbers with every trial, two numbers against each other, and R."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recall_merge.report.pictures import SEQUENTIAL, WIDTH, WON, altair, model_colours


def matrix(scores: Sequence[Sequence[float | None]], stages: Sequence[str], title: str) -> Any:
    """R of one trial: a row per stage, a column per task.    scores: R, None where no score was taken; stages: the base, then the tasks."""
    alt = altair()
    rows = [stages[0], *(f"{number} {task}" for number, task in enumerate(stages[1:], start=1))]
    cells = [
        {"stage": stage, "task": task, "score": score}
        for stage, row in zip(rows, scores, strict=True)
        for task, score in zip(stages[1:], row, strict=True)
        if score is not None
    ]
    base = alt.Chart(alt.Data(values=cells)).encode(
        x=alt.X("task:N", title=None, scale=alt.Scale(domain=list(stages[1:])), axis=alt.Axis(labelAngle=-35)),
        y=alt.Y("stage:N", title="after stage", scale=alt.Scale(domain=rows)),
    )
    return _scored(base, "score").properties(width=260, height=180, title=title)


def grid(charts: Sequence[Any], columns: int) -> Any:
    """Charts side by side, so many in a row; None if there are none."""
    alt = altair()
    rows = [alt.hconcat(*charts[start : start + columns]) for start in range(0, len(charts), columns)]
    return alt.vconcat(*rows) if rows else None


def methods_by_tasks(cells: Sequence[Mapping[str, Any]], methods: Sequence[str], tasks: Sequence[str]) -> Any:
    """Scores at the end, a row per method and a column per task.    cells: method, task, score (mean over trials), shown."""
    alt = altair()
    base = alt.Chart(alt.Data(values=list(cells))).encode(
        x=alt.X("task:N", title=None, scale=alt.Scale(domain=list(tasks)), axis=alt.Axis(labelAngle=-90, orient="top", labelOverlap=False)),
        y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("task:N"), alt.Tooltip("shown:N", title="score")],
    )
    return _scored(base, "score at the end").properties(width=WIDTH, height=30 * len(methods))


def _scored(base: Any, title: str) -> Any:
    """Tiles coloured by `score`, with the number on each."""
    alt = altair()
    tiles = base.mark_rect().encode(color=alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], scheme=SEQUENTIAL), title=title))
    numbers = base.mark_text(fontSize=11).encode(text=alt.Text("score:Q", format=".2f"), color=_ink_on_tiles(alt, "score > 0.6"))
    return alt.layer(tiles, numbers)


def dots(points: Sequence[Mapping[str, Any]], methods: Sequence[str], title: str) -> Any:
    """A number of every method: the mean as a bar's end, every trial as a point.    points: method, value."""
    alt = altair()
    base = alt.Chart(alt.Data(values=list(points))).encode(y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))))
    bars = base.mark_bar(color=WON, opacity=0.3, height={"band": 0.7}).encode(x=alt.X("mean(value):Q", title=title))
    trials = base.mark_point(filled=True, size=46, color=WON, opacity=0.9).encode(
        x=alt.X("value:Q", title=title), tooltip=[alt.Tooltip("method:N"), alt.Tooltip("value:Q", format="+.3f"), alt.Tooltip("order:N")]
    )
    return alt.layer(bars, trials).properties(width=WIDTH, height=28 * len(methods))


def ranks(cells: Sequence[Mapping[str, Any]], methods: Sequence[str], orders: Sequence[str]) -> Any:
    """Each method's place by average performance in each order; 1 is the best.    cells: method, trial, rank, value, order."""
    alt = altair()
    most = max(cell["rank"] for cell in cells)
    base = alt.Chart(alt.Data(values=list(cells))).encode(
        x=alt.X("trial:N", title="order and seed", scale=alt.Scale(domain=list(orders)), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("method:N", title=None, scale=alt.Scale(domain=list(methods))),
    )
    scale = alt.Scale(scheme=SEQUENTIAL, domain=[1, max(2, most)], reverse=True)
    tiles = base.mark_rect().encode(
        color=alt.Color("rank:Q", scale=scale, title="place; 1 is the best", legend=alt.Legend(format="d", tickMinStep=1)),
        tooltip=[alt.Tooltip("method:N"), alt.Tooltip("order:N"), alt.Tooltip("rank:Q"), alt.Tooltip("value:Q", format=".3f")],
    )
    numbers = base.mark_text().encode(text="rank:Q", color=_ink_on_tiles(alt, f"rank < {1 + 0.4 * (max(2, most) - 1)}"))
    return alt.layer(tiles, numbers).properties(width=min(WIDTH, 190 * len(orders)), height=30 * len(methods))


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
