"""The charts of a workspace: scores from stage to stage, the metrics of continual learning, and the lineage of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recall_merge.report.pictures import LOST, SEQUENTIAL, WIDTH, WON, altair, chart_of, model_colours


def matrix(cells: Sequence[Mapping[str, Any]], stages: Sequence[str], tasks: Sequence[str]) -> Any:
    """R as a heat map.    cells: row and column (positions of stage and task), score, shown."""
    alt = altair()
    x = alt.X("column:O", title=None, axis=alt.Axis(labelAngle=0, labelExpr=f"{_names(tasks)}[datum.value]", orient="top"))
    y = alt.Y("row:O", title="after stage", axis=alt.Axis(labelExpr=f"{_names(stages)}[datum.value]"))
    base = chart_of(cells).encode(x=x, y=y)
    tiles = base.mark_rect().encode(color=alt.Color("score:Q", scale=alt.Scale(domain=[0, 1], scheme=SEQUENTIAL), title="score"))
    words = base.mark_text().encode(text="shown:N", color=alt.condition("datum.score > 0.6", alt.value("black"), alt.value("white")))
    return alt.layer(tiles, words).properties(width=min(WIDTH, 110 * len(tasks)), height=34 * len(stages))


def curves(points: Sequence[Mapping[str, Any]], stages: Sequence[str], tasks: Sequence[str]) -> Any:
    """One line per task over the stages, with 95 % intervals.    points: at (the stage's position), task, score, low, high."""
    alt = altair()
    colours = model_colours(tasks)
    axis = alt.Axis(labelExpr=f"{_names(stages)}[datum.value]", values=list(range(len(stages))), grid=False, labelAngle=0)
    base = chart_of(points).encode(
        x=alt.X("at:Q", title="after stage", axis=axis, scale=alt.Scale(domain=[0, max(1, len(stages) - 1)], nice=False, padding=12)),
        color=alt.Color("task:N", scale=alt.Scale(**colours), title="task"),
    )
    lines = base.mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2).encode(
        y=alt.Y("score:Q", title="score, with 95 % interval", scale=alt.Scale(domain=[0, 1])),
        shape=alt.Shape("task:N", scale=alt.Scale(domain=list(tasks)), title="task"),
        tooltip=[alt.Tooltip("task:N"), *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("score", "low", "high"))],
    )
    whiskers = (
        base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.7, aria=False).encode(y="low:Q", y2="high:Q")
    )
    return alt.layer(whiskers, lines).properties(width=WIDTH, height=280)


def numbers(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The metrics of continual learning with their intervals.    rows: at (position), name, value, low, high."""
    alt = altair()
    names = _names([row["name"] for row in rows])
    base = chart_of(rows).encode(y=alt.Y("at:O", title=None, axis=alt.Axis(labelExpr=f"{names}[datum.value]", labelLimit=240)))
    zero = chart_of([{"zero": 0}]).mark_rule(aria=False, opacity=0.4).encode(x="zero:Q")
    dots = base.mark_point(filled=True, size=80, color=WON, opacity=1).encode(
        x=alt.X("value:Q", title="with 95 % interval"),
        tooltip=[alt.Tooltip("name:N"), *(alt.Tooltip(f"{name}:Q", format="+.3f") for name in ("value", "low", "high"))],
    )
    whiskers = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2, aria=False).encode(x="low:Q", x2="high:Q")
    return alt.layer(zero, whiskers, dots).properties(width=WIDTH, height=34 * len(rows))


def flow(rows: Sequence[Mapping[str, Any]], steps: Sequence[str]) -> Any:
    """Items lost to the left, items won to the right, one bar per step.    rows: at (the step's position), kind, share, items, task."""
    alt = altair()
    kinds = alt.Scale(domain=["right to wrong", "wrong to right"], range=[LOST, WON])
    base = chart_of(rows)
    bars = base.mark_bar(height={"band": 0.75}).encode(
        y=alt.Y("at:O", title=None, axis=alt.Axis(labelExpr=f"{_names(steps)}[datum.value]", labelLimit=220)),
        x=alt.X("share:Q", title="share of the task's items", axis=alt.Axis(format="+%")),
        color=alt.Color("kind:N", scale=kinds, title=None),
        tooltip=[alt.Tooltip("task:N"), alt.Tooltip("kind:N"), alt.Tooltip("items:Q"), alt.Tooltip("share:Q", format="+.1%")],
    )
    zero = chart_of([{"zero": 0}]).mark_rule(aria=False, opacity=0.5).encode(x="zero:Q")
    return alt.layer(bars, zero).properties(width=WIDTH, height=24 * len(steps))


def lineage(stages: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]]) -> Any:
    """Stages in the order in which they were made, one row per branch; dashed lines are rollbacks.

    stages: at, lane, name, now; edges: at, lane, to_at, to_lane, back.
    """
    alt = altair()
    forward, back = [[edge for edge in edges if edge["back"] is kind] for kind in (False, True)]
    newest, lanes = max(stage["at"] for stage in stages), max(stage["lane"] for stage in stages)
    x = {"scale": alt.Scale(domain=[-0.35, newest + 0.6], nice=False), "axis": None}
    y = {"scale": alt.Scale(domain=[lanes + 0.5, -1 if back else -0.4], nice=False), "axis": None}
    position = {"x": alt.X("at:Q", **x), "y": alt.Y("lane:Q", **y)}
    lines = chart_of(forward).mark_rule(strokeWidth=2, aria=False).encode(**position, x2="to_at:Q", y2="to_lane:Q")
    bows = [
        {"way": way, "step": step, "at": at, "lane": lane} for way, edge in enumerate(back) for step, (at, lane) in enumerate(_bow(edge))
    ]
    ways = chart_of(bows).mark_line(interpolate="natural", strokeDash=[5, 4], strokeWidth=2, color=LOST)
    ways = ways.encode(**position, order="step:Q", detail="way:N")
    heads = chart_of([bow for bow in bows if bow["step"] == 2]).encode(**position)
    ways += heads.mark_point(shape="triangle-down", filled=True, size=90, color=LOST, opacity=1, aria=False)
    base = chart_of(stages).encode(**position)
    colour = alt.condition("datum.now", alt.value(LOST), alt.value(WON))
    dots = base.mark_circle(size=320, opacity=1).encode(color=colour, tooltip=[alt.Tooltip("name:N")])
    above, below = base.transform_filter("datum.lane == 0"), base.transform_filter("datum.lane > 0")
    words = [part.mark_text(dy=dy, limit=110, aria=False).encode(text="name:N") for part, dy in ((above, -22), (below, 24))]
    return alt.layer(lines, ways, dots, *words).properties(width=min(WIDTH, 170 * (newest + 1) + 60), height=84 * (lanes + 1))


def _bow(edge: Mapping[str, Any]) -> list[tuple[float, float]]:
    """A rollback's curve leaves above its stage and ends on the one that it leads to; in the first row it passes above the names."""
    ends = [(edge[at], edge[lane] - (0.15 if edge[lane] else 0.56)) for at, lane in (("at", "lane"), ("to_at", "to_lane"))]
    top = min(lane for _, lane in ends) - 0.35
    return [ends[0], ((edge["at"] + edge["to_at"]) / 2, top), ends[1]]


def _names(names: Sequence[str]) -> str:
    """Names as a list in a Vega expression: JSON in plain ASCII, whatever characters users chose.

    >>> print(_names(["a", "it's \\"1\\""]))
    ["a", "it's \\"1\\""]
    """
    return json.dumps(list(names))
