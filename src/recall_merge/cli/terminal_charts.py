"""Charts in a terminal: tables whose cells are coloured by their numbers, and strips of bars over the layers.

They can be read without colour: cells show their number, and bars have a height. The colours are those of the report: viridis, and violet
to orange around a meaningful middle. In a pipe the same tables are plain text, as wide as they need to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recall_merge.cli.console import printable, table

BARS = "▁▂▃▄▅▆▇█"
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
DIVERGING = ("#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214", "#b35806")


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and its place on the colour scale from 0 to 1; None for no colour."""

    text: str
    share: float | None = None


def is_watched(console: Any) -> bool:
    """Whether the output is a terminal that can show bars."""
    return console.is_terminal and not console.options.ascii_only


def plain(name: str, columns: int = 64) -> str:
    """A user's name as one short line without control characters.

    >>> plain("a\\x1b[31m\\nb"), plain("x" * 50, 5)
    ('a·[31m·b', 'xxxx…')
    """
    from rich.cells import cell_len, set_cell_size

    name = printable(name[: 4 * columns]).replace("\n", "·")
    return name if cell_len(name) <= columns else set_cell_size(name, columns - 1).rstrip() + "…"


def spark(values: Sequence[float | None], low: float = 0.0, high: float = 1.0) -> str:
    """Numbers as bars; a gap for None.

    >>> spark([0.0, 0.5, None, 1.0])
    '▁▅ █'
    """
    return "".join(" " if value is None else BARS[_step(_share(value, low, high), len(BARS))] for value in values)


def heat(
    head: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], width: int, *, below: tuple[str, Sequence[str]] | None = None
) -> Iterator[Any]:
    """A table of coloured cells, split into several if it is wider than `width`.

    Args:
        head: a name for the rows, then one per column.
        rows: (name, its cells).
        below: a last row without colours: its name, and one line of bars per column.
    """
    from rich.cells import cell_len
    from rich.text import Text

    first, *names = (plain(name, _name_columns(width)) for name in head)
    lines = [
        (plain(label, _name_columns(width)), [Text(cell.text, "" if cell.share is None else tint(cell.share)) for cell in cells])
        for label, cells in rows
    ]
    if below is not None:
        lines.append((below[0], [Text(bars) for bars in below[1]]))
    sizes = [max(cell_len(name), *(cells[at].cell_len for _, cells in lines)) + 2 for at, name in enumerate(names)]
    room = width - max(map(cell_len, (first, *(label for label, _ in lines)))) - 2
    for columns in _groups(sizes, room):
        part = table()
        for name in (first, *(names[at] for at in columns)):
            part.add_column(Text(name), no_wrap=True)
        for label, cells in lines:
            part.add_row(Text(label), *(cells[at] for at in columns))
        yield part


def strips(title: str, numbers: Mapping[str, Any], width: int, *, middle: float | None = None) -> Any:
    """A table in the form of `record.json` as one line of bars per model; height and colour show the same number.

    Args:
        middle: a meaningful number, such as an even share, from which colours diverge. By default they run from lowest to highest.
    """
    from rich.cells import cell_len
    from rich.text import Text

    values = [value for row in numbers["rows"] for value in row]
    low, high = min(values), max(values)
    if middle is not None:
        reach = max(high - middle, middle - low)
        low, high = middle - reach, middle + reach
    names = [plain(name, _name_columns(width)) for name in numbers["experts"]]
    lead = max(5, *map(cell_len, names)) + 1
    layers = len(numbers["rows"])
    per_bar = -(-layers // max(1, width - lead - len("  0.000 to 0.000")))  # layers
    scale = f"{title}: {BARS[0]} {low:.3f} to {BARS[-1]} {high:.3f}" + ("" if middle is None else f", around {middle:.3f}, an even share")
    lines = Text(scale + (f"; each bar is {per_bar} layers" if per_bar > 1 else "") + "\n", no_wrap=True)
    for name, column in zip(names, zip(*numbers["rows"], strict=True), strict=True):
        lines.append(name + " " * (lead - cell_len(name)))
        for start in range(0, layers, per_bar):
            group = column[start : start + per_bar]
            share = _share(sum(group) / len(group), low, high)
            lines.append(BARS[_step(share, len(BARS))], _glow(share, VIRIDIS if middle is None else DIVERGING))
        lines.append(f"  {min(column):.3f} to {max(column):.3f}\n")
    bars, last = -(-layers // per_bar), str(numbers["layers"][-1])
    return lines.append(f"{'layer':<{lead}}{numbers['layers'][0]}{last:>{max(bars - 1, len(last) + 1)}}")


def tint(share: float, colours: Sequence[str] = VIRIDIS) -> str:
    """The style of a cell: its colour, and black or white ink, whichever is easier to read on it (WCAG's relative luminance).

    >>> tint(0.0), tint(1.0)
    ('#ffffff on #440154', '#000000 on #fde725')
    """
    colour = colours[_step(share, len(colours))]
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return f"{'#000000' if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else '#ffffff'} on {colour}"


def _name_columns(width: int) -> int:
    """The most columns that a name takes: a quarter of a line."""
    return min(64, width // 4)


def _glow(share: float, colours: Sequence[str]) -> str:
    """The style of a bar: its colour, on a darker shade of the same."""
    colour = colours[_step(share, len(colours))]
    return f"{colour} on #{''.join(f'{int(colour[at : at + 2], 16) * 2 // 5:02x}' for at in (1, 3, 5))}"


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def _step(share: float, steps: int) -> int:
    return min(steps - 1, int(share * steps))


def _groups(sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns in groups that fit into a room, at least one in each.

    >>> list(_groups([4, 4, 4], 8))
    [[0, 1], [2]]
    """
    group: list[int] = []
    for column, size in enumerate(sizes):
        if group and sum(sizes[other] for other in group) + size > room:
            yield group
            group = []
        group.append(column)
    yield group
