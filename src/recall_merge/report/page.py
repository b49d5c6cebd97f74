"""A report as one HTML file: what it consists of, and how that becomes bytes. Nothing is fetched, and only two scripts may run.

All text comes from users at some point: names, prompts, answers. The template escapes everything; charts lie in the page as JSON that
cannot end its script element; and the page's own policy lets the browser run the two scripts by their hashes, and connect to nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from recall_merge.report.pictures import altair, save_chart
from recall_merge.report.theme import PAGE_INK, spec_of


@dataclass(frozen=True)
class Figure:
    """A chart, and the same as a table for those who cannot see it.

    Attributes:
        name: of its files, in plain letters.
        says: what it shows, for everybody.
        chart: by Altair. Its width is what it takes at most.
    """

    kind: ClassVar[str] = "figure"
    name: str
    title: str
    says: str
    chart: Any
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    on_page: bool = True
    """Or among the pictures alone."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names its row. Numbers may be long texts, too: they are cut to a box that scrolls."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Something to type."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Item:
    """A test item that changed: its number, its scores before and after, and words where they were asked for."""

    id: str
    before: str
    after: str
    lost: bool
    prompt: str = ""
    right: str = ""
    said_before: str = ""
    said_after: str = ""


@dataclass(frozen=True)
class Job:
    """A job of R. `anchor` leads to its items, if it has some."""

    shown: str
    share: float | None
    """0 to 1: how strong its colour is; None for an empty job."""
    anchor: str = ""
    new: bool = False
    """The task was learnt at this stage."""


@dataclass(frozen=True)
class Items:
    """What changed behind one job."""

    anchor: str
    title: str
    summary: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Matrix:
    """R as a heat map of which each job opens its items. It is a table, so it can be read aloud and walked by keyboard."""

    kind: ClassVar[str] = "matrix"
    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Job]]]
    panels: Sequence[Items]


@dataclass(frozen=True)
class Tree:
    """Lineage: nested lists of (label, is it now, children)."""

    kind: ClassVar[str] = "tree"
    nodes: Sequence[Any]


Block = Figure | Table | Text | Code | Matrix | Tree


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        lede: the answer in a few sentences.
        facts: small print at the end: (name, value).
    """

    title: str
    subject: str
    lede: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = field(default=())

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
        policy="; ".join(
            ("default-src 'none'", f"script-src {' '.join(map(_hash, scripts.values()))}", "style-src 'unsafe-inline'", "img-src data:")
        ),
        spec=_spec,
    )


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Each chart as PNG and SVG."""
    return [
        save_chart(figure.chart.properties(title=figure.title), folder / f"{figure.name}.{form}", figure.says)
        for figure in figures
        for form in ("png", "svg")
    ]


def json_in_html(value: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element, or begin a comment.

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


SNIPPET = "window.vegaEmbed = vegaEmbed;"  # what the page needs of the bundle


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    altair()
    import vl_convert

    return vl_convert.javascript_bundle(SNIPPET).replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").strip()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
