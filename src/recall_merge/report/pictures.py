"""How a chart becomes a file: one Vega-Lite chart gives PNG, SVG, HTML and JSON, with no browser and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recall_merge.errors import MissingExtra, OutputError

SUFFIXES = (".png", ".svg", ".html", ".json")


def altair() -> Any:
    """The package.

    Raises:
        MissingExtra: without the `report` extra.
    """
    try:
        import altair as package
    except ImportError:
        raise MissingExtra("report", "a picture") from None
    return package


def save_chart(chart: Any, path: Path) -> Path:
    """Save a chart in the form that the suffix of `path` names.

    Raises:
        OutputError: if there is no such form.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"a picture cannot be saved as '{path.suffix}'", where=path, fix=f"use one of {', '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = chart.configure_axis(labelFontSize=12, titleFontSize=13).configure_legend(labelFontSize=12, titleFontSize=13)
    chart.save(str(path), **({"ppi": 144} if path.suffix == ".png" else {}))
    return path
