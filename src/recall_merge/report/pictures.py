"""Turns a chart into a file: one Vega-Lite chart gives PNG, SVG, HTML and JSON, without a browser or a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.files.durable import replacing, write_whole
from recall_merge.report.theme import PAPER_INK, spec_of
from recall_merge.runtime.errors import MissingExtra, OutputError

SUFFIXES = (".png", ".svg", ".html", ".json")


def altair() -> Any:
    """The altair package.

    Raises:
        MissingExtra: without the `report` extra.
    """
    try:
        import altair as package
        import vl_convert  # noqa: F401
    except ImportError:
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
