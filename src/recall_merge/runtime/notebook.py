"""Results and progress as a notebook shows them: tables whose cells are shaded by their numbers, and bars in the cell that runs.

Styles stand in the tags, since many notebooks drop style sheets; colours are translucent, so that tables read well on light and on dark.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

from recall_merge.runtime.progress import Advance

BETWEEN = 0.2  # seconds from one drawing of a bar to the next
TEAL = "33, 145, 140"


class Shaded(NamedTuple):
    """A cell, and how strongly it is shaded, from 0 to 1; None for not at all."""

    text: str
    share: float | None


def shaded(values: Sequence[float | None], form: str = ".3f") -> list[Shaded]:
    """Numbers as cells, shaded from the lowest to the highest.

    >>> shaded([1.0, None, 3.0])
    [Shaded(text='1.000', share=0.0), Shaded(text='-', share=None), Shaded(text='3.000', share=1.0)]
    """
    known = [value for value in values if value is not None]
    low, reach = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return [
        Shaded("-", None) if value is None else Shaded(format(value, form), (value - low) / reach if reach else 0.0) for value in values
    ]


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str | Shaded]]) -> str:
    """A table in HTML; all text in it is escaped."""
    lines = [f"<table><caption style='text-align: left'>{escape(caption)}</caption>"]
    lines.append("<thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>" + "".join(map(_cell, row)) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _cell(content: str | Shaded) -> str:
    text, share = content if isinstance(content, Shaded) else (content, None)
    style = "" if share is None else f" style='background: rgba({TEAL}, {0.6 * share:.2f})'"
    return f"<td{style}>{escape(text)}</td>"


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class NotebookBars:
    """Bars in the output of the cell that runs, one for each stage that is under way; a finished one disappears."""

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        from IPython.display import HTML, DisplayHandle

        start, done, drawn = time.monotonic(), 0, 0.0

        def bar() -> Any:
            share = min(1.0, done / total) if total else 1.0
            left = f", {(time.monotonic() - start) * (1 - share) / share:.0f} s left" if 0 < share < 1 else ""
            return HTML(f"<progress value='{share:.4f}'></progress> {escape(label)}: {share:.0%} of {total:,} {escape(unit)}{left}")

        handle = DisplayHandle()
        handle.display(bar())

        def advance(amount: int) -> None:
            nonlocal done, drawn
            done += amount
            if (now := time.monotonic()) - drawn >= BETWEEN:
                drawn = now
                handle.update(bar())

        try:
            yield advance
        finally:
            handle.update(HTML(""))
