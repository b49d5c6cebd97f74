"""Charts of a merge, as Vega-Lite by Altair: one chart gives PNG, SVG and HTML, with no browser and no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_merge.report.pictures import altair, save_chart


def draw_weights(similarity: Mapping[str, Any] | None, weights: Mapping[str, Any], path: Path, *, title: str = "") -> Path:
    """Save similarity and weights by depth side by side, in the tables' form of `record.json`.

    Raises:
        MissingExtra: without the `report` extra.
        OutputError: if the suffix of `path` is not one of .png, .svg, .html, .json.
    """
    alt = altair()
    charts = [_panel(alt, similarity, "similarity to the newest", zero=False)] if similarity else []
    charts.append(_panel(alt, weights, "weight", zero=True))
    return save_chart(alt.hconcat(*charts, title=title) if title else alt.hconcat(*charts), path)


def _panel(alt: Any, table: Mapping[str, Any], what: str, *, zero: bool) -> Any:
    points = [
        {"depth": depth, "model": name, what: value}
        for depth, row in zip(table["depths"], table["rows"], strict=True)
        for name, value in zip(table["experts"], row, strict=True)
    ]
    order = list(table["experts"])
    return (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=alt.OverlayMarkDef(size=28), strokeWidth=2)
        .encode(
            x=alt.X("depth:Q", title="depth (0 = embedding)", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
            y=alt.Y(f"{what}:Q", title=what, scale=alt.Scale(zero=zero)),
            color=alt.Color("model:N", scale=alt.Scale(domain=order, scheme="tableau10"), title="model"),
            shape=alt.Shape("model:N", scale=alt.Scale(domain=order), title="model"),
            tooltip=["model:N", "depth:Q", alt.Tooltip(f"{what}:Q", format=".4f")],
        )
        .properties(width=380, height=260)
    )
