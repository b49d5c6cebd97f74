"""Numbers at a glance in a terminal: tables whose cells are coloured by their number, and strips of bars over layer.

No colour is needed to read them: cells say their number, and bars have a height. Colours are those of the report: viridis, and violet to
orange around a middle that means something. Where nobody watches, the same tables come plain, as wide as they need.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
DIVERGING = ("#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214", "#b35806")
BIDI = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and where its number lies on the scale of colours, from 0 to 1; None for no colour."""

    text: str
    share: float | None = None


Trends = tuple[str, Sequence[str]]


def watched(console: Any) -> bool:
    """Somebody looks at it, on a terminal that can show bars."""
    return console.is_terminal and not console.options.ascii_only


def plain(name: str, columns: int = 64) -> str:
    """A user's name as one short line, whatever is in it: no control character reaches a terminal.

    >>> plain("a\\x1b[31m\\nb"), plain("x" * 50, 5)
    ('a·[31m·b', 'xxxx…')
    """
    from rich.cells import cell_len, set_cell_size

    name = "".join("·" if unicodedata.category(one) == "Cc" or one in BIDI else one for one in name[: 4 * columns])
    return name if cell_len(name) <= columns else set_cell_size(name, columns - 1).rstrip() + "…"


def spark(values: Sequence[float | None], low: float = 0.0, high: float = 1.0) -> str:
    """Numbers as bars; a gap where there is none.

    >>> spark([0.0, 0.5, None, 1.0])
    '▁▅ █'
    """
    return "".join(" " if value is None else BARS[_step(_share(value, low, high), len(BARS))] for value in values)


def heat(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], width: int, *, below: Trends | None = None) -> Iterator[Any]:
    """A table of coloured cells, as several below one another where it is wider than `width`.

    Args:
        head: the names of the columns, that of the rows' names first.
        below: a last row: its name, and bars for each column.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    first, *names = [plain(name, _name_room(width)) for name in head]
    lines = [
        (plain(label, _name_room(width)), [Text(cell.text, "" if cell.share is None else tint(cell.share)) for cell in cells])
        for label, cells in rows
    ]
    if below is not None:
        lines.append((below[0], [Text(bars) for bars in below[1]]))
    sizes = [max(cell_len(names[at]), *(cells[at].cell_len for _, cells in lines)) + 2 for at in range(len(names))]
    for part in _fitting(sizes, width - max(map(cell_len, (first, *(label for label, _ in lines)))) - 2):
        table = Table(box=None)
        for name in (first, *(names[at] for at in part)):
            table.add_column(Text(name), no_wrap=True)
        for label, cells in lines:
            table.add_row(Text(label), *(cells[at] for at in part))
        yield table


def strips(title: str, table: Mapping[str, Any], width: int, *, middle: float | None = None) -> Any:
    """A table in the form of a record's, models x layers, as a line of bars a model. Height and colour say the same.

    Args:
        middle: a number that means something, an even share; colours diverge from it. Without one they run from the least to the most.
    """
    from rich.cells import cell_len
    from rich.text import Text

    values = [value for row in table["rows"] for value in row]
    low, high = min(values), max(values)
    if middle is not None:
        spread = max(high - middle, middle - low)
        low, high = middle - spread, middle + spread
    names = [plain(name, _name_room(width)) for name in table["experts"]]
    lead = max(5, *map(cell_len, names)) + 1
    layers = len(table["rows"])
    each = -(-layers // max(1, width - lead - len("  0.000 to 0.000")))  # layers a bar
    said = f"{title}: {BARS[0]} {low:.3f} to {BARS[-1]} {high:.3f}" + ("" if middle is None else f", around {middle:.3f}, an even share")
    found = Text(said + (f"; a bar is {each} layers" if each > 1 else "") + "\n", no_wrap=True)
    for at, name in enumerate(names):
        column = [row[at] for row in table["rows"]]
        found.append(name + " " * (lead - cell_len(name)))
        for start in range(0, layers, each):
            group = column[start : start + each]
            share = _share(sum(group) / len(group), low, high)
            found.append(BARS[_step(share, len(BARS))], _glow(share, VIRIDIS if middle is None else DIVERGING))
        found.append(f"  {min(column):.3f} to {max(column):.3f}\n")
    bars = -(-layers // each)
    last = str(table["layers"][-1])
    return found.append(f"{'layer':<{lead}}{table['layers'][0]}{last:>{max(bars - 1, len(last) + 1)}}")


def tint(share: float, colours: Sequence[str] = VIRIDIS) -> str:
    """The style of a cell: its colour, and the ink that can be read on it (WCAG's relative luminance).

    >>> tint(0.0), tint(1.0)
    ('#ffffff on #440154', '#000000 on #fde725')
    """
    colour = colours[_step(share, len(colours))]
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return f"{'#000000' if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else '#ffffff'} on {colour}"


def _name_room(width: int) -> int:
    """Columns of a name at most: a quarter of a line."""
    return min(64, width // 4)


def _glow(share: float, colours: Sequence[str]) -> str:
    """The style of a bar: its colour, on the same at less than half the light."""
    colour = colours[_step(share, len(colours))]
    return f"{colour} on #{''.join(f'{int(colour[at : at + 2], 16) * 2 // 5:02x}' for at in (1, 3, 5))}"


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _step(share: float, steps: int) -> int:
    return min(steps - 1, int(share * steps))


def _fitting(sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns in groups that fit, one at least in each.

    >>> list(_fitting([4, 4, 4], 8))
    [[0, 1], [2]]
    """
    part: list[int] = []
    for at, size in enumerate(sizes):
        if part and sum(sizes[one] for one in part) + size > room:
            yield part
            part = []
        part.append(at)
    yield part
