"""Items behind scores: what single test rows went through from one stage to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.experts import hash_file
from recall_merge.files.rows import Row, read_rows
from recall_merge.report.page import Item, Items
from recall_merge.report.words import Words

if TYPE_CHECKING:
    from recall_merge.continual.state import Task

Score = Mapping[str, Any]  # as a stage's file keeps it, with its items
LEAST = 0.1  # of a point that an item must have won or lost to be listed; right and wrong are a whole point apart
LISTED = 30  # items of each direction and job, at most


@dataclass(frozen=True)
class Change:
    """What became of the items of one task between two stages: shares of all items, less nothing, and what chance gives of either."""

    lost: float
    won: float
    chance: float
    lost_items: int
    won_items: int
    n: int


def pairs_of(before: Score, after: Score) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The items that both scores have, and that have a score of their own."""
    known = {item["id"]: item for item in before["items"] if item["score"] is not None}
    return [(known[item["id"]], item) for item in after["items"] if item["id"] in known and item["score"] is not None]


def change_of(before: Score, after: Score) -> Change | None:
    """What went from right to wrong, and back; None where the items are not known."""
    from recall_merge.maths.metrics import item_changes

    pairs = pairs_of(before, after)
    if not pairs:
        return None
    old, new = [item["score"] for item, _ in pairs], [item["score"] for _, item in pairs]
    offered = [item["choices"] for _, item in pairs]
    lost, won, chance = item_changes(old, new, choices=offered if min(offered) >= 2 else None)
    raw_lost = sum(max(a - b, 0) for a, b in zip(old, new, strict=True)) / len(pairs)
    raw_won = sum(max(b - a, 0) for a, b in zip(old, new, strict=True)) / len(pairs)
    differences = [b - a for a, b in zip(old, new, strict=True)]
    counted = sum(d < -LEAST for d in differences), sum(d > LEAST for d in differences)
    del lost, won  # the page shows the plain shares, and chance beside them
    return Change(raw_lost, raw_won, chance, *counted, len(pairs))


def panel(anchor: str, title: str, before: Score, after: Score, rows: Mapping[int, Row], words: Words) -> Items:
    """The items that changed most, those lost first."""
    pairs = [(a, b) for a, b in pairs_of(before, after) if abs(b["score"] - a["score"]) > LEAST]
    pairs.sort(key=lambda pair: (pair[1]["score"] > pair[0]["score"], -abs(pair[1]["score"] - pair[0]["score"])))
    lost = [pair for pair in pairs if pair[1]["score"] < pair[0]["score"]]
    won = pairs[len(lost) :]
    shown = [*lost[:LISTED], *won[:LISTED]]
    change = change_of(before, after)
    summary = f"{len(lost)} items lost and {len(won)} won, of {change.n if change else 0}."
    if change and change.chance:
        summary += f" Guessing alone would lose and win {change.chance:.1%} each."
    if len(pairs) > len(shown):
        summary += f" Shown are the {LISTED} of each that changed most."
    return Items(anchor, title, summary, [_item(a, b, rows, words) for a, b in shown])


def rows_of(folder: Path, task: Task) -> dict[int, Row]:
    """The test rows of a task by their positions; none where the file is gone, or is not what was scored."""
    from recall_merge.continual.state import found_path

    if task.test is None or not (path := found_path(folder, task.test.path)).is_file() or hash_file(path) != task.test.sha256:
        return {}
    return {row.index: row for row in read_rows(path)}


def _item(before: Mapping[str, Any], after: Mapping[str, Any], rows: Mapping[int, Row], words: Words) -> Item:
    row = rows.get(after["id"]) if isinstance(after["id"], int) else None
    told = {"prompt": words.cut(row.plain), "right": words.cut(row.completion)} if row else {}
    told |= {"said_before": words.cut(before["prediction"]), "said_after": words.cut(after["prediction"])}
    return Item(str(after["id"]), _score(before["score"]), _score(after["score"]), after["score"] < before["score"], **told)


def _score(value: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(value, f"{value:.2f}")
