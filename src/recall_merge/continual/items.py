"""Items behind scores: which single test rows a model lost and won from one stage to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recall_merge.files.rows import Row
from recall_merge.report.page import Item, Items
from recall_merge.report.words import Words

Score = Mapping[str, Any]  # as a stage's file keeps it, with its items
LEAST = 0.1  # smallest change of an item's score that is listed; from wrong to right is 1
LISTED = 30  # most items listed per direction and cell


@dataclass(frozen=True)
class Change:
    """How the items of one task changed between two stages: shares of all items, what guessing alone gives of either, and counts."""

    lost: float
    won: float
    chance: float
    lost_items: int
    won_items: int
    n: int


def pairs_of(before: Score, after: Score) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The items that are in both scores, and have scores of their own."""
    old = {item["id"]: item for item in before["items"] if item["score"] is not None}
    return [(old[item["id"]], item) for item in after["items"] if item["id"] in old and item["score"] is not None]


def change_of(before: Score, after: Score) -> Change | None:
    """What went from right to wrong, and back; None where items have no scores of their own."""
    from recall_merge.maths.metrics import item_changes

    pairs = pairs_of(before, after)
    if not pairs:
        return None
    old, new = [item["score"] for item, _ in pairs], [item["score"] for _, item in pairs]
    choices = [item["choices"] for _, item in pairs]
    chance = item_changes(old, new, choices=choices if min(choices) >= 2 else None).chance
    gains, n = [b - a for a, b in zip(old, new, strict=True)], len(pairs)
    lost, won = sum(max(-gain, 0) for gain in gains) / n, sum(max(gain, 0) for gain in gains) / n
    return Change(lost, won, chance, sum(gain < -LEAST for gain in gains), sum(gain > LEAST for gain in gains), n)


def changed_items(anchor: str, title: str, before: Score, after: Score, rows: Mapping[int, Row], words: Words) -> Items:
    """The items that changed most, lost ones first."""
    changed = [(new["score"] - old["score"], old, new) for old, new in pairs_of(before, after)]
    changed.sort(key=lambda entry: -abs(entry[0]))
    lost, won = [entry for entry in changed if entry[0] < -LEAST], [entry for entry in changed if entry[0] > LEAST]
    change = change_of(before, after)
    summary = f"{len(lost)} items lost and {len(won)} won, of {len(changed)}."
    if change and change.chance:
        summary += f" Guessing alone would lose and win {change.chance:.1%} each."
    if max(len(lost), len(won)) > LISTED:
        summary += f" Shown are the {LISTED} of each that changed most."
    return Items(anchor, title, summary, [_item(old, new, rows, words) for _, old, new in (*lost[:LISTED], *won[:LISTED])])


def _item(before: Mapping[str, Any], after: Mapping[str, Any], rows: Mapping[int, Row], words: Words) -> Item:
    row = rows.get(after["id"]) if isinstance(after["id"], int) else None
    texts = {"prompt": words.cut(row.plain), "right": words.cut(row.completion)} if row else {}
    texts |= {"said_before": words.cut(before["prediction"]), "said_after": words.cut(after["prediction"])}
    return Item(str(after["id"]), _score(before["score"]), _score(after["score"]), after["score"] < before["score"], **texts)


def _score(value: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(value, f"{value:.2f}")
