"""The look of all charts, and how a chart becomes a file: PNG, SVG, HTML or JSON, without a browser or a network.

On a page the ink follows the reader's light or dark theme; files are dark on white. The colours are those of Okabe and Ito, which
colour-blind readers can distinguish; and no chart distinguishes models by colour alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.runtime.durable import replacing, write_whole
from recall_merge.runtime.errors import MissingExtra, OutputError

SUFFIXES = (".png", ".svg", ".html", ".json")
MODELS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7A8B00")
LOST, WON = "#D55E00", "#0072B2"
SEQUENTIAL, DIVERGING = "viridis", "purpleorange"
PAPER_INK, PAGE_INK = "#1d1f24", "currentColor"
WIDTH = 860  # of a chart, in pixels
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


def altair() -> Any:
    """The altair package.

    Raises:
        MissingExtra: without the `report` extra.
    """
    try:
        import altair as package
        import vl_convert  # noqa: F401
    except ModuleNotFoundError:  # not ImportError: a library that cannot be loaded, for want of memory say, is not missing
        raise MissingExtra("report", "a picture") from None
    return package


def chart_of(values: Sequence[Mapping[str, Any]]) -> Any:
    """A chart of some points, to which marks and encodings are added."""
    alt = altair()
    return alt.Chart(alt.Data(values=list(values)))


def save_chart(chart: Any, path: Path, description: str = "") -> Path:
    """Save a chart, dark on white, in the format that the suffix of `path` names; a PNG has 144 dots per inch.

    Raises:
        OutputError: if the suffix names no such format.
    """
    import vl_convert

    if path.suffix not in SUFFIXES:
        raise OutputError(f"a picture cannot be saved as '{path.suffix}'", where=path, fix=f"use one of {', '.join(SUFFIXES)}")
    spec = spec_of(chart, ink=PAPER_INK, background="white", description=description)
    if path.suffix == ".png":
        with replacing(path) as partial:
            partial.write_bytes(vl_convert.vegalite_to_png(spec, ppi=144))
    elif path.suffix == ".json":
        write_whole(path, json.dumps(spec, indent=1, ensure_ascii=False) + "\n")
    else:
        write_whole(path, vl_convert.vegalite_to_svg(spec) if path.suffix == ".svg" else vl_convert.vegalite_to_html(spec, bundle=True))
    return path


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
