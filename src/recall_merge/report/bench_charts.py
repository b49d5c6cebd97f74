"""Charts of a bench: the numbers of each method with their spread, and R of each method as a heat map.

`summary` is the recipe's own, `recipes.bench.summary.Summary`; pictures know what they show by its fields alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from recall_merge.report.pictures import altair, save_chart

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
        cells = [
            {"stage": stage, "task": task, "score": score, "text": f"{score:.2f}"}
            for stage, row in zip(stages, one.scores.tolist(), strict=True)
            for task, score in zip(one.trial.order, row, strict=True)
            if not math.isnan(score)
        ]
        base = alt.Chart(alt.Data(values=cells)).encode(
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
