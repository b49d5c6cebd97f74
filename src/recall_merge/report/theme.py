"""The look of all charts: on the page the ink follows the reader's light or dark theme; files are dark on white.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish; and no chart distinguishes models by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MODELS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7A8B00")
LOST, WON = "#D55E00", "#0072B2"
SEQUENTIAL, DIVERGING = "viridis", "purpleorange"
PAPER_INK, PAGE_INK = "#1d1f24", "currentColor"
WIDTH = 860  # of a chart, in pixels
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


def config(ink: str, background: str | None) -> dict[str, Any]:
    """Vega-Lite's configuration: text and lines in `ink`."""
    title = {"titleColor": ink, "titleFontSize": 13, "titleFontWeight": "normal"}
    label = {"labelColor": ink, "labelFontSize": 12, "labelLimit": 150}
    colours = {f"{part}Color": ink for part in ("domain", "tick", "grid")}
    opacities = {"domainOpacity": 0.5, "tickOpacity": 0.5, "gridOpacity": 0.12}
    legend = {"orient": "top", "symbolOpacity": 1, "columns": 4, "titleLimit": 260, "gradientLength": 160}
    return {
        "background": background,
        "font": FONT,
        "view": {"stroke": None},
        "axis": title | label | colours | opacities | {"labelOverlap": True},
        "legend": title | label | legend,
        "header": {"titleColor": ink, "labelColor": ink, "labelFontSize": 12},
        "title": {"color": ink, "fontSize": 13, "anchor": "start"},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": ink},
        "errorbar": {"rule": {"color": ink}},
    }


def spec_of(chart: Any, *, ink: str, background: str | None, description: str = "") -> dict[str, Any]:
    """A chart as Vega-Lite, in one of the two looks. `description` is what a screen reader reads out."""
    spec = chart.to_dict(validate=False)
    spec["config"] = config(ink, background)
    if description:
        spec["description"] = description
    return spec


def model_colours(names: Sequence[str]) -> Mapping[str, Any]:
    """The scale that gives each model its colour; after the last colour they start again."""
    return {"domain": list(names), "range": [MODELS[number % len(MODELS)] for number in range(len(names))]}
