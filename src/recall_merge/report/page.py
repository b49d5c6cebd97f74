"""A report as one HTML file: its parts, and how they are rendered. The page fetches nothing and runs only its own two scripts.

Much of its text comes from users: names, prompts, answers. The template escapes everything; charts are stored in the page as JSON that
cannot end its script element; and the page's security policy allows the two scripts by their hashes, and no connections.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from recall_merge.report.pictures import PAGE_INK, altair, save_chart, spec_of


@dataclass(frozen=True)
class Figure:
    """A chart, and the same numbers as a table for readers who cannot see it."""

    name: str  # of its files, in plain letters
    title: str
    says: str  # the caption: what the chart shows
    chart: Any  # by Altair; its width is a maximum
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    on_page: bool = True  # False: it is only written as a picture


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. Long texts are shown in a box that scrolls."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Text:
    """A paragraph, or a command to type."""

    text: str
    is_code: bool = False


@dataclass(frozen=True)
class Item:
    """A test item that changed: its number, its scores before and after, and its texts if they were asked for."""

    id: str
    before: str
    after: str
    lost: bool
    prompt: str = ""
    right: str = ""
    said_before: str = ""
    said_after: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of R."""

    shown: str
    share: float | None  # 0 to 1: how strong its colour is; None for an empty cell
    anchor: str = ""  # of its items, if there are any
    new: bool = False  # the task was learnt at this stage


@dataclass(frozen=True)
class Items:
    """The items that changed behind one cell."""

    anchor: str
    title: str
    summary: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Matrix:
    """R as a heat map whose cells open their items. It is a table, so it can be read aloud and used by keyboard."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    panels: Sequence[Items]


@dataclass(frozen=True)
class Tree:
    """Lineage: nested lists of (label, is it the current stage, children)."""

    nodes: Sequence[Any]


Block = Figure | Table | Text | Matrix | Tree
"""What a section consists of. The template tells them apart by the names of their classes."""


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subject: str
    lede: Sequence[str]  # the main findings in a few sentences
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()  # small print at the end: (name, value)

    @property
    def figures(self) -> list[Figure]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        MissingExtra: without the `report` extra.
    """
    from jinja2 import Environment, StrictUndefined

    here = files("recall_merge.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html.jinja").read_text("utf-8"))
    scripts = {"bundle": _bundle(), "draw": (here / "page.js").read_text("utf-8").strip()}
    return template.render(
        page=page,
        style=(here / "page.css").read_text("utf-8"),
        scripts=scripts,
        policy=f"default-src 'none'; script-src {' '.join(map(_hash, scripts.values()))}; style-src 'unsafe-inline'; img-src data:",
        spec=_spec,
    )


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Save each chart as PNG and SVG."""
    files = [(figure, folder / f"{figure.name}.{form}") for figure in figures for form in ("png", "svg")]
    return [save_chart(figure.chart.properties(title=figure.title), file, figure.says) for figure, file in files]


def json_in_html(value: Any) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element or begin a comment.

    >>> json_in_html("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _spec(figure: Figure) -> Any:
    from markupsafe import Markup

    spec = spec_of(figure.chart, ink=PAGE_INK, background=None, description=f"{figure.title}. {figure.says}")
    return Markup(json_in_html(spec))


SNIPPET = "window.vegaEmbed = vegaEmbed;"  # the only name that the page uses


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    altair()
    import vl_convert

    return vl_convert.javascript_bundle(SNIPPET).replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").strip()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
