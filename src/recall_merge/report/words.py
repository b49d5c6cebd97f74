"""The texts of rows and answers on a page: only where they are wanted, and cut to what a page can hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from recall_merge.files.rows import Row

CHARACTERS = 2000  # of one text; the rest is counted
BUDGET = 1_500_000  # characters of all texts on a page


class Words:
    """Cuts texts, and counts what is left of a page's budget."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.spent_out = False
        self._left = BUDGET

    def cut(self, text: str) -> str:
        """A text as the page shows it; empty where texts are not wanted, or the budget is spent."""
        if not self.wanted or not text:
            return ""
        shown = text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]} … and {len(text) - CHARACTERS:,} more characters"
        if len(shown) > self._left:
            self.spent_out = True
            return ""
        self._left -= len(shown)
        return shown


def sample_texts(rows: Iterable[Row], numbers: Collection[int]) -> dict[int, str]:
    """The texts of some rows, by their numbers."""
    words = Words(True)
    return {row.index: words.cut(f"{row.plain}\n{row.completion}".strip()) for row in rows if row.index in numbers}
