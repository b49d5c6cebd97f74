"""How a chart becomes a file: one Vega-Lite chart gives PNG, SVG, HTML and JSON, with no browser and no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recall_merge.report.theme import PAPER_INK, spec_of
from recall_merge.runtime.errors import MissingExtra, OutputError

SUFFIXES = (".png", ".svg", ".html", ".json")


def altair() -> Any:
    """The package.

    Raises:
        MissingExtra: without the `report` extra.
    """
    try:
        import altair as package
        import vl_convert  # noqa: F401
    except ImportError:
        raise MissingExtra("report", "a picture") from None
    return package


def save_chart(chart: Any, path: Path, description: str = "") -> Path:
    """Save a chart in the form that the suffix of `path` names, dark on white; as PNG with 144 dots an inch.

    Raises:
        OutputError: if there is no such form.
    """
    import vl_convert

    if path.suffix not in SUFFIXES:
        raise OutputError(f"a picture cannot be saved as '{path.suffix}'", where=path, fix=f"use one of {', '.join(SUFFIXES)}")
    spec = spec_of(chart, ink=PAPER_INK, background="white", description=description)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(vl_convert.vegalite_to_png(spec, ppi=144))
    elif path.suffix == ".json":
        path.write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", "utf-8")
    else:
        drawn = vl_convert.vegalite_to_svg(spec) if path.suffix == ".svg" else vl_convert.vegalite_to_html(spec, bundle=True)
        path.write_text(drawn, "utf-8")
    return path
